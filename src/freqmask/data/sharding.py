"""Images of any source into tar shards: planned, encoded in worker processes, written, resumed after a kill.

An image is reduced where it is large, and becomes JPEG as a photograph of 8 bits; else every bit is kept.
"""

from __future__ import annotations

import errno
import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import tifffile
import torch
from jaxtyping import Shaped
from pyarrow import feather
from torch.utils.data import Dataset

from freqmask.data.cache import hash_of, replacing
from freqmask.data.loader import as_it_is, make_loader
from freqmask.data.pixels import Pages, Picture, Pixels, as_bad_image, fill_missing, missing_pixels
from freqmask.data.shards import SCHEMA, Row, ShardIndex, ShardRows, make_index, pack_rows
from freqmask.data.source import JoinedSource, Source, block_shuffle, some_images
from freqmask.data.sources import open_source, splits_there
from freqmask.data.storage import INDEX_NAME, MANIFEST, PARTS
from freqmask.data.tiff import NODATA_TAG
from freqmask.data.transforms import OVERSAMPLING, resize
from freqmask.errors import BadImage, UserError
from freqmask.training.files import replace_atomically, write_rows

SKIPPED = "skipped.csv"
SKIPPED_COLUMNS = ("name", "reason")
AT_ONCE = 8  # images that a worker hands over together
SHARD_BYTES = 256_000_000  # what --shard_size auto aims at: few files, and little lost when one is cut off
MOST_IN_A_SHARD = 10_000
SAMPLED = 32  # images that are encoded to learn how large they come out
SAMPLED_BLOCKS = 4  # row groups that they come from where those are fetched whole
ORDER_SEED = 0
JPEG_QUALITY, MOST_IN_A_JPEG = 95, 65_500  # pixels a side, libjpeg's limit
# Color at full resolution: halved, as is usual, its upper octave would be gone. A third more time and bytes.
JPEG_SUBSAMPLING = "444"
MISSING_SHARE = 0.5  # a reduced pixel is missing where this much of what it came from was
_FULL = (errno.ENOSPC, errno.EDQUOT)
Report = Callable[[int], None]


@dataclass(frozen=True)
class Settings:
    """What decides the bytes that are written; a prepared folder is continued under the same ones only."""

    resize: int | None  # pixels of the shorter side at most; None for any
    shard_size: int  # images in a shard
    pages: str  # what the pages of a TIFF were
    split: str  # which splits
    content: str  # hash of the images and labels
    workers: int = 1  # of the first start, among which images that lie together far away are dealt out
    groups: str | None = None  # hash of the images' groups; None in a folder of 0.1.0
    stamp: str | None = None  # hash of the files' bytes and times when the folder was begun; None as above


@dataclass
class PrepareResult:
    """What was written."""

    index: ShardIndex  # of all shards
    bytes: int  # of all shards
    skipped: list[tuple[str, str]]  # (name, reason) of images that cannot be read
    reductions: list[float]  # sides over those of the original, of the images that were reduced


@dataclass(frozen=True)
class EncodedImage:
    """An image as it goes into a shard."""

    data: bytes  # the file
    suffix: str  # of its name, with the dot
    size: tuple[int, int]  # (height, width) as shown
    channels: int  # as decoded
    bits: int  # of a sample
    reduction: float = 1.0  # its sides over those of the original, at most 1


class Packed(NamedTuple):
    """An image on its way into a shard."""

    name: str  # what it is called in DATA
    image: EncodedImage | str  # its file; or the reason why there is none
    label: int | None  # number of its class, or None
    class_name: str | None  # name of its class, or None
    group: str | None  # what it must not be separated from, or None


@dataclass
class PlannedShard:
    """One shard to be written: the name of its file, its split or None, the numbers of its images."""

    name: str
    split: str | None
    images: list[int]


