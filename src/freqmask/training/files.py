"""Files that are whole or not there. No torch here: tables and run folders are read by quick commands, too."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from freqmask.artifacts import mark
from freqmask.errors import UserError, describe_os_error

_PLENTY = 2**28  # bytes; with as much room a write fails for a quota or a limit on file sizes


class WriteError(UserError, OSError):
    """A file could not be written: which, why, and the way out. An ``OSError``, too, so that both can be caught."""

    def __str__(self) -> str:
        return str(self.args[0])


def replace_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary neighbour of ``path`` and rename it over ``path`` once it is on the disk.

    Args:
        path: the file to replace; its folder is made where it is missing.
        write: called with the temporary path.

    Raises:
        WriteError: the disk is full, or the place may not be written; the old file is whole.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        mark(path)
        try:
            write(temporary)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
        finally:
            with suppress(OSError):  # on a file system that turned read-only, it would hide the first error
                temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong with a file system inside becomes a WriteError that names ``path``."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise _write_error(path, error) from error
    except RuntimeError as error:
        # torch's writer is C++ and tells of a full disk or a quota in words of its own
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        number = errno.ENOSPC if _free(path) < _PLENTY else errno.EFBIG  # it does not tell which
        raise _write_error(path, OSError(number, os.strerror(number))) from error


def _write_error(path: Path, error: OSError) -> WriteError:
    room = f" ({_free(path) / 1e6:,.0f} MB are free)" if error.errno == errno.ENOSPC else ""
    sentence = WriteError(f"{path} cannot be written: {describe_os_error(error)}{room}")
    sentence.errno, sentence.strerror = error.errno, error.strerror
    return sentence


def _free(path: Path) -> int:
    with suppress(OSError):
        return shutil.disk_usage(existing_parent(path)).free
    return 0


def existing_parent(path: Path) -> Path:
    """The nearest thing above ``path`` that is there."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def check_writable(path: str | Path, option: str = "out", *, folder: bool = False) -> None:
    """Raises a UserError unless a file or a folder can be written; asked before hours of work.

    Args:
        path: it and the folders above it need not exist.
        option: what the user calls it.
        folder: whether it is a folder.
    """
    path = Path(path).expanduser()
    if path.exists() and folder != path.is_dir():
        raise UserError(f"{option} ({path}) is a {'file' if folder else 'folder'}; give another path")
    nearest = path if path.is_dir() else existing_parent(path)
    if not nearest.is_dir():
        raise UserError(f"{option} ({path}) cannot be written: {nearest} is a file; name another place")
    try:
        with tempfile.TemporaryFile(dir=nearest) as trial:  # permission bits do not tell of read-only mounts
            trial.write(b"freqmask")
        if path.is_file():
            path.open("ab").close()
    except OSError as error:
        raise UserError(f"{option} ({path}) cannot be written: {describe_os_error(error)}") from error
