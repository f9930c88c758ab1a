"""The run folder: begun, locked, found again."""

import errno
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import pytest
from tiny_runs import close

from freqmask.errors import UserError
from freqmask.training.run_folder import RunFolder, new_run, newest_unfinished, read_yaml


def begin(path: Path, **given: object) -> RunFolder:
    run = RunFolder(path)
    run.begin({"steps": 5}, {"given": given}, "a heading")
    return run


def test_config_is_yaml_under_its_heading(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", seed=1)
    assert (run.path / "config.yaml").read_text().startswith("# a heading\n")
    assert run.config() == {"steps": 5}
    assert run.state() == {"given": {"seed": 1}}


def test_the_newest_unfinished_run_of_the_same_words_is_found(tmp_path: Path) -> None:
    old, new = begin(tmp_path / "a", seed=1), begin(tmp_path / "b", seed=1)
    begin(tmp_path / "c", seed=2)
    os.utime(old.path / "run.json", (1, 1))
    found = newest_unfinished({"seed": 1}, tmp_path)
    assert found is not None
    assert found.path == new.path
    new.finish({"steps": 5})
    found = newest_unfinished({"seed": 1}, tmp_path)
    assert found is not None
    assert found.path == old.path
    assert newest_unfinished({"seed": 3}, tmp_path) is None
    assert newest_unfinished({"seed": 1}, tmp_path / "nowhere") is None


def test_a_run_that_another_process_trains_is_left_alone(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", seed=1)
    code = (
        "import sys; from freqmask.training.run_folder import RunFolder; run = RunFolder(sys.argv[1]); run.lock();"
        "print('locked', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        assert run.is_locked()
        assert newest_unfinished({"seed": 1}, tmp_path) is None
        with pytest.raises(UserError, match="in use by another process"):
            run.lock()
    finally:
        other.kill()
        other.communicate()
    for _ in range(100):  # the kernel frees the lock when it has buried the process
        if not run.is_locked():
            break
        time.sleep(0.01)
    run.lock()
    run.unlock()
    assert not run.is_locked()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_on_a_file_system_without_locks_a_run_is_trained_all_the_same(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    run = RunFolder(tmp_path / "run")
    with run.held():
        begin(run.path, seed=1)
    assert "nothing keeps a second process from it" in capsys.readouterr().out
    assert not run.is_locked()
    found = newest_unfinished({"seed": 1}, tmp_path)
    assert found is not None and found.path == run.path


def test_names_of_new_runs_count_up(tmp_path: Path) -> None:
    first, second = new_run("mfm", "vit/tiny", tmp_path), new_run("mfm", "vit/tiny", tmp_path)
    assert [run.path.name for run in (first, second)] == ["mfm-vit_tiny-1", "mfm-vit_tiny-2"]


@pytest.mark.parametrize(("text", "words"), [("a: [", "not valid YAML"), ("- 1", "must hold options")])
def test_a_bad_config_is_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        read_yaml(tmp_path / "c.yaml")


def test_other_processes_wait_until_a_run_is_begun_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "run")
    waits: list[float] = []

    def begin_later(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            begin(run.path)

    monkeypatch.setattr("freqmask.training.run_folder.time.sleep", begin_later)
    assert run.begun() is run
    assert len(waits) == 3
    monkeypatch.setattr("freqmask.training.run_folder.PATIENCE", -1.0)
    with pytest.raises(UserError, match="was not begun by process 0"):
        RunFolder(tmp_path / "never").begun()


def test_what_failed_before_it_began_leaves_nothing_and_takes_nothing_away(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for run in (RunFolder(tmp_path / "a" / "b" / "run"), new_run("mfm", "vit", tmp_path / "runs")):
        run.lock()
        run.leave_nothing()
        run.unlock()
    other = RunFolder(tmp_path / "mine" / "run")
    other.lock()
    (tmp_path / "mine" / "run" / "notes.txt").write_text("mine")
    other.leave_nothing()
    other.unlock()
    last = RunFolder(tmp_path / "mine")
    last.lock()
    last.leave_nothing()
    last.unlock()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "mine",
        "mine/run",
        "mine/run/notes.txt",
    ]


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe{", b'{"given": '])
def test_another_run_that_is_damaged_keeps_nobody_from_beginning(tmp_path: Path, content: bytes) -> None:
    good, bad, bare = (begin(tmp_path / name, seed=1) for name in "abc")
    (bad.path / "run.json").write_bytes(content)
    (bare.path / "run.json").unlink()
    found = newest_unfinished({"seed": 1}, tmp_path)
    assert found is not None
    assert found.path == good.path
    with pytest.raises(UserError, match="begin the run anew"):
        bad.state()
    (good.path / "summary.json").write_bytes(content)
    with pytest.raises(UserError, match=r"summary\.json.*delete it"):
        good.summary()


def test_a_run_that_is_closed_to_us_keeps_nobody_from_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, theirs = (begin(tmp_path / name, seed=1) for name in ("mine", "theirs"))
    close(theirs.path, monkeypatch)
    with pytest.raises(PermissionError):
        theirs.exists()
    found = newest_unfinished({"seed": 1}, tmp_path)
    assert found is not None
    assert found.path == own.path


def test_a_run_that_we_may_only_read_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, theirs = (begin(tmp_path / name, seed=1) for name in ("mine", "theirs"))
    os.utime(own.path / "run.json", (1, 1))
    trial = tempfile.TemporaryFile

    def read_only(*, dir: Path) -> IO[bytes]:  # as root, whom tests may run as, one could write there
        if dir == theirs.path:
            raise PermissionError(errno.EACCES, "Permission denied", str(dir))
        return trial(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(UserError, match="cannot be written"):
        theirs.lock()
    found = newest_unfinished({"seed": 1}, tmp_path)
    assert found is not None
    assert found.path == own.path


def test_a_config_or_state_that_was_cut_is_told_with_what_it_lacks(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", seed=1)
    run.check_whole(["steps"], {"given": dict})
    with pytest.raises(UserError, match=r"config\.yaml lacks a usable lr \(None\)"):
        run.check_whole(["steps", "lr"], {})
    with pytest.raises(UserError, match=r"run\.json lacks a usable images \(None\)"):
        run.check_whole([], {"images": int})


def test_what_a_killed_process_left_half_written_goes_when_the_run_goes_on(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.checkpoints.mkdir()
    half = run.checkpoints / ".step-00000006.ckpt.99999999.tmp"
    half.write_bytes(b"half")
    run.lock()
    run.unlock()
    assert not half.exists()


def test_what_fails_before_it_has_begun_is_gone_before_its_lock_is_given_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, unlock, gone = RunFolder(tmp_path / "new" / "run"), RunFolder.unlock, []

    def noting(self: RunFolder) -> None:
        gone.append(not (tmp_path / "new").exists())  # else the lock that is deleted could be another's
        unlock(self)

    monkeypatch.setattr(RunFolder, "unlock", noting)
    with pytest.raises(KeyboardInterrupt), run.held("plan.png"):
        (run.path / "plan.png").write_text("")
        raise KeyboardInterrupt
    assert gone == [True]


def test_an_error_is_told_where_an_open_lock_cannot_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows deletes no open file; filelock does so there when it gives the lock free."""
    run, unlock, unlink = RunFolder(tmp_path / "new" / "run"), RunFolder.unlock, Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path.name == "run.lock" and run._lock is not None:
            raise PermissionError(13, "it is being used by another process")
        unlink(path, missing_ok=missing_ok)

    def deleting(self: RunFolder) -> None:
        unlock(self)
        unlink(self.path / "run.lock")

    monkeypatch.setattr(Path, "unlink", refused)
    monkeypatch.setattr(RunFolder, "unlock", deleting)
    with pytest.raises(UserError, match="its own sentence"), run.held("plan.png"):
        (run.path / "plan.png").write_text("")
        raise UserError("its own sentence")
    assert not (tmp_path / "new").exists()