class Parts:
    """The images to be packed, split by split, with one numbering of classes.

    Args:
        parts: (split or None, its images), each with at least one image.
    """

    def __init__(self, parts: list[tuple[str | None, Source]]) -> None:
        self.parts = parts
        self.whole = whole = JoinedSource([source for _, source in parts])
        self.class_names, self.blocks, self.count = whole.class_names, whole.blocks(), len(whole)
        self.content = hash_of(whole.fingerprint(), repr(whole.class_names), whole.all_labels())
        self.groups = hash_of(repr([[source.group(k) for k in range(len(source))] for _, source in parts]))
        self.stamp = whole.content_stamp()

    def packed(self, index: int, shorter_side: int | None) -> Packed:
        """One image, encoded, or the reason why it cannot be."""
        source, inner = self.whole.at(index)
        label = self.whole.label(index)
        class_name = None if label is None else (self.class_names or [])[label]
        image: EncodedImage | str
        try:
            with as_bad_image():
                image = encode_picture(source.open(inner), source.encoded(inner), shorter_side)
        except BadImage as error:
            image = error.reason
        return Packed(source.name(inner), image, label, class_name, source.group(inner))

    def shards(self, size: int, workers: int = 1) -> list[PlannedShard]:
        """Every split's images, mixed once so that reading in order is reading in no order, cut into shards.

        Images that lie together far away are dealt out among ``workers`` processes.
        """
        planned, stems, before = list[PlannedShard](), list[str](), 0
        for split, source in self.parts:
            blocks = source.blocks()
            if blocks is None:
                order = np.random.default_rng(ORDER_SEED).permutation(len(source))
            else:
                order = block_shuffle(blocks, ORDER_SEED, 0, AT_ONCE, workers, before)
            images = (before + order).tolist()
            before += len(source)
            stem = re.sub(r"[^\w-]", "_", split or "shards")
            while stem.casefold() in stems:  # "fold 1" and "fold.1"; some file systems know no capitals
                stem += "_"
            stems.append(stem.casefold())
            for shard, first in enumerate(range(0, len(images), size)):
                name = f"{stem}-{shard:06d}.tar"
                planned.append(PlannedShard(name, split, images[first : first + size]))
        return planned


def open_parts(
    data: Sequence[str | Path | Source], pages: Pages, split: str, labels: str | Path | None
) -> tuple[Parts, list[str]]:
    """The images of DATA (as for `open_source`), split by split, and sentences on what is left out.

    Of several DATA the splits are not kept; ``split`` is ``all`` or the name of one.
    """
    named: Any = data[0] if len(data) == 1 else list(data)
    source = open_source(named, pages, split, labels)
    notes = source.summary().notes
    alone = split != "all" or len(data) > 1 or isinstance(named, Source)
    names = [] if alone else splits_there(named, labels)
    if not names:
        return Parts([(None if split in ("all", "auto") else split, source)]), notes
    parts = Parts([(name, open_source(named, pages, name, labels)) for name in names])
    left = len(source) - parts.count
    more = [f"{left:,} images outside of {', '.join(names)} are left out."] if left else []
    return parts, [*notes, *more]


def choose_shard_size(parts: Parts, shorter_side: int | None) -> tuple[int, float]:
    """Images in a shard of about 256 MB, and the bytes of one image, from a few; a UserError where none can be read."""
    sampled = some_images(SAMPLED, parts.count, parts.blocks, ORDER_SEED, SAMPLED_BLOCKS)
    tried = [parts.packed(index, shorter_side) for index in sampled]
    sizes = [len(packed.image.data) for packed in tried if isinstance(packed.image, EncodedImage)]
    if not sizes:
        raise UserError(
            f"none of the {len(tried)} images looked at can be read; the first, {tried[0].name}: {tried[0].image}"
        )
    mean = sum(sizes) / len(sizes) + 1024  # a header, and half a block of padding
    most = min(max(int(SHARD_BYTES / mean), 1), MOST_IN_A_SHARD)
    return max(int(float(f"{most:.1g}")), 1), mean


class _EncodingDataset(Dataset[Any]):
    def __init__(self, parts: Parts, shorter_side: int | None) -> None:
        self.parts, self.shorter_side = parts, shorter_side

    def __getitems__(self, indices: list[int]) -> list[Packed] | UserError:
        """A batch, or the error for the user: torch buries a raised one in a traceback."""
        try:
            return [self.parts.packed(index, self.shorter_side) for index in indices]
        except UserError as error:
            return error


