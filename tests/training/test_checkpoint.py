"""Checkpoints are whole or not there, and run nothing."""

import errno
import os
import pickle
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from freqmask.errors import UserError
from freqmask.training.callbacks import AtomicCheckpointIO, StopSignals
from freqmask.training.files import WriteError
from freqmask.training.run_folder import (
    LAST,
    load_safely,
    newest_usable,
    publish,
    replace_atomically,
    save_atomically,
    step_file,
)


def write(folder: Path, step: int) -> None:
    weights = {"weights": torch.full((1000,), float(step))}
    save_atomically(
        {"global_step": step, "state_dict": weights, "optimizer_states": [], "loops": {}},
        step_file(folder, step),
    )
    publish(folder, step, keep=2)


def test_only_the_newest_are_kept_and_last_is_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        LAST,
        "step-00000010.ckpt",
        "step-00000015.ckpt",
    ]
    assert load_safely(tmp_path / LAST)["global_step"] == 15


def test_a_file_system_without_links_gets_a_copy_and_a_full_one_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")  # as exFAT answers

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path, 5)
    assert (tmp_path / LAST).is_symlink()
    monkeypatch.setattr(Path, "symlink_to", refuse)
    write(tmp_path, 10)
    assert not (tmp_path / LAST).is_symlink()
    assert load_safely(tmp_path / LAST)["global_step"] == 10
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(WriteError, match=r"last\.ckpt cannot be written: No space left on device"):
        write(tmp_path, 15)
    found, _ = newest_usable(tmp_path)
    assert found is not None
    assert found.step == 15


def test_a_checkpoint_cut_short_leaves_the_one_before_it(tmp_path: Path) -> None:
    write(tmp_path, 5)
    write(tmp_path, 10)
    newest = step_file(tmp_path, 10)
    newest.write_bytes(newest.read_bytes()[:1500])
    found, warnings = newest_usable(tmp_path)
    assert found is not None
    assert (found.path, found.step, found.content["global_step"]) == (step_file(tmp_path, 5), 5, 5)
    assert len(warnings) == 1
    assert "step-00000010" in warnings[0]
    assert "cut short" in warnings[0]


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.ckpt"
    save_atomically({"global_step": 1}, path)

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        replace_atomically(path, fail)
    assert load_safely(path)["global_step"] == 1
    assert list(tmp_path.iterdir()) == [path]


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch HACKED",)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Evil()}, step_file(tmp_path, 3))
    with pytest.raises(UserError, match="refused: reading it would run code"):
        load_safely(step_file(tmp_path, 3))
    with pytest.raises(UserError, match="would run code"):
        newest_usable(tmp_path)
    assert not (tmp_path / "HACKED").exists()


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps({"a": 1})[:5]])
def test_what_is_no_checkpoint_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.ckpt"):
        load_safely(tmp_path / "x.ckpt")


def test_a_missing_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_safely(tmp_path / "x.ckpt")
    assert newest_usable(tmp_path) == (None, [])


def test_a_file_of_weights_alone_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 5)
    save_atomically({"state_dict": {}}, step_file(tmp_path, 10))
    found, warnings = newest_usable(tmp_path)
    assert found is not None
    assert (found.path, found.step, found.content["global_step"]) == (step_file(tmp_path, 5), 5, 5)
    assert "lacks global_step, optimizer_states, loops; using the one before it" in warnings[0]


def test_what_a_training_resumes_from_is_read_once_and_not_kept(tmp_path: Path) -> None:
    write(tmp_path, 5)
    found, _ = newest_usable(tmp_path)
    assert found is not None
    files = AtomicCheckpointIO(found)
    found.path.rename(tmp_path / "elsewhere")
    assert files.load_checkpoint(found.path)["global_step"] == 5
    assert not found.content
    with pytest.raises(UserError, match="does not exist"):
        files.load_checkpoint(found.path)


def test_a_second_interrupt_reaches_a_program_that_calls_us() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT  # the step comes to its end
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            sys.exit(1)  # what Lightning's Trainer does with it
    assert signal.getsignal(signal.SIGINT) == before
