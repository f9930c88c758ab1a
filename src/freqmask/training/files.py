"""What we write: files replaced atomically, tables that grow by rows, a mark beside what could be taken for data.

No torch here: quick commands use them, too.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TextIO

import psutil

from freqmask.errors import UserError, describe_os_error

MARKER = ".freqmask"
"""The file in a folder that names what freqmask wrote there, a JSON string a line."""
LIKE_DATA = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".npy", ".parquet"})

# Folders that were written before there was a marker, or that somebody copied without it.
_SIGNATURES = (
    {b"config.yaml", b"run.json"},  # a training
    {b"config.yaml", b"metrics.csv"},
    {b"run.lock", b"plan.png"},  # one that was planned only
    {b"config.json", b"model.safetensors"},  # an exported backbone
)
_IN_A_RUN = frozenset({b"plan.png", b"previews", b"backbone", b"checkpoints"})
_PLENTY = 2**28  # bytes; with as much room a write fails for a quota or a limit on file sizes


class WriteError(UserError, OSError):
    """A file could not be written: which, why, and the way out. An ``OSError``, too, so that both can be caught."""

    def __str__(self) -> str:
        return str(self.args[0])


def replace_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary neighbor of ``path`` and rename it over ``path`` once it is on the disk.

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
            with temporary.open("r+b") as written:  # Windows flushes only what is open for writing
                os.fsync(written.fileno())
            temporary.replace(path)
        finally:
            with suppress(OSError):  # on a file system that turned read-only, it would hide the first error
                temporary.unlink(missing_ok=True)


def save_figure(figure: Any, path: str | Path) -> Path:
    """Writes a figure of matplotlib's as a PNG, atomically; names in its legends are no formulas."""
    for legend in filter(None, [*figure.legends, *(axis.get_legend() for axis in figure.axes)]):
        for text in legend.get_texts():
            text.set_parse_math(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)  # names in any script
        replace_atomically(Path(path), lambda unfinished: figure.savefig(unfinished, format="png"))
    return Path(path)


def clear_leftovers(*folders: Path, pattern: str = ".*.tmp") -> None:
    """Remove what processes that no longer run left half-written: ``.NAME.PROCESS.tmp``."""
    for path in [path for folder in folders for path in folder.glob(pattern)]:
        process = path.name.split(".")[-2]
        if not (process.isdigit() and psutil.pid_exists(int(process))):
            with suppress(OSError):
                path.unlink(missing_ok=True)


@contextmanager
def lockless() -> Iterator[None]:
    """A lock that is taken inside is gone without where the file system has none: better a file at risk than none."""
    try:
        yield
    except NotImplementedError:
        pass
    except OSError as error:  # of NFS without its daemon, for one
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong with a file system inside becomes a WriteError that names ``path``."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise _write_error(path, error) from error
    except Exception as error:
        # safetensors' writer is Rust and torch's C++: they tell of a full disk or a quota in words of their own
        number = re.search(r"os error (\d+)", str(error))
        if (
            number is None
            and "inline_container" not in str(error)
            and "PytorchStreamWriter" not in str(error)
        ):
            raise
        untold = errno.ENOSPC if _free(path) < _PLENTY else errno.EFBIG  # torch does not tell which
        code = int(number[1]) if number else untold
        raise _write_error(path, OSError(code, os.strerror(code))) from error


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
    if folder:
        check_encoding(path, option)
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


def check_out(out: str | Path, overwrite: bool, *, folder: bool) -> Path:
    """The path to write, refused where something would be lost.

    Args:
        out: where to write.
        overwrite: True lets go what is there.
        folder: whether a folder is written, or a file.

    Raises:
        UserError: it exists, or cannot be written.
    """
    path = Path(out).expanduser()
    if path.exists() and folder == path.is_dir() and not overwrite and (not folder or any(path.iterdir())):
        raise UserError(f"out ({out}) exists already; give another --out, or --overwrite")
    check_writable(path, folder=folder)
    return path


