"""The run folder: what a run was told, what it became, how far it got; its checkpoints, which run no code when read.

When a checkpoint is written is said by ``callbacks.Saver``, how a file is replaced by ``files.replace_atomically``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import re
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import BaseFileLock, FileLock, Timeout

from freqmask import __version__
from freqmask.console import rank, say
from freqmask.errors import UserError, brief
from freqmask.training.files import (
    check_writable,
    clear_leftovers,
    current_name,
    lockless,
    read_rows,
    replace_atomically,
    writing,
)

RUNS = Path("runs")
CONFIG = "config.yaml"
STATE = "run.json"
SUMMARY = "summary.json"
RESULTS = "results.csv"  # of evaluations
LOCK = "run.lock"
SKIPPED = "skipped.csv"
LAST = "last.ckpt"
_OF_A_TRAINING = {"state_dict": dict, "global_step": int, "optimizer_states": list, "loops": dict}
_ANEW = "the run folder is damaged: begin the run anew with another --out"
_DAMAGED = {  # what to do about each file of JSON
    STATE: _ANEW,
    SUMMARY: "delete it, and the command that trains resumes from the last checkpoint",
}
_MADE_ELSEWHERE = re.compile(r"[a-z]{2,}:")  # random:, timm: and the like; one letter is a drive
PATIENCE = 1800.0  # seconds that other processes wait until the first has read the data and written its plan


class RunFolder:
    """One run on the disk. Reading is free; :meth:`lock` before writing.

    Attributes:
        path: the folder.
        checkpoints: the folder of training states.
        previews: the folder of preview figures.
        backbone: the exported backbone, in timm's local-dir layout.
        metrics: the table of metrics, a row a logged step.
        skipped: the table of images that could not be read, each with its reason.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints, self.previews, self.backbone, self.metrics, self.skipped = (
            self.path / name for name in ("checkpoints", "previews", "backbone", "metrics.csv", SKIPPED)
        )
        self._lock: BaseFileLock | None = None
        self._made: list[Path] = []

    def exists(self) -> bool:
        """Whether a run has been begun here."""
        return (self.path / CONFIG).is_file()

    def begun(self) -> RunFolder:
        """The same run, once another process has begun it, or resumes it.

        Raises:
            UserError: it did not appear.
        """
        until = time.monotonic() + PATIENCE
        while not self.exists():
            if time.monotonic() > until:
                raise UserError(
                    f"run ({self.path}) was not begun by process 0 within {PATIENCE:g} seconds; see its output"
                )
            time.sleep(0.2)
        return self

    def began_measured(self) -> bool:
        """Whether the weights that the run began with have been measured: row 0 of its metrics."""
        return any(row.get("step") == "0" for row in read_rows(self.metrics))

    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / SUMMARY).is_file()

    def config(self) -> dict[str, Any]:
        """Every option of the run as it was resolved."""
        return read_yaml(self.path / CONFIG)

    def state(self) -> dict[str, Any]:
        """What the run was asked for word by word, its data's fingerprint, versions."""
        return _read_json(self.path / STATE)

    def check_whole(self, numbers: Iterable[str], metadata: Mapping[str, type]) -> None:
        """Raises a UserError where a run cannot be resumed: files that were cut short may still be YAML and JSON.

        Args:
            numbers: options that the config must hold a number for.
            metadata: what ``run.json`` must hold, and of which type.
        """
        config, state = self.config(), self.state()
        kinds = dict.fromkeys(numbers, (int, float))
        for file, held, wanted in ((CONFIG, config, kinds), (STATE, state, metadata)):
            wrong = [name for name, kind in wanted.items() if not isinstance(held.get(name), kind)]
            if wrong:
                told = ", ".join(f"a usable {name} ({held.get(name)})" for name in wrong)
                raise UserError(f"{self.path / file} lacks {told}; {_ANEW}")

    def summary(self) -> dict[str, Any]:
        """What the run ended with."""
        return {current_name(name): value for name, value in _read_json(self.path / SUMMARY).items()}

    def begin(self, config: Mapping[str, Any], state: Mapping[str, Any], heading: str) -> None:
        """Write ``config.yaml`` and the state of a new run."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_state(state)
        body = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=100)
        write_text(self.path / CONFIG, "".join(f"# {line}\n" for line in heading.splitlines()) + body)

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Replace the state atomically."""
        write_text(self.path / STATE, json.dumps(dict(state), indent=1) + "\n")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write what the run ended with, which also marks it finished."""
        write_text(self.path / SUMMARY, json.dumps(dict(summary), indent=1) + "\n")

    def make(self, exist_ok: bool = True) -> None:
        """Make the folder, and remember what had to be made.

        Raises:
            FileExistsError: it is there and must not be.
        """
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=exist_ok)
        self._made += missing

    def lock(self) -> None:
        """Take the run for this process until it ends, however it ends.

        Raises:
            UserError: another process is training in this folder.
        """
        check_writable(self.path, folder=True)
        self.make()
        self._lock = self._acquired()
        if self._lock is None:
            raise UserError(
                f"run folder ({self.path}) is in use by another process; wait for it, or give another --out"
            )
        if not self._lock.is_locked:
            say(f"note: the file system of {self.path} has no locks; nothing keeps a second process from it")
        clear_leftovers(self.path, self.checkpoints, self.backbone)

    def _acquired(self) -> BaseFileLock | None:
        # a lock of its own each time: taken twice in one process it must be refused, too
        lock = FileLock(self.path / LOCK, thread_local=False, is_singleton=False)
        try:
            with lockless():
                lock.acquire(blocking=False)
        except Timeout:
            return None
        return lock

    def is_locked(self) -> bool:
        """Whether a living process trains here."""
        if not (self.path / LOCK).exists():
            return False
        lock = self._acquired()
        if lock is not None:
            lock.release()
        return lock is None

    def unlock(self) -> None:
        """Give the run free again."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @contextlib.contextmanager
    def held(self, *files: str) -> Iterator[None]:
        """The run is that of this process and its helpers inside; what fails before it has begun leaves nothing.

        Args:
            files: that may have been written beside the lock.
        """
        if rank() > 0:
            yield
            return
        self.lock()
        try:
            yield
        except BaseException:
            self.leave_nothing(*files)  # before the lock is given free, or another's would be deleted
            raise
        finally:
            self.unlock()  # which deletes the lock's file on Windows, where it could not be while it was open
            if not self.exists():
                self._remove_made()

    def leave_nothing(self, *files: str) -> None:
        """Remove what :meth:`make` made for a run that failed before it began; somebody else's files stay.

        Args:
            files: that may have been written beside the lock.
        """
        if self.exists() or not self.path.is_dir():
            return
        for name in (*files, LOCK):
            with contextlib.suppress(OSError):  # one that may not be deleted takes no error's place
                (self.path / name).unlink()
        self._remove_made()

    def _remove_made(self) -> None:
        with contextlib.suppress(OSError):  # a folder that is not empty, and those above it
            for folder in self._made:
                folder.rmdir()


