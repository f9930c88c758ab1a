"""Where files lie: a folder of this machine or a place behind a URL, read alike; and several files by one pattern."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import glob
import io
import logging
import re
import socket
import tempfile
import time
from abc import ABC, abstractmethod
from ast import literal_eval
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

from freqmask.console import counted
from freqmask.data.cache import MAGIC, cache_file, hash_of, replacing
from freqmask.data.splits import split_of
from freqmask.errors import UserError, brief, nearest

UNPACKERS = {
    ".gz": "gunzip", ".tgz": "gunzip", ".bz2": "bunzip2", ".tbz2": "bunzip2", ".xz": "unxz", ".txz": "unxz",
    ".zst": "unzstd", ".zip": "unzip",
}  # fmt: skip
"""Suffix of what is packed as a whole -> the program that unpacks it."""
INDEX_NAME = "shards.index"
MANIFEST, PARTS = "prepare.json", ".parts"  # the second as long as not all shards are there
PATTERN = re.compile(r"[*?{\[]")
QUERY = re.compile(r"(https?://[^?]*)(\?[^/]*=.*)", re.IGNORECASE)  # unlike a pattern's ?, with a =
State = tuple[int, object]  # of a file: its bytes, and what else changes with its content, None where unknown
Result = TypeVar("Result")
_HELD: list[Any] = []  # indexes that could not be cached

BACKOFF = (0.5, 1.0, 2.0, 4.0)  # seconds before each further try
TIMEOUT = 30
HEADER_BYTES = 65_536  # asked for at once while headers are read; the next header often lies in it
EXTRAS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
EXTRAS |= dict.fromkeys(("http", "https"), "aiohttp")
# What servers name a state of a file by: the web, S3, Google, Hugging Face; and fsspec's memory.
STATE_KEYS = ("ETag", "etag", "Last-Modified", "LastModified", "updated", "blob_id", "created")
TRANSIENT = (408, 425, 429)  # answers of a server that ask for patience; all others below 500 are final


def unpacker_of(suffixes: Iterable[str]) -> str | None:
    """The program that unpacks the first of some suffixes that is one of a packed file; None where none is."""
    return next((UNPACKERS[suffix] for suffix in suffixes if suffix in UNPACKERS), None)


def is_pattern(text: str) -> bool:
    """Whether a text stands for several files."""
    return bool(PATTERN.search(text))


def part_query(text: str) -> tuple[str, str]:
    """An address on the web, and its ``?sig=…``: a signature, which is of that file alone, or the like."""
    found = QUERY.fullmatch(text)
    return (found[1], found[2]) if found else (text, "")


def visible(names: Iterable[str], pattern: str = "") -> list[str]:
    """The names, sorted; files that begin with a dot (a Mac leaves ``._a.tar``) where the pattern asks for them only.

    >>> visible(["a.tar", "._a.tar"], "*.tar"), visible([".a.tar"], ".*.tar")
    (['a.tar'], ['.a.tar'])
    """
    hidden = pattern.rpartition("/")[2].startswith(".")
    return sorted(name for name in names if hidden or not name.rpartition("/")[2].startswith("."))


def split_pattern(text: str) -> tuple[str, str]:
    """The folder before the first part with a sign of a pattern, and the rest.

    >>> split_pattern("data/train/shards-{0..3}.tar")
    ('data/train', 'shards-{0..3}.tar')
    """
    parts = text.split("/")
    first = next((k for k, part in enumerate(parts) if PATTERN.search(part)), len(parts) - 1)
    root = "/".join(parts[:first])
    return (root or "/" if text.startswith("/") and first else root), "/".join(parts[first:])


def expand_braces(pattern: str) -> list[str]:
    """Every text that a pattern with ranges and lists in braces stands for, in order.

    >>> expand_braces("{train,val}-{08..10}.tar")[:4]
    ['train-08.tar', 'train-09.tar', 'train-10.tar', 'val-08.tar']
    """
    braces = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*)\}", pattern)
    if braces is None:
        return [pattern]
    first, last, words = braces.groups("")
    choices = words.split(",")
    if first:
        width = len(first) if len(first) == len(last) or first.startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    rest = expand_braces(pattern[braces.end() :])
    return [f"{pattern[: braces.start()]}{choice}{tail}" for choice in choices for tail in rest]


def files_of(text: str) -> tuple[Files, list[str] | None]:
    """Where the shards or tables of a text lie, and which of them it names; None for all of a folder here.

    What braces name is kept, whether it is there or not, to be missed by its name. A UserError where nothing fits.
    """
    address, query = part_query(text)
    scheme, mark, rest = address.rpartition("://")
    path = Path(text).expanduser()
    if not mark and path.is_dir():
        return LocalFiles(path), None
    if not mark and path.is_file():
        return LocalFiles(path.parent), [path.name]
    # a Windows path has a drive, and backslashes where it was not written with others
    root, pattern = split_pattern(rest if mark else path.relative_to(path.anchor).as_posix())
    files = RemoteFiles(f"{scheme}://{root}", query) if mark else LocalFiles(Path(path.anchor, root))
    names: list[str] = []
    for part in expand_braces(pattern):
        names += files.matching(part) if re.search(r"[*?\[]", part) else [part]
    if not names:
        raise UserError(
            f"DATA ({text}): no file fits the pattern; quote it, and check its folder and numbers"
        )
    return files, names


def nearest_path(path: Path) -> str:
    """A way out of a path that does not exist: what a pattern in quotes matches, or the most similar entry there is.

    That is sought in the deepest folder on the path that exists.
    """
    if is_pattern(str(path)):
        # not Path.glob: it refuses a**, and finds hidden files, which a shell does not
        matched = sum(len(glob.glob(one)) for one in expand_braces(str(path)))  # noqa: PTH207
        if matched:
            return (
                f"quotes kept the shell from expanding the pattern, which matches {counted(matched, 'path')}; leave "
                "them out (from Python, glob.glob makes the list)"
            )
    existing = next(parent for parent in path.absolute().parents if parent.is_dir())
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = [entry.name for entry in existing.iterdir() if not entry.name.startswith(".")]
    wanted = path.absolute().relative_to(existing).parts[0]
    hint = nearest(wanted, names) if names else ""
    if hint.startswith("did you mean"):
        return f"did you mean {str(existing / literal_eval(hint[len('did you mean ') : -1]))!r}?"
    return f"the folder {existing} holds nothing of a similar name"


class Files(ABC):
    """Where shards and tables lie: a folder here, or a place behind a URL. Names are paths relative to it."""

    where: str  # the place in words
    remote: bool  # True where a read costs a round trip

    @abstractmethod
    def url(self, name: str) -> str:
        """The whole path or address of a file."""

    @abstractmethod
    def names(self) -> list[str]:
        """The tars there and in folders named as splits, sorted."""

    @abstractmethod
    def matching(self, pattern: str) -> list[str]:
        """The files whose paths fit a pattern with ``*``, ``?`` and ``[]``, sorted."""

    @abstractmethod
    def state(self, name: str) -> State:
        """The bytes of a file, and whatever else changes when it does; raises FileNotFoundError."""

    def refuse_changed(self, name: str, state: State) -> None:
        """Raises a UserError where a file here is no longer in the state in which places were read from it.

        A map of a file that was cut would end the process, and places in another one are those of other images. A
        server is not asked: some name the same file by another tag at each of their machines, which would end a run.
        """
        with contextlib.suppress(FileNotFoundError):  # whoever reads it says so
            if not self.remote and self.state(name) != state:
                raise UserError(f"DATA ({self.url(name)}) was changed while it was being read; start again")

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> bytes:
        """Some bytes of a file; fewer where it ends before."""

    @abstractmethod
    def stream(self, name: str, buffering: int = HEADER_BYTES) -> BinaryIO:
        """The file, to be read here and there."""

    @property
    @abstractmethod
    def index_file(self) -> Path | None:
        """The index beside the shards, on this machine; None where there is none."""


class LocalFiles(Files):
    """Files below a folder of this machine."""

    remote = False

    def __init__(self, root: Path) -> None:
        self.root, self.where = root, str(root)

    def url(self, name: str) -> str:
        return str(self.root / name)

    def names(self) -> list[str]:
        folders = [folder for folder in self.root.iterdir() if split_of(folder.name) and folder.is_dir()]
        tars = (tar for folder in (self.root, *folders) for tar in folder.glob("*.[tT][aA][rR]"))
        return visible(tar.relative_to(self.root).as_posix() for tar in tars if tar.is_file())

    def matching(self, pattern: str) -> list[str]:
        found = (path for path in self.root.glob(pattern) if path.is_file())
        return visible((path.relative_to(self.root).as_posix() for path in found), pattern)

    def state(self, name: str) -> State:
        state = (self.root / name).stat()
        return state.st_size, state.st_mtime_ns

    def read(self, name: str, start: int, stop: int) -> bytes:
        # opened for every image: 15 microseconds, and no limit of open files to run into
        with (self.root / name).open("rb", buffering=0) as file:
            file.seek(start)
            return file.read(stop - start)

    def stream(self, name: str, buffering: int = HEADER_BYTES) -> BinaryIO:
        return (self.root / name).open("rb", buffering)

    @property
    def index_file(self) -> Path | None:
        file = self.root / INDEX_NAME
        return file if file.is_file() else None


class RemoteFiles(Files):
    """Files below a URL. Cheap to pickle: connections are made in the process that reads.

    Args:
        root: ``https://…``, ``s3://…``, ``gs://…``, ``memory://…``; whatever fsspec knows. Credentials and
            endpoints come from where the protocol's own tools look for them.
        query: ``?sig=…``, which stands behind the address of each file.
    """

    remote = True

    def __init__(self, root: str, query: str = "") -> None:
        self.root = self.where = root.rstrip("/") if urlsplit(root).path.strip("/") else root
        self.query = query
        self._states: dict[str, State] = {}
        self._listings: dict[int | None, dict[str, int | None]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_listings": {}}  # of no use to a worker, and maybe of millions of files

    def url(self, name: str) -> str:
        return (f"{self.root.rstrip('/')}/{name}" if name else self.root) + self.query

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Some bytes of a file, or all of them; FileNotFoundError where it is gone, else as `with_retries`."""
        url = self.url(name)

        def fetch() -> bytes:
            system, path = _system(url)
            # Hugging Face's files read 5 MB ahead of what is asked for, unless told not to.
            more = {"cache_type": "none"} if url.lower().startswith("hf:") else {}
            data = system.cat_file(path, start=start, end=stop, **more)
            wanted = len(data) if start is None or stop is None else stop - start
            if len(data) > wanted:
                raise UserError(
                    f"{url} cannot be read in parts: its server ignores byte ranges; copy it here first"
                )
            if len(data) < wanted:
                raise ConnectionError(f"{len(data):,} of {wanted:,} bytes came")
            return bytes(data)

        return with_retries(url, fetch)

    def state(self, name: str) -> State:
        """The size, and a hash or time of change where the server tells one; a UserError where it tells no size."""
        if name not in self._states:
            system, path = _system(self.url(name))
            info = with_retries(self.url(name), lambda: system.info(path))
            if info["size"] is None:
                raise UserError(f"{self.url(name)}: the server does not tell its size; copy it here first")
            self._states[name] = _state_of(info)
        return self._states[name]

    def listed_state(self, name: str) -> State | None:
        """The same as the last listing told it, without a request; None where it told none."""
        return self._states.get(name)

    def stream(self, name: str, buffering: int = HEADER_BYTES) -> BinaryIO:
        raw = RangeFile(partial(self.read, name), self.state(name)[0])
        return cast(BinaryIO, io.BufferedReader(raw, buffering) if buffering else raw)

    def names(self) -> list[str]:
        tars = (name for name in self.listing() if name.lower().endswith(".tar"))
        return visible(name for name in tars if "/" not in name or split_of(name.split("/")[0]))

    def matching(self, pattern: str) -> list[str]:
        return visible(fnmatch.filter(self.listing(pattern.count("/") + 1), pattern), pattern)

    def listing(self, levels: int | None = None) -> dict[str, int | None]:
        """Path relative to the root -> bytes of each file so many levels below; None where the server does not tell."""
        if levels in self._listings:
            return self._listings[levels]
        system, path = _system(self.root)
        base = path.rstrip("/") + "/"

        def find() -> dict[str, Any]:
            listed: dict[str, Any] = system.find(path, maxdepth=levels, detail=True)
            if not listed:
                system.info(path)  # fsspec passes over a server that does not answer; this raises
            return listed

        found: dict[str, Any] = with_retries(self.root, find, gone={})
        files = {full.removeprefix(base): info for full, info in found.items() if full.startswith(base)}
        sizes = self._listings[levels] = {name: info.get("size") for name, info in files.items()}
        self._states |= {name: _state_of(files[name]) for name, size in sizes.items() if size is not None}
        return sizes

    @cached_property
    def index_file(self) -> Path | None:  # asked for once
        data = b""
        with contextlib.suppress(FileNotFoundError):
            data = b"" if self.query else self.read(INDEX_NAME)  # a signature is of one file
        if not data.startswith(MAGIC):  # some servers answer every address with a page
            return None
        file = cache_file("remote-index", self.root, len(data), hash_of(data))
        try:
            if not file.is_file() or file.read_bytes() != data:
                with replacing(file) as temporary:
                    temporary.write_bytes(data)
        except OSError:  # no cache to be had: kept as long as this process lives
            _HELD.append(tempfile.NamedTemporaryFile(suffix=INDEX_NAME))  # noqa: SIM115
            _HELD[-1].write(data)
            _HELD[-1].flush()
            file = Path(_HELD[-1].name)
        return file