def check_kept(path: Path, inputs: Iterable[object]) -> None:
    """Raises a UserError where what is written to ``path`` would take the place of what is read, or of a run."""
    place = path.resolve()
    for each in inputs:
        source = Path(str(each)).expanduser().resolve()
        if place in (source, *source.parents):
            raise UserError(f"out ({path}) is or holds {each}, which would be lost; name another place")
    if path.is_dir() and _SIGNATURES[0] <= {os.fsencode(entry.name) for entry in path.iterdir()}:
        raise UserError(f"out ({path}) is a run, which would be lost; name another place")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A scratch folder that takes the place of ``path``, whole, at the end, unless something goes wrong before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield scratch
        mask = os.umask(0)
        os.umask(mask)
        scratch.chmod(0o777 & ~mask)  # mkdtemp's is the user's alone
        if not path.exists():
            scratch.replace(path)
            return
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
        path.replace(old / "old")
        try:
            scratch.replace(path)
        except OSError:
            (old / "old").replace(path)
            raise
        finally:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_encoding(path: Path, option: str) -> None:
    """Raises a UserError where a folder of weights has a name that safetensors cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{option} ({path}) must have a name in UTF-8, or weights in it cannot be read; name it differently"
        ) from None


def open_table(path: Path, mode: Literal["r", "w", "a"] = "r") -> TextIO:
    """A CSV file, for the module csv: a name that is no UTF-8 stands in it with the bytes that it has on the disk."""
    encoding = "utf-8-sig" if mode == "r" else "utf-8"  # a spreadsheet puts a mark before the first name
    return path.open(mode, newline="", encoding=encoding, errors="surrogateescape")


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row; a column that the table lacks is added, with empty cells above.

    Args:
        path: the CSV file, made with the row's names as its header where it is missing.
        row: name to value; a float is written with 7 digits.
    """
    header = _header(path)
    missing = [name for name in row if name not in header]
    if missing or not ends_whole(path):  # a new row must not go on in the line that a kill cut short
        header = [*header, *missing]
        write_rows(path, header, read_rows(path))
    cells = [row.get(name, "") for name in header]
    with writing(path), open_table(path, "a") as file:
        csv.writer(file).writerow(f"{cell:.7g}" if isinstance(cell, float) else cell for cell in cells)


def end_last_row(path: Path) -> None:
    """Give the last line its end where it has all cells: an editor left it so; what a kill cut short stays as it is."""
    if ends_whole(path):
        return
    last = path.read_bytes().rpartition(b"\n")[2].decode("utf-8", errors="surrogateescape")
    with suppress(csv.Error):
        if len(next(csv.reader([last], strict=True))) == len(_header(path)):
            with open_table(path, "a") as file:
                file.write("\r\n")


def ends_whole(path: Path) -> bool:
    """Whether the last line of a table has its line break, or there is none."""
    if not path.is_file() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    rows: Iterable[dict[str, str]] = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    try:
        return [
            {name if name is None else current_name(name): value for name, value in row.items()}
            for row in rows
        ]
    except csv.Error as error:
        raise _damaged(path, error) from error


def current_name(column: str) -> str:
    """What a column or a number that 0.1.0 wrote is called now.

    >>> current_name("held_out_loss_over_zero")
    'held_out_relative_loss'
    """
    return column.replace("loss_over_zero", "relative_loss")


def cut_back(path: Path, column: str, largest: int) -> None:
    """Drop the rows whose ``column`` is above ``largest``: those of steps that will be made again."""
    if not path.is_file():
        return
    header = [current_name(name) for name in _header(path)]
    if column not in header:
        path.replace(path.with_suffix(".damaged"))  # somebody else's, or garbled: kept, and a new one begun
        return
    rows = [row for row in read_rows(path) if (row[column] or "").isdigit() and int(row[column]) <= largest]
    write_rows(path, header, rows)


def _header(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with open_table(path) as file:
        try:
            return next(csv.reader(file), [])
        except csv.Error as error:
            raise _damaged(path, error) from error


def _damaged(path: Path, error: csv.Error) -> UserError:
    return UserError(f"{path} is damaged ({error}); move it away, then the same command resumes")


def write_rows(path: Path, header: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """A table, replaced whole; cells that a row lacks stay empty."""

    def write(temporary: Path) -> None:
        with open_table(temporary, "w") as file:
            csv.writer(file).writerows([header, *([row.get(name) for name in header] for row in rows)])

    replace_atomically(path, write)


def mark(path: Path) -> None:
    """Note that we write a file which a source could take for data; a note that fails loses nothing but itself."""
    parts = (path, path.parent)  # in a run's folder these are known without a marker
    known = any(os.fsencode(one.name) in _IN_A_RUN and (one.parent / "run.lock").exists() for one in parts)
    if path.suffix.lower() not in LIKE_DATA or known:
        return
    line = json.dumps(path.name).encode()
    marker = path.parent / MARKER
    with suppress(OSError):
        if not marker.exists() or line not in marker.read_bytes().splitlines():
            # Appending a short line is atomic, so two processes may write beside each other.
            with marker.open("ab") as file:
                file.write(line + b"\n")


def marked_in(folder: Path) -> set[str]:
    """The names in a folder of what we wrote there."""
    try:
        return set(map(os.fsdecode, marked((folder / MARKER).read_bytes())))
    except OSError:
        return set()


def marked(marker: bytes) -> set[bytes]:
    """The names in a marker; lines that are not ours count for nothing."""
    names = set()
    for line in marker.splitlines():
        with suppress(ValueError):
            name = json.loads(line)
            if isinstance(name, str):
                names.add(os.fsencode(name))
    return names


def is_own_folder(entries: Collection[bytes]) -> bool:
    """Whether the names in a folder are those of a training or of an exported backbone."""
    return any(signature <= set(entries) for signature in _SIGNATURES)


def is_part_of_run(name: bytes) -> bool:
    """Whether an entry of a run folder holds figures or arrays of the run."""
    return name in _IN_A_RUN
