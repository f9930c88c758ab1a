"""Where shards (and tables) lie: the contract, and a folder of this machine (a URL: `freqmask.data.remote`)."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, Protocol

from freqmask.data.patterns import names_of, split_pattern
from freqmask.data.shard_index import INDEX_NAME
from freqmask.data.splits import split_of
from freqmask.errors import UserError


class ShardFiles(Protocol):
    """Where shards lie: a folder here, or a place behind a URL.

    Attributes:
        where: the place in words.
        remote: True where a read costs a round trip.
    """

    where: str
    remote: bool

    def names(self) -> list[str]:
        """The tars there, and in folders named as splits, sorted; paths relative to the place."""

    def size(self, name: str) -> int:
        """Bytes of a file; raises FileNotFoundError."""

    def state(self, name: str) -> tuple[object, ...]:
        """What changes when the file does."""

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Some of its bytes; fewer where it ends before."""

    def stream(self, name: str) -> BinaryIO:
        """The file, to be read here and there."""

    def index_file(self) -> Path | None:
        """The index beside the shards, on this machine; None where there is none."""


class LocalFiles:
    """Shards in a folder of this machine.

    Args:
        root: the folder.
    """

    remote = False

    def __init__(self, root: Path) -> None:
        self.root, self.where = root, str(root)

    def names(self) -> list[str]:
        """The tars of the folder and of its train, val and test."""
        folders = [folder for folder in self.root.iterdir() if split_of(folder.name) and folder.is_dir()]
        found = [tar for folder in (self.root, *folders) for tar in folder.glob("*.tar")]
        return sorted(path.relative_to(self.root).as_posix() for path in found if path.name[0] != ".")

    def matching(self, pattern: str) -> list[str]:
        """The files whose names fit a pattern with ``*`` and ``?``."""
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.glob(pattern))

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return (self.root / name).stat().st_size

    def state(self, name: str) -> tuple[object, ...]:
        """Size and time of the last change."""
        state = (self.root / name).stat()
        return state.st_size, state.st_mtime_ns

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Opened for every image: 15 microseconds, and no limit of open files to run into."""
        with (self.root / name).open("rb", buffering=0) as file:
            file.seek(start)
            return file.read(stop - start)

    def stream(self, name: str) -> BinaryIO:
        """The file, opened."""
        return (self.root / name).open("rb")

    def index_file(self) -> Path | None:
        """The index in the same folder."""
        file = self.root / INDEX_NAME
        return file if file.is_file() else None


def local_files(text: str) -> tuple[ShardFiles, list[str] | None]:
    """The folder, and which of its shards or tables a text names; None for all.

    Raises:
        UserError: no file fits the pattern.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        return LocalFiles(path), None
    if path.is_file():
        return LocalFiles(path.parent), [path.name]
    root, pattern = split_pattern(str(path))
    files = LocalFiles(Path(root or "."))
    names = names_of(pattern, files.matching)
    if not names:
        raise UserError(
            f"DATA ({text}): no file fits the pattern; quote it, and check its folder and numbers"
        )
    return files, names