def new_run(method: str, backbone: str, root: Path = RUNS) -> RunFolder:
    """The first free ``runs/METHOD-BACKBONE-N``; the folder is made, so that no other process takes it."""
    stem = re.sub(r"[^\w.-]+", "_", f"{method}-{backbone}")
    for number in itertools.count(1):
        run = RunFolder(root / f"{stem}-{number}")
        with contextlib.suppress(FileExistsError):
            run.make(exist_ok=False)
            break
    return run


def folders_in(folder: Path) -> list[Path]:
    """Those that may be opened: in a folder that several people share, a run may be closed to the others."""
    return [path for path in folder.iterdir() if path.is_dir() and os.access(path, os.X_OK)]


def newest_unfinished(given: Mapping[str, Any], root: Path = RUNS) -> RunFolder | None:
    """The newest run under ``root`` that was asked for in the same words, has not ended and is not being trained.

    Args:
        given: the options as they were given, without ``out``.
        root: the folder of runs.
    """
    if not root.is_dir():
        return None
    wanted = comparable(given)
    folders = [path for path in folders_in(root) if (path / CONFIG).is_file() and (path / STATE).is_file()]
    for path in sorted(folders, key=lambda path: (path / STATE).stat().st_mtime, reverse=True):
        run = RunFolder(path)
        with contextlib.suppress(UserError, OSError):  # another run's damage is told where that run is named
            if not run.finished() and run.state().get("given") == wanted and not run.is_locked():
                check_writable(path, folder=True)  # else it is somebody else's, which we may only read
                return run
    return None


def names_in(rows: Sequence[Mapping[str, str]], path: Path) -> set[str]:
    """What the run at ``path`` is called in its table of results: by its name, or by some of its path.

    A run that has been renamed since is the only model there that was trained.
    """
    models = {row.get("model") or "" for row in rows}
    named = set()
    for model in models:
        parts = tuple(itertools.dropwhile(lambda part: part in ("..", "~"), Path(model).parts))
        parts = parts[:-1] if parts[-1:] in (("backbone",), ("classifier",)) else parts
        if parts and path.parts[-len(parts) :] == parts:
            named.add(model)
    trained = {model for model in models if model != "pixels" and not _MADE_ELSEWHERE.match(model)}
    return named or (trained if len(trained) == 1 else set())


@dataclass
class Checkpoint:
    """A training state on the disk, read once."""

    path: Path
    content: dict[str, Any]  # emptied by whoever takes it over, or the weights would lie twice in memory
    step: int  # optimizer steps that had been made


