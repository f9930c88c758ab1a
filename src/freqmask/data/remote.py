"""Files behind a URL, read through fsspec by byte ranges, with patience where a connection breaks."""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import io
import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

import fsspec

from freqmask.data.cache import cache_file, replacing
from freqmask.data.shard_index import INDEX_NAME
from freqmask.data.splits import split_of
from freqmask.errors import UserError

Result = TypeVar("Result")

PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds before each further try
SECONDS_WITHOUT_A_BYTE = 30
HEADER_BYTES = 65_536  # asked for at once while headers are read; the next header often lies in it
EXTRAS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
}
TRANSIENT = (408, 425, 429)  # answers of a server that ask for patience; all others below 500 are final


class RemoteFiles:
    """Files below a URL. Cheap to pickle: connections are made in the process that reads.

    Args:
        root: ``https://…``, ``s3://…``, ``gs://…``, ``memory://…``; whatever fsspec knows. Credentials and
            endpoints come from where the protocol's own tools look for them.
    """

    remote = True

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/") if urlsplit(root).path.strip("/") else root
        self.where = self.root
        self._sizes: dict[str, int | None] = {}
        self._index: Path | None = None

    def url(self, name: str) -> str:
        """The whole address of a file."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Some bytes of a file, or all of them.

        Raises:
            FileNotFoundError: it is not there.
            UserError: it cannot be read, however often it is tried.
        """
        url = self.url(name)

        def fetch() -> bytes:
            system, path = _system(url)
            data = system.cat_file(path, start=start, end=stop, **_reading(url))
            if start is not None and stop is not None and len(data) > stop - start:
                raise _NoRangesError
            if start is not None and stop is not None and len(data) < stop - start:
                raise ConnectionError(f"{len(data):,} of {stop - start:,} bytes came")
            return bytes(data)

        return with_patience(url, fetch)

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            FileNotFoundError: it is not there.
            UserError: the server does not tell.
        """
        if self._sizes.get(name) is None:
            self._sizes[name] = with_patience(self.url(name), lambda: _info(self.url(name)))["size"]
        size = self._sizes[name]
        if size is None:
            raise UserError(f"{self.url(name)}: the server does not tell its size; copy it here first")
        return size

    def state(self, name: str) -> tuple[object, ...]:
        """The size; servers do not agree on times of change."""
        return (self.size(name),)

    def stream(self, name: str) -> BinaryIO:
        """The file, to be read here and there in small pieces."""
        return cast(BinaryIO, io.BufferedReader(_RangeFile(self, name), HEADER_BYTES))

    def names(self) -> list[str]:
        """The tars below, directly or in folders named as splits."""
        return sorted(
            name
            for name in self.listing(levels=2)
            if name.endswith(".tar") and (name.count("/") == 0 or split_of(name.split("/")[0]))
        )

    def matching(self, pattern: str) -> list[str]:
        """The files whose paths fit a pattern with ``*`` and ``?``."""
        return sorted(fnmatch.filter(self.listing(pattern.count("/") + 1), pattern))

    def listing(self, levels: int | None = None) -> dict[str, int | None]:
        """Path relative to the root -> bytes of each file below; None where the server does not tell.

        Args:
            levels: of folders to go down; None for all.

        Raises:
            UserError: the protocol or the server does not list.
        """
        system, path = _system(self.root)
        base = path.rstrip("/") + "/"

        def find() -> dict[str, Any]:
            listed: dict[str, Any] = system.find(path, maxdepth=levels, detail=True)
            if not listed:
                system.info(path)  # fsspec passes over a server that does not answer; this tells
            return listed

        found: dict[str, Any] = with_patience(self.root, find, gone={})
        sizes: dict[str, int | None] = {
            full.removeprefix(base): about.get("size")
            for full, about in found.items()
            if full.startswith(base)
        }
        self._sizes.update(sizes)
        return sizes

    def index_file(self) -> Path | None:
        """The index beside the shards, fetched into the cache; None where there is none."""
        if self._index is not None:
            return self._index
        try:
            data = self.read(INDEX_NAME)
        except FileNotFoundError:
            return None
        self._index = file = cache_file("remote-index", self.root, len(data), hash_of(data))
        if not file.exists():
            with replacing(file) as temporary:
                temporary.write_bytes(data)
        return file


def hash_of(data: bytes) -> str:
    """A short hash of some bytes."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


class _NoRangesError(Exception):
    """The server sent the whole file where a part was asked for."""