def prepare_shards(
    parts: Parts,
    settings: Settings,
    out: Path,
    workers: int,
    report: Report = lambda done: None,
) -> PrepareResult:
    """Writes all shards that are not there yet in ``workers`` further processes, then their index.

    ``settings`` are those of the manifest where there is one; ``report`` is called with the number of images done
    now. A UserError where the disk is full or read-only, or no image can be read.
    """
    planned = parts.shards(settings.shard_size, settings.workers)
    missing = [shard for shard in planned if not _is_finished(out, shard)]
    try:
        (out / PARTS).mkdir(parents=True, exist_ok=True)
        _write_manifest(out, settings, parts, [])
        if missing:
            _write_missing(parts, settings, out, missing, workers, report)
        return _finish(parts, settings, out, planned)
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                f"out ({out}) cannot take more: the disk is full; finished shards stay, make room and the same "
                "command resumes"
            ) from error
        words = f"({error.strerror or error}); give another --out"
        raise UserError(f"out ({out}) cannot be written {words}") from error


def _write_missing(
    parts: Parts, settings: Settings, out: Path, missing: list[PlannedShard], workers: int, report: Report
) -> None:
    indices: Any = [index for shard in missing for index in shard.images]
    dataset: Any = _EncodingDataset(parts, settings.resize)
    batches: Any = make_loader(dataset, indices, AT_ONCE, workers, pin_memory=False, together=as_it_is)
    images = enumerate((packed for batch in batches for packed in batch), 1)
    for shard in missing:
        written: dict[str, Any] = {"skipped": [], "reductions": []}

        def counted(count: int, written: dict[str, Any]) -> Iterator[Packed]:
            for done, packed in islice(images, count):
                report(done)
                if isinstance(packed.image, str):
                    written["skipped"].append((packed.name, packed.image))
                elif packed.image.reduction < 1:
                    written["reductions"].append(round(packed.image.reduction, 4))
                yield packed

        rows = write_shard(out / shard.name, counted(len(shard.images), written))
        written["bytes"] = (out / shard.name).stat().st_size
        with replacing(_part_file(out, shard)) as temporary:
            table = pack_rows(rows).replace_schema_metadata({"written": json.dumps(written)})
            feather.write_feather(table, str(temporary))


def _part_file(out: Path, shard: PlannedShard) -> Path:
    """What is known of a finished shard, until the index of all is written."""
    return out / PARTS / f"{shard.name}.index"


def _read_part(out: Path, shard: PlannedShard) -> tuple[ShardRows, dict[str, Any]]:
    """What is known of a finished shard; OSError or ValueError (Arrow's, too) where it is not whole."""
    table = feather.read_table(str(_part_file(out, shard)))
    if not table.schema.equals(SCHEMA):
        raise ValueError(f"{shard.name}: its rows were written by another version")
    try:
        written = json.loads((table.schema.metadata or {})[b"written"])
        written = {
            "bytes": int(written["bytes"]),
            "skipped": [(str(name), str(reason)) for name, reason in written["skipped"]],
            "reductions": [float(reduction) for reduction in written["reductions"]],
        }
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{shard.name}: what was written beside its rows is damaged") from error
    return ShardRows(shard.name, written["bytes"], shard.split, table), written


def _is_finished(out: Path, shard: PlannedShard) -> bool:
    with suppress(ValueError, OSError):
        return _has(out / shard.name, _read_part(out, shard)[0].bytes)
    return False


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def images_there(out: Path, parts: Parts, settings: Settings) -> int:
    """How many images lie in finished shards."""
    planned = parts.shards(settings.shard_size, settings.workers)
    return sum(len(shard.images) for shard in planned if _is_finished(out, shard))


