"""Images of any source into tar shards: planned, encoded in worker processes, written, resumed after a kill."""

from __future__ import annotations

import csv
import errno
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from torch.utils.data import Dataset

from freqmask.data.loader import make_loader
from freqmask.data.parts import AT_ONCE, Item, Parts, PlannedShard
from freqmask.data.shard_index import INDEX_NAME, ShardIndex, ShardRows, load_index, make_index
from freqmask.data.shard_joining import join_indexes
from freqmask.data.shard_writer import Packed, write_shard
from freqmask.errors import UserError
from freqmask.training.files import replace_atomically

MANIFEST, SKIPPED, PARTS = "prepare.json", "skipped.csv", ".parts"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Settings:
    """What decides the bytes that are written; a prepared folder goes on under the same ones only.

    Attributes:
        resize: pixels of the shorter side at most; None for any.
        shard_size: images in a shard.
        pages: what the pages of a TIFF were.
        split: which splits.
        content: hash of the images and labels.
        lanes: worker processes of the first start, among which images that lie together far away are dealt out;
            it decides their order only.
    """

    resize: int | None
    shard_size: int
    pages: str
    split: str
    content: str
    lanes: int = 1


@dataclass
class Outcome:
    """What was written.

    Attributes:
        index: of all shards.
        bytes: of all shards.
        skipped: (name, reason) of images that cannot be read.
        reductions: sides over those of the original, of the images that were reduced.
    """

    index: ShardIndex
    bytes: int
    skipped: list[tuple[str, str]]
    reductions: list[float]


class _EncodingDataset(Dataset[Any]):
    """Encodes in a loader worker."""

    def __init__(self, parts: Parts, shorter_side: int | None) -> None:
        self.parts, self.shorter_side = parts, shorter_side

    def __getitem__(self, item: Item) -> Packed:
        return self.parts.packed(item, self.shorter_side)

    def __getitems__(self, items: list[Item]) -> list[Packed] | UserError:
        """A batch, or the error for the user: torch buries a raised one in a traceback."""
        try:
            return [self[item] for item in items]
        except UserError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


def prepare_shards(
    parts: Parts,
    settings: Settings,
    out: Path,
    workers: int,
    report: Callable[[int], None] = lambda done: None,
) -> Outcome:
    """Writes all shards that are not there yet, then their index.

    Args:
        parts: the images.
        settings: how; those of the manifest where there is one.
        out: the folder.
        workers: processes that encode; 0 for none but this one.
        report: called with the number of images done now.

    Raises:
        UserError: the disk is full or read-only; no image can be read.
    """
    planned = parts.shards(settings.shard_size, settings.lanes)
    missing = [shard for shard in planned if not _is_there(out, shard)]
    try:
        (out / PARTS).mkdir(parents=True, exist_ok=True)
        _write_manifest(out, settings, parts, [])
        _write_missing(parts, settings, out, missing, workers, report)
        return _finish(parts, settings, out, planned)
    except OSError as error:
        raise _in_words(error, out) from error


def _write_missing(
    parts: Parts,
    settings: Settings,
    out: Path,
    missing: list[PlannedShard],
    workers: int,
    report: Callable[[int], None],
) -> None:
    items = [item for shard in missing for item in shard.items]
    if not items:
        return
    dataset: Any = _EncodingDataset(parts, settings.resize)
    batches: Any = make_loader(dataset, items, AT_ONCE, workers, pin_memory=False, together=_as_it_is)  # type: ignore[arg-type]
    images = enumerate((one for batch in batches for one in batch), 1)
    for shard in missing:
        tally = _Tally()
        rows = write_shard(out / shard.name, _watched(islice(images, len(shard.items)), tally, report))
        size = (out / shard.name).stat().st_size
        index = make_index([ShardRows(shard.name, size, shard.split, rows)], parts.class_names)
        _save(index, _part_file(out, shard), **asdict(tally))


@dataclass
class _Tally:
    """What happened to the images of a shard: (name, reason) of bad ones, reductions of reduced ones."""

    skipped: list[tuple[str, str]] = field(default_factory=list)
    reductions: list[float] = field(default_factory=list)


def _watched(
    images: Iterable[tuple[int, Packed]], tally: _Tally, report: Callable[[int], None]
) -> Iterator[Packed]:
    """Images on their way into a shard, reported and counted."""
    for done, one in images:
        report(done)
        if isinstance(one.image, str):
            tally.skipped.append((one.name, one.image))
        elif one.image.reduction < 1:
            tally.reductions.append(round(one.image.reduction, 4))
        yield one