class _RangeFile(io.RawIOBase):
    """A file behind a URL that is read where one looks."""

    def __init__(self, files: RemoteFiles, name: str) -> None:
        super().__init__()
        self._files, self._name, self._place = files, name, 0
        self._size = files.size(name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        stop = min(self._place + len(buffer), self._size)
        if stop <= self._place:
            return 0
        data = self._files.read(self._name, self._place, stop)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def with_patience(url: str, work: Callable[[], Result], gone: Result | None = None) -> Result:
    """Tries again where a connection breaks or a server is busy, then says so.

    Args:
        url: for the message.
        work: what may fail.
        gone: what to return where the address does not exist, instead of raising.

    Raises:
        FileNotFoundError: the address does not exist.
        UserError: refused, or no success after several tries.
    """
    for pause in (*PAUSES, None):
        try:
            return work()
        except FileNotFoundError as error:
            hidden = _hidden_in(error)
            if hidden is not None:
                _wait_or_tell(url, hidden, pause)
            elif gone is not None:
                return gone
            else:
                raise FileNotFoundError(2, "not there", url) from None
        except UserError:
            raise
        except _NoRangesError:
            raise UserError(
                f"{url} cannot be read in parts: its server ignores byte ranges; copy it here first"
            ) from None
        except (NotImplementedError, ImportError) as error:
            raise UserError(f"{url} cannot be opened ({_words(error)})") from error
        except (AttributeError, NameError, TypeError):
            raise  # a mistake in a program, which trying again would only hide
        except Exception as error:  # aiohttp's, botocore's, httpx's and the system's share no ancestor
            _wait_or_tell(url, error, pause)
    raise AssertionError("the last try returns or raises")


def _hidden_in(error: FileNotFoundError) -> BaseException | None:
    """What fsspec's HTTP calls "not found" although the server said something else, or nothing at all."""
    cause = error.__cause__
    if cause is None or isinstance(cause, FileNotFoundError):
        return None
    status = _status(cause)
    of_connection = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
    return cause if (status not in (404, 410) if status is not None else of_connection) else None


def _wait_or_tell(url: str, error: BaseException, pause: float | None) -> None:
    """Waits before the next try, or says why there is none."""
    if _is_final(error):
        raise UserError(f"{url} is refused ({_words(error)}); check address and rights") from error
    if pause is None:
        raise UserError(
            f"{url} cannot be read after {len(PAUSES) + 1} tries ({_words(error)}); check the connection, "
            "then the same command goes on"
        ) from error
    time.sleep(pause)


def _is_final(error: BaseException) -> bool:
    """Whether trying again is of no use."""
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in TRANSIENT
    return isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError"


def _status(error: BaseException) -> int | None:
    """The answer of the server: aiohttp's ``status``, gcsfs's ``code``, httpx's ``response.status_code``."""
    places = ((error, "status"), (getattr(error, "response", None), "status_code"), (error, "code"))
    found = (getattr(holder, name, None) for holder, name in places)
    return next((status for status in found if isinstance(status, int)), None)


def _words(error: BaseException) -> str:
    status = _status(error)
    if status is not None:
        return f"status {status}"
    chain = [error, *(one for one in (error.__cause__, error.__context__) if one is not None)]
    numbers = {getattr(one, "errno", None) for one in chain}
    if errno.ECONNREFUSED in numbers or any(isinstance(one, ConnectionRefusedError) for one in chain):
        return "the connection was refused: nothing listens there"
    if any(isinstance(one, socket.gaierror) for one in chain):
        return "no host of that name was found"
    if isinstance(error, TimeoutError):
        return f"nothing came for {SECONDS_WITHOUT_A_BYTE} seconds"
    return " ".join(str(error).split())[:160] or type(error).__name__


def _info(url: str) -> dict[str, Any]:
    system, path = _system(url)
    about: dict[str, Any] = system.info(path)
    return about


def _system(url: str) -> tuple[Any, str]:
    """The file system of this process and thread, which fsspec keeps, and the path in it."""
    protocol = urlsplit(url).scheme.lower()
    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url, **_options(protocol)))
    except ImportError as error:
        package = EXTRAS.get(protocol, protocol)
        raise UserError(f"{url} needs {package}; pip install 'freqmask[data]'") from error
    except ValueError as error:
        raise UserError(f"DATA ({url}): {_words(error)}") from error


def _reading(url: str) -> dict[str, Any]:
    """Hugging Face's files read 5 MB ahead of what is asked for, unless told not to."""
    return {"cache_type": "none"} if url.lower().startswith("hf:") else {}


def _options(protocol: str) -> dict[str, Any]:
    """A connection that brings nothing for half a minute is cut; by default it would hang for five."""
    if protocol == "hf":
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every try
    if protocol not in ("http", "https"):
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=SECONDS_WITHOUT_A_BYTE)
    return {"client_kwargs": {"timeout": timeout}, "use_listings_cache": False}
