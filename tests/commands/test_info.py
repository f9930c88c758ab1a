"""``freqmask info``."""

from __future__ import annotations

import pytest
import torch

import freqmask
from freqmask.commands.show import _presence, info


def test_info_names_versions_devices_and_extras(capsys: pytest.CaptureFixture[str]) -> None:
    versions = info()
    assert versions["freqmask"] == freqmask.__version__
    assert versions["torch"].startswith(torch.__version__.split("+")[0])
    assert int(versions["cores"].split()[0]) >= 1
    assert versions["cpu"].startswith(torch.backends.cpu.get_cpu_capability())
    assert {"gpu", "extra [log]", "cache folder"} <= set(versions)
    assert len(capsys.readouterr().out.splitlines()) == len(versions)


def test_a_missing_extra_comes_with_the_line_that_installs_it() -> None:
    assert (
        _presence("log", ["torch", "no-such-library"])
        == "without no-such-library; pip install 'freqmask[log]'"
    )
    assert _presence("log", ["torch"]) == "present: torch"
