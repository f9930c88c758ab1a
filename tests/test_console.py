"""Who speaks to the user, and how."""

from __future__ import annotations

import io
import sys

import pytest

from freqmask import console


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "FREQMASK_QUIET"):
        monkeypatch.delenv(name, raising=False)


def test_say_prints_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("two\nlines")
    assert capsys.readouterr().out == "two\nlines\n"


@pytest.mark.parametrize(("variable", "spoken"), [("0", "word\n"), ("1", "")])
def test_only_the_first_process_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, spoken: str
) -> None:
    monkeypatch.setenv("RANK", variable)
    console.say("word")
    assert capsys.readouterr().out == spoken


def test_quiet_is_quiet_until_it_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FREQMASK_QUIET", "0")  # restored after the test
    console.be_quiet()
    console.say("unheard")
    console.be_quiet(False)
    console.say("heard")
    assert capsys.readouterr().out == "heard\n"


def test_what_the_terminal_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    console.say("é \udce9")  # a letter, and a byte of a file name that is no UTF-8
    assert terminal.buffer.getvalue() == b"\\xe9 \\udce9\n"  # type: ignore[attr-defined]