def _finish(parts: Parts, settings: Settings, out: Path, planned: list[PlannedShard]) -> PrepareResult:
    """The index of all shards, the list of bad images, the manifest; then what was kept on the way goes."""
    try:
        shards, written = zip(*(_read_part(out, shard) for shard in planned), strict=True)
    except (ValueError, OSError) as error:
        raise UserError(
            f"out ({out}) was changed meanwhile, perhaps by the same command started twice; start it again, once"
        ) from error
    skipped = [entry for part in written for entry in part["skipped"]]
    reductions = [reduction for part in written for reduction in part["reductions"]]
    index = make_index(shards, parts.class_names)
    if len(index) == 0:
        raise UserError(f"not one of the {parts.count:,} images can be read; {': '.join(skipped[0])}")
    if not index.save(out / INDEX_NAME, reductions=reductions):
        # it makes a cache's silence of a full disk, which is no cache here
        raise OSError(errno.ENOSPC, "cannot be written", str(out / INDEX_NAME))
    shutil.copymode(out / planned[0].name, out / INDEX_NAME)  # a web server or a colleague reads it, too
    if skipped:
        rows = [dict(zip(SKIPPED_COLUMNS, row, strict=True)) for row in skipped]
        write_rows(out / SKIPPED, SKIPPED_COLUMNS, rows)
    _write_manifest(out, settings, parts, [list(shard) for shard in index.shards])
    shutil.rmtree(out / PARTS, ignore_errors=True)  # NFS keeps what is still mapped
    return PrepareResult(index, sum(size for _, size, _ in index.shards), skipped, reductions)


def _write_manifest(out: Path, settings: Settings, parts: Parts, shards: list[list[Any]]) -> None:
    """``prepare.json``: the settings, the classes, and the shards once all of them are there."""
    content = {"settings": asdict(settings), "images": parts.count, "class_names": parts.class_names}
    text = json.dumps({**content, "shards": shards}, indent=1) + "\n"
    replace_atomically(out / MANIFEST, lambda temporary: temporary.write_bytes(text.encode()))


def read_manifest(out: Path) -> tuple[Settings, bool] | None:
    """The settings that a folder was begun with, and True where all its shards are there; None for a new one.

    Raises:
        UserError: the folder holds something else, or its manifest is damaged.
    """
    if not (out / MANIFEST).is_file():
        # a kill in the first moment leaves the folder of parts, or a half-written manifest
        names = [path.name for path in out.iterdir()] if out.is_dir() else [""] * out.exists()
        if any(name != PARTS and not (name[:1] == "." and name.endswith(".tmp")) for name in names):
            raise UserError(f"out ({out}) holds something else already; give another --out")
        return None
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        settings = manifest["settings"]
        settings["workers"] = settings.pop("lanes", settings.get("workers", 1))  # as 0.1.0 called them
        shards = manifest["shards"]
        there = (out / INDEX_NAME).is_file() and all(_has(out / name, size) for name, size, _ in shards)
        return Settings(**settings), bool(shards) and there
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{out / MANIFEST} is damaged; delete {out} and prepare it again") from error


def write_shard(path: Path, images: Iterable[Packed]) -> list[Row]:
    """An atomic tar with members in WebDataset's names, always the same bytes for the same images.

    Images without a file are left out. Returns what lies where in it.
    """
    rows: list[Row] = []

    def write(temporary: Path) -> None:
        taken: set[str] = set()
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for name, image, label, class_name, group in images:
                if isinstance(image, str):
                    continue
                key = member_key(name, taken)
                place = (key + image.suffix, _append(tar, key + image.suffix, image.data), len(image.data))
                if label is not None:
                    _append(tar, key + ".cls", str(label).encode())
                rows.append(Row(*place, class_name, group, name, *image.size, image.channels, image.bits))

    replace_atomically(path, write)
    return rows