def _state_of(info: Mapping[str, Any]) -> State:
    """The state of a file by what fsspec tells of it."""
    return int(info["size"]), next((str(info[key]) for key in STATE_KEYS if info.get(key)), None)


class RangeFile(io.RawIOBase):
    """A file of ``size`` bytes, each read of which is a call of ``read(start, stop)``."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        super().__init__()
        self._read, self._size, self._place = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        stop = min(self._place + len(buffer), self._size)
        if stop <= self._place:
            return 0
        data = self._read(self._place, stop)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def with_retries(url: str, work: Callable[[], Result], gone: Result | None = None) -> Result:
    """Tries again where a connection to ``url`` breaks or a server is busy, then says so.

    Raises:
        FileNotFoundError: the address does not exist, and ``gone`` is None, which is returned otherwise.
        UserError: refused, or no success after several tries.
    """
    for pause in (*BACKOFF, None):
        try:
            return work()
        except FileNotFoundError as error:
            hidden = _hidden_in(error)
            if hidden is not None:
                _wait_or_raise(url, hidden, pause)
            elif gone is not None:
                return gone
            else:
                raise FileNotFoundError(2, "not there", url) from None
        except (NotImplementedError, ImportError) as error:
            raise UserError(f"{url} cannot be opened ({_reason(error)})") from error
        except (UserError, AttributeError, NameError, TypeError):
            raise  # the last three are mistakes in a program, which trying again would only hide
        except Exception as error:  # aiohttp's, botocore's, httpx's and the system's share no ancestor
            _wait_or_raise(url, error, pause)
    raise AssertionError("the last try returns or raises")


def _hidden_in(error: FileNotFoundError) -> BaseException | None:
    """What fsspec's HTTP calls "not found" although the server said something else, or nothing at all."""
    cause = error.__cause__
    if cause is None or isinstance(cause, FileNotFoundError):
        return None
    status = _status(cause)
    of_connection = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
    return cause if (status not in (404, 410) if status is not None else of_connection) else None


