"""Claim: the index of a folder of millions of files is small, shared by the workers, and fast at its second start.

Real folders are made; the files in them are simulated, because a file system with 14 million files is not at
hand: `os.scandir` yields made-up entries for those folders, everything else (stat of each folder, assembling,
cache file, reading it back, sharing it with a worker process) is what a run does. A first start on a real disk
adds the time of its directory reads and of one stat a file.

    python benchmarks/index.py                        # 14 million files in 21,841 folders
    python benchmarks/index.py --files 1000000 --folders 1000
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import multiprocessing
import os
import platform
import stat
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil

from freqmask.data import index as index_module
from freqmask.data.index import FolderIndex, index_folder

RESULTS = Path(__file__).parent / "results" / "index.csv"
SUFFIXES = frozenset({".jpeg"})
Row = dict[str, Any]


class Entry:
    """What `os.scandir` yields for a file that is not there."""

    size = os.stat_result((stat.S_IFREG | 0o644, 0, 0, 1, 0, 0, 110_000, 0, 0, 0))

    def __init__(self, name: bytes) -> None:
        self.name = name

    def is_dir(self) -> bool:
        return False

    def is_symlink(self) -> bool:
        return False

    def is_file(self) -> bool:
        return True

    def stat(self) -> os.stat_result:
        return self.size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=14_000_000)
    parser.add_argument("--folders", type=int, default=21_841)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = str(Path(place) / "cache")
        rows = measure(make_folders(Path(place) / "data", arguments.folders), arguments.files)
    show(rows)
    write(rows, arguments.files)


def make_folders(root: Path, count: int) -> Path:
    """Empty folders, old enough to count as settled."""
    long_ago = time.time() - 3600
    for number in range(count):
        folder = root / f"n{number:08d}"
        folder.mkdir(parents=True)
        os.utime(folder, (long_ago, long_ago))
    os.utime(root, (long_ago, long_ago))
    return root


def measure(root: Path, files: int) -> list[Row]:
    """First start, second start, what a worker holds."""
    first, seconds_first = timed(root, files)
    again, seconds_again = timed(root, files)
    if len(first) != len(again) or first.fingerprint != again.fingerprint:
        raise SystemExit("the second start sees other files than the first")
    assert again.cached_in is not None
    here = resident_bytes()
    size = again.cached_in.stat().st_size
    return [
        row("files", len(again), "", ""),
        row("first start, files simulated", seconds_first, "s", ""),
        row("second start", seconds_again, "s", "<= 10"),
        row("index file, in all", size / len(again), "bytes a file", "<= 100"),
        row("a worker more, forked", more_in_worker(again, "fork") / 1e6, "MB", "<= 50"),
        row("a worker more, started afresh", more_in_worker(again, "spawn") / 1e6, "MB", "<= 50"),
        row("the main process, whole", here / 1e6, "MB", ""),
    ]


def timed(root: Path, files: int) -> tuple[FolderIndex, float]:
    """An index and the seconds it took."""
    folders = sum(1 for _ in root.iterdir())
    real = os.scandir

    @contextlib.contextmanager
    def simulated(path: bytes) -> Iterator[Any]:
        name = os.path.basename(path)  # noqa: PTH119  bytes
        if os.fsdecode(path) == str(root):
            with real(path) as entries:
                yield entries
        else:
            yield entries_of(name, files, folders)

    with mock.patch.object(index_module.os, "scandir", simulated):
        began = time.perf_counter()
        index = index_folder(root, SUFFIXES)
        return index, time.perf_counter() - began


def entries_of(folder: bytes, files: int, folders: int) -> Iterator[Entry]:
    """The made-up files of a folder: ImageNet's names, an even share of all."""
    number = int(folder[1:])
    first, last = number * files // folders, (number + 1) * files // folders
    return (Entry(b"%s_%d.JPEG" % (folder, place)) for place in range(last - first))


def more_in_worker(index: FolderIndex, method: str) -> float:
    """Bytes that a worker process holds alone after it has read names all over the index, less those before."""
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    worker = context.Process(target=read_all_over, args=(index if method == "fork" else None, theirs))
    worker.start()
    if method == "spawn":
        ours.send(index)
    more: float = ours.recv()
    worker.join()
    return more


def read_all_over(index: FolderIndex | None, connection: Connection) -> None:
    """In the worker: a thousand names from the first to the last file."""
    before = own_bytes()
    held: FolderIndex = connection.recv() if index is None else index
    for number in np.linspace(0, len(held) - 1, 1000).astype(int).tolist():
        held.path(number)
    connection.send(own_bytes() - before)


def own_bytes() -> int:
    """Memory of this process that no other shares."""
    return int(psutil.Process().memory_full_info().uss)


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def row(what: str, value: float, unit: str, aim: str) -> Row:
    return {"what": what, "value": f"{value:,.1f}" if unit else f"{value:,}", "unit": unit, "aim": aim}


def show(rows: list[Row]) -> None:
    for one in rows:
        print(f"{one['what']:<34}{one['value']:>14} {one['unit']:<14}{one['aim']}")


def write(rows: list[Row], files: int) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        table = csv.DictWriter(file, ["what", "value", "unit", "aim", "command", "machine"])
        table.writeheader()
        command = f"python benchmarks/index.py --files {files}"
        machine = f"{os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}"
        table.writerows({**one, "command": command, "machine": machine} for one in rows)


if __name__ == "__main__":
    main()