def load_safely(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The dictionary in a file of ``torch.save``, of plain tensors, numbers and containers; nothing in it is run.

    Raises:
        UserError: the file is missing, cut short, or holds objects that would need code to be read.
    """
    import torch  # here, since quick commands read run folders, too

    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint ({path}) does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch wonders aloud about odd files before it refuses them
            loaded = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        _, runs, rest = str(error).partition("GLOBAL ")
        why = f"reading it would run code ({rest.split(' was not', 1)[0].strip()})"
        if not runs and "Unsupported global" not in str(error):
            why = f"it is no plain torch file ({brief(error, 200)})"
        raise UserError(f"checkpoint ({path}) was refused: {why}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"checkpoint ({path}) cannot be read, it may be cut short: {brief(error, 200)}"
        ) from error
    if not isinstance(loaded, dict):
        raise UserError(f"checkpoint ({path}) holds a {type(loaded).__name__} instead of a dictionary")
    return loaded


def save_atomically(content: dict[str, Any], path: str | Path) -> None:
    """Write to a temporary neighbor, flush it to the disk, rename it: a full disk leaves the old file whole."""
    import torch

    replace_atomically(Path(path), lambda temporary: torch.save(content, temporary))


def step_file(folder: Path, step: int) -> Path:
    """Where the checkpoint of an optimizer step lives."""
    return folder / f"step-{step:08d}.ckpt"


def publish(folder: Path, step: int, keep: int) -> None:
    """Point ``last.ckpt`` at the checkpoint of ``step``, just written, and drop all but the ``keep`` newest."""
    newest = step_file(folder, step)
    temporary = folder / f".{LAST}.tmp"
    with writing(folder / LAST):
        temporary.unlink(missing_ok=True)
        try:
            os.link(newest, temporary)  # the same bytes under two names: no second copy on the disk
        except OSError:
            try:
                temporary.symlink_to(newest.name)
            except OSError:  # exFAT knows neither
                shutil.copyfile(newest, temporary)
        temporary.replace(folder / LAST)
    files = sorted(folder.glob("step-*.ckpt"))
    for old in [file for file in files if file != newest][: max(len(files) - keep, 0)]:
        old.unlink(missing_ok=True)


def newest_usable(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint, read whole, and a sentence for each newer one that had to be passed over.

    Raises:
        UserError: a file would run code when read; that is never passed over in silence.
    """
    warnings: list[str] = []
    candidates = sorted(folder.glob("step-*.ckpt"), reverse=True)
    last = folder / LAST
    if last.exists() and not any(last.samefile(file) for file in candidates):
        # a copy: of the newest, or of the one before it where a kill came between the two
        newer = not candidates or last.stat().st_mtime_ns >= candidates[0].stat().st_mtime_ns
        candidates.insert(0 if newer else len(candidates), last)
    for file in candidates:
        try:
            found = load_safely(file)
            lacking = [name for name, kind in _OF_A_TRAINING.items() if not isinstance(found.get(name), kind)]
            if lacking:
                raise UserError(f"checkpoint ({file}) is none of a training, it lacks {', '.join(lacking)}")
        except UserError as error:
            if "would run code" in str(error):
                raise
            warnings.append(f"{error}; using the one before it")
            continue
        return Checkpoint(file, found, found["global_step"]), warnings
    return None, warnings


def comparable(value: Any) -> Any:
    """The value as JSON would give it back, so that what was stored and what is asked for can be compared.

    An object of Python's, such as a source of images, becomes the import path of its class.
    """

    def word(value: Any) -> str:
        kind = type(value)
        has_words = any("__str__" in vars(base) or "__repr__" in vars(base) for base in kind.__mro__[:-1])
        return str(value) if has_words else f"{kind.__module__}:{kind.__qualname__}"

    return json.loads(json.dumps(value, default=word))


def from_anywhere(value: Any) -> Any:
    """A path that leads somewhere, absolute, so that it leads there from every folder; each of several likewise."""
    if isinstance(value, list | tuple):
        return [from_anywhere(one) for one in value]
    try:
        path = Path(value).expanduser() if isinstance(value, str) and value else None
        if path is None or not path.exists():
            return value
    except (OSError, RuntimeError):  # a name too long, somebody's home who is not known
        return value
    return str(path.resolve() if ".." in path.parts else path.absolute())  # links keep their names


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of options.

    Raises:
        UserError: the file is missing, is no YAML, or holds no options.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"config ({path}) does not exist; `freqmask recipes` lists the shipped ones"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config ({path}) is not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise UserError(f"config ({path}) must hold options as `name: value` lines")
    return content


def write_text(path: Path, text: str) -> None:
    """Replace a small text file atomically."""
    replace_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:  # no JSON, or no UTF-8
        raise UserError(f"{path} is not valid JSON ({error}); {_DAMAGED[path.name]}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no options but a {type(content).__name__}; {_DAMAGED[path.name]}")
    return content


def heading(command: str) -> str:
    """The first lines of a ``config.yaml``: who wrote it, and the command that repeats the run."""
    return (
        f"freqmask {__version__}, {now()}; every auto is resolved.\n"
        f"Repeat it: freqmask {command} --config THIS_FILE --out NEW_FOLDER"
    )


def now() -> str:
    """The local time, to the second, for the records."""
    return time.strftime("%Y-%m-%d %H:%M:%S")