def _wait_or_raise(url: str, error: BaseException, pause: float | None) -> None:
    status = _status(error)
    if status is None:
        final = isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError"
    else:
        final = 400 <= status < 500 and status not in TRANSIENT
    if final:
        raise UserError(f"{url} is refused ({_reason(error)}); check address and rights") from error
    if pause is None:
        raise UserError(
            f"{url} cannot be read after {len(BACKOFF) + 1} tries ({_reason(error)}); check the connection, "
            "then the same command resumes"
        ) from error
    time.sleep(pause)


def _status(error: BaseException) -> int | None:
    """The answer of the server: aiohttp's ``status``, gcsfs's ``code``, httpx's ``response.status_code``."""
    places = ((error, "status"), (getattr(error, "response", None), "status_code"), (error, "code"))
    numbers = (getattr(holder, name, None) for holder, name in places)
    return next((status for status in numbers if isinstance(status, int)), None)


def _reason(error: BaseException) -> str:
    status = _status(error)
    if status is not None:
        return f"status {status}"
    chain = (error, error.__cause__, error.__context__)
    if errno.ECONNREFUSED in {getattr(link, "errno", None) for link in chain}:
        return "the connection was refused: nothing listens there"
    if any(isinstance(link, socket.gaierror) for link in chain):
        return "no host of that name was found"
    if isinstance(error, TimeoutError):
        return f"nothing came for {TIMEOUT} seconds"
    return brief(error, 160)


def _system(url: str) -> tuple[Any, str]:
    """The file system of this process and thread, which fsspec keeps, and the path in it."""
    import fsspec

    protocol, options = urlsplit(url).scheme.lower(), {}
    if protocol == "hf":
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every try
    try:
        if protocol in ("http", "https"):
            import aiohttp

            # A connection that brings nothing for half a minute is cut; by default it would hang for five.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=TIMEOUT)
            options = {"client_kwargs": {"timeout": timeout}, "use_listings_cache": False}
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url, **options))
    except ImportError as error:
        package = EXTRAS.get(protocol, protocol)
        raise UserError(f"{url} needs {package}; pip install 'freqmask[data]'") from error
    except ValueError as error:
        raise UserError(f"DATA ({url}): {_reason(error)}") from error