def _save(index: ShardIndex, file: Path, **extra: Any) -> None:
    if not index.save(file, **extra):  # it makes a cache's silence of a full disk, which is no cache here
        raise OSError(errno.ENOSPC, "cannot be written", str(file))


def _part_file(out: Path, shard: PlannedShard) -> Path:
    """What is known of a finished shard, until the index of all is written."""
    return out / PARTS / f"{shard.name}.index"


def _is_there(out: Path, shard: PlannedShard) -> bool:
    """Whether a shard was finished before."""
    try:
        _, size, _ = load_index(_part_file(out, shard)).shards[0]
        return (out / shard.name).stat().st_size == size
    except (ValueError, OSError):
        return False


def images_there(out: Path, parts: Parts, settings: Settings) -> int:
    """How many images lie in finished shards."""
    return sum(
        len(shard.items)
        for shard in parts.shards(settings.shard_size, settings.lanes)
        if _is_there(out, shard)
    )


def _finish(parts: Parts, settings: Settings, out: Path, planned: list[PlannedShard]) -> Outcome:
    """The index of all shards, the list of bad images, the manifest; then what was kept on the way goes."""
    try:
        indexes = [load_index(_part_file(out, shard)) for shard in planned]
    except ValueError as error:
        raise UserError(
            f"out ({out}) was changed meanwhile, perhaps by the same command started twice; start it again, once"
        ) from error
    skipped = [(str(name), str(why)) for index in indexes for name, why in index.extra["skipped"]]
    reductions = [float(one) for index in indexes for one in index.extra["reductions"]]
    index = join_indexes(indexes, parts.class_names)
    if len(index) == 0:
        raise UserError(
            f"not one of the {parts.count:,} images can be read; {skipped[0][0]}: {skipped[0][1]}"
        )
    _save(index, out / INDEX_NAME, reductions=reductions)
    shutil.copymode(out / planned[0].name, out / INDEX_NAME)  # a web server or a colleague reads it, too
    if skipped:
        replace_atomically(out / SKIPPED, lambda path: _write_skipped(path, skipped))
    _write_manifest(out, settings, parts, [list(shard) for shard in index.shards])
    for shard in planned:
        _part_file(out, shard).unlink()
    (out / PARTS).rmdir()
    return Outcome(index, sum(size for _, size, _ in index.shards), skipped, reductions)


def _write_skipped(path: Path, skipped: list[tuple[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(["name", "reason"])
        table.writerows(skipped)


def _write_manifest(out: Path, settings: Settings, parts: Parts, shards: list[list[Any]]) -> None:
    """``prepare.json``: the settings, the classes, and the shards once all of them are there."""
    content = {
        "settings": asdict(settings),
        "images": parts.count,
        "class_names": parts.class_names,
        "shards": shards,
    }
    text = json.dumps(content, indent=1) + "\n"
    replace_atomically(out / MANIFEST, lambda path: _write_text(path, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def read_manifest(out: Path) -> tuple[Settings, bool] | None:
    """The settings that a folder was begun with, and True where all its shards are there; None for a new one.

    Raises:
        UserError: the folder holds something else, or its manifest is damaged.
    """
    if not (out / MANIFEST).is_file():
        if out.exists() and (not out.is_dir() or any(_foreign(path) for path in out.iterdir())):
            raise UserError(f"out ({out}) holds something else already; give another --out")
        return None
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        return Settings(**manifest["settings"]), bool(manifest["shards"]) and (out / INDEX_NAME).is_file()
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out / MANIFEST} is damaged; delete {out} and prepare it again") from error


def _foreign(path: Path) -> bool:
    """Whether a file in OUT is not one of ours that a kill left in the first moment."""
    return path.name != PARTS and not (path.name.startswith(".") and path.suffix == ".tmp")


def clear_leftovers(out: Path) -> None:
    """Removes half-written files of processes that no longer run."""
    for path in [*out.glob(".*.tmp"), *out.glob(f"{INDEX_NAME}*.tmp"), *(out / PARTS).glob("*.tmp")]:
        process = path.name.split(".")[-2]
        if not (process.isdigit() and psutil.pid_exists(int(process))):
            path.unlink(missing_ok=True)


def _in_words(error: OSError, out: Path) -> UserError:
    if error.errno in _FULL:
        return UserError(
            f"out ({out}) cannot take more: the disk is full; finished shards stay, make room and the same "
            "command goes on"
        )
    return UserError(f"out ({out}) cannot be written ({error.strerror or error}); give another --out")