def _append(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Adds a member; where its bytes begin. Owner, rights and time are left at 0, or no two tars were equal."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    return tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE  # type: ignore[attr-defined, no-any-return, unused-ignore]


def member_key(name: str, taken: set[str]) -> str:
    """What a member is called before its suffix: no dots, which part a sample's name in WebDataset, and no twins.

    ``taken`` holds the keys of the shard so far, and the new one from now on.

    >>> member_key("cat/my photo.v2.jpg", set())
    'cat/my_photo_v2'
    """
    path = PurePosixPath(name.replace("\\", "/"))
    stem = str(path.with_name(path.stem)) if path.suffix else str(path)
    key = re.sub(r"[^\w/+=-]", "_", stem).strip("/") or "image"
    number, unique = 1, key
    while unique in taken:
        number += 1
        unique = f"{key}_{number}"
    taken.add(unique)
    return unique


def encode_picture(
    picture: Picture, original: tuple[bytes, str] | None, shorter_side: int | None
) -> EncodedImage:
    """Decode an image once, so that it is known to be whole, and put it into the form of a shard; or a BadImage.

    What needs no reduction to ``shorter_side`` pixels and has an ``original`` (its file, its suffix) stays that file,
    byte for byte. A reduced image of 8 bits becomes a JPEG where one holds it, which knows no missing pixels;
    everything else keeps every bit, as PNG where that can be, as TIFF where not.
    """
    wanted = reduced_size(picture.size, shorter_side)
    if wanted == picture.size:
        pixels = picture.decode()
        data, suffix = original or _lossless(pixels, picture.nodata)
    else:
        at_least = (OVERSAMPLING * wanted[0], OVERSAMPLING * wanted[1])
        pixels = reduced(picture.decode(None, at_least), wanted, picture.nodata)
        missing = missing_pixels(pixels, picture.nodata)
        plain = pixels.dtype == np.uint8 and len(pixels) in (1, 3) and (missing is None or not missing.any())
        jpeg = plain and max(wanted) <= MOST_IN_A_JPEG
        data, suffix = (_jpeg(pixels), ".jpg") if jpeg else _lossless(pixels, picture.nodata)
    reduction = min(wanted) / min(picture.size)
    return EncodedImage(data, suffix, wanted, len(pixels), 8 * pixels.dtype.itemsize, reduction)


def reduced_size(size: tuple[int, int], shorter_side: int | None) -> tuple[int, int]:
    """Height and width of an image whose shorter side is brought down to a limit.

    >>> reduced_size((3000, 4000), 448), reduced_size((300, 500), 448)
    ((448, 597), (300, 500))
    """
    if shorter_side is None or min(size) <= shorter_side:
        return size
    factor = shorter_side / min(size)
    height, width = (max(1, round(side * factor)) for side in size)
    return height, width


def reduced(
    pixels: Pixels, size: tuple[int, int], nodata: float | None
) -> Shaped[np.ndarray, "channel new_height new_width"]:
    """An image brought to (height, width) with our antialiased bicubic, in its own type and range.

    Bicubic overshoots; what leaves the range of the image's own values is clamped to it. What is mostly missing
    (NaN or ``nodata``) stays missing, and an image that is all missing is a BadImage.
    """
    if pixels.dtype == np.uint8 and nodata is None:
        return resize(torch.from_numpy(pixels), size).numpy()
    missing = missing_pixels(pixels, nodata)
    values = fill_missing(pixels, missing).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    unit = torch.from_numpy(((values - low) / max(high - low, 1e-300)).astype(np.float32))
    scaled = resize(unit, size).numpy().astype(np.float64) * (high - low) + low
    small = (np.rint(scaled) if pixels.dtype.kind in "iu" else scaled).astype(pixels.dtype)
    if missing is not None and missing.any():
        gone = resize(torch.from_numpy(missing.astype(np.float32)), size).numpy() >= MISSING_SHARE
        small[gone] = np.nan if pixels.dtype.kind == "f" else nodata
    return small


def _jpeg(pixels: np.ndarray) -> bytes:
    layout = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    if len(pixels) == 1:
        return bytes(imagecodecs.jpeg8_encode(layout[..., 0], level=JPEG_QUALITY))
    return bytes(imagecodecs.jpeg8_encode(layout, level=JPEG_QUALITY, subsampling=JPEG_SUBSAMPLING))


def _lossless(pixels: np.ndarray, nodata: float | None) -> tuple[bytes, str]:
    """PNG for whole numbers in one or three channels, else TIFF (deflate); with its nodata value."""
    layout = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    if pixels.dtype in (np.uint8, np.uint16) and len(pixels) in (1, 3) and nodata is None:
        return bytes(imagecodecs.png_encode(layout[..., 0] if len(pixels) == 1 else layout)), ".png"
    file = io.BytesIO()
    tifffile.imwrite(
        file,
        layout[..., 0] if len(pixels) == 1 else layout,
        photometric="minisblack",
        planarconfig="contig" if len(pixels) > 1 else None,
        compression="zlib",
        predictor=True,
        metadata=None,
        software=False,
        extratags=[] if nodata is None else [(NODATA_TAG, "s", 0, f"{nodata:.17g}", True)],
    )
    return file.getvalue(), ".tif"
