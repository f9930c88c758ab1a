"""``freqmask prepare``: images into shards."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from freqmask.commands.command import command
from freqmask.console import BELOW, counted, image_progress, plain_name, readable_bytes, say, shell_path
from freqmask.errors import UserError
from freqmask.imports import uncollected
from freqmask.options import Auto, Range
from freqmask.training.files import check_out, check_writable, clear_leftovers, existing_parent

if TYPE_CHECKING:
    from freqmask.data.sharding import Parts, PrepareResult, Settings

_SHOWN_SKIPPED = 3
VIEW, SCALE = 224, (0.2, 1.0)  # MFM's usual view: its side in pixels, its share of the image's area
RIVAL = 256  # the side that images are often reduced to


@command()
def prepare(
    data: list[str],
    *,
    out: str,
    resize: Annotated[int | Literal["none"], Range(least=32)] = 448,
    shard_size: Annotated[int | Auto, Range(least=1)] = "auto",
    split: str = "all",
    labels: str | None = None,
    pages: Literal["channels", "images"] = "channels",
    workers: Annotated[int | Auto, Range(least=0)] = "auto",
) -> Path:
    """Packs images into tar shards that every command reads fast, from a disk or over a network.

    Large images are reduced once; those of 8 bits become JPEG of quality 95, all others keep every bit and band, as
    do those with missing pixels (nodata).
    An image that needs no reduction stays the file it was, byte for byte. Labels, groups, splits and names are
    kept; images that cannot be read are listed in skipped.csv. Cut short, the same command resumes.

    Args:
        data: folders or files of images, as for pretrain.
        out: the folder to write; it is DATA for every other command. WebDataset reads its tars, too.
        resize: pixels of the shorter side at most, or none for the files as they are.
        shard_size: images in a shard; auto makes shards of about 256 MB.
        split: all, or the name of a split.
        labels: a CSV table with the columns path and label, and optionally split and group.
        pages: what the pages of a TIFF are.
        workers: processes that decode; auto is one for each core.

    Returns:
        The folder.

    Raises:
        UserError: the images cannot be opened, or out cannot be written or was begun otherwise.
    """
    with uncollected():
        from freqmask.data.sharding import images_there, open_parts, prepare_shards, read_manifest
        from freqmask.data.storage import INDEX_NAME, PARTS
        from freqmask.training.auto import usable_cores

    side = None if resize == "none" else resize
    path = Path(out).expanduser()
    before, finished = read_manifest(path) or (None, False)
    if before is None and not path.exists():
        check_out(out, overwrite=False, folder=True)
    check_writable(path, folder=True)
    processes = usable_cores() if workers == "auto" else workers
    parts, notes = open_parts(data, pages, split, labels)
    counts = ", ".join(f"{name or 'images'} {len(source):,}" for name, source in parts.parts)
    classes = f", {len(parts.class_names):,} classes" if parts.class_names else ", no labels"
    say(f"images      {BELOW.join([counts + classes, *notes])}")
    settings = _settings(parts, (side, shard_size, pages, split), processes, before, path)
    if finished:
        same = "images" if settings.stamp in (None, parts.stamp) else "names"
        say(f"shards      {path} is there already, of the same {same} and settings")
        return path
    for folder, pattern in ((path, ".*.tmp"), (path, f"{INDEX_NAME}*.tmp"), (path / PARTS, "*.tmp")):
        clear_leftovers(folder, pattern=pattern)
    there = images_there(path, parts, settings)
    if there:
        say(f"resumes     {there:,} of {parts.count:,} images are in finished shards")
    with image_progress(parts.count, there) as count:
        result = prepare_shards(parts, settings, path, processes, count)
    _summarize(result, settings, path)
    return path


def _settings(
    parts: Parts, asked: tuple[Any, Any, Any, str], workers: int, before: Settings | None, out: Path
) -> Settings:
    """The settings of this start; those of a folder that was begun must be the same."""
    from freqmask.data.sharding import Settings, choose_shard_size

    side, size, pages, split = asked
    if before is not None:
        size = before.shard_size if size == "auto" else size
        # of a folder that goes on the first stamp stays: its first shards are of those files
        asked = (side, size, pages, split)
        settings = Settings(*asked, parts.content, before.workers, parts.groups, before.stamp)
        _check_same(settings, before, out)
        if before.stamp not in (None, parts.stamp):
            say(
                f"note: files of DATA were rewritten (or copied) since {shell_path(out)} was begun; delete it to pack "
                "them as they are now"
            )
        return settings
    chosen, mean = choose_shard_size(parts, side)
    size = chosen if size == "auto" else size
    needed = mean * parts.count
    place = out if out.is_dir() else existing_parent(out)  # it may be a disk of its own
    free = shutil.disk_usage(place).free
    say(
        f"shards      {len(parts.shards(size)):,} of up to {size:,} images, about {readable_bytes(needed)} in all; "
        f"{readable_bytes(free)} are free"
    )
    if needed > free:
        say(
            "note: that may not fit; it stops where the disk is full, and the same command resumes when there is room"
        )
    dealt = 1 if parts.blocks is None else max(workers, 1)
    return Settings(side, size, pages, split, parts.content, dealt, parts.groups, parts.stamp)


def _check_same(settings: Settings, before: Settings, out: Path) -> None:
    differing = []
    for name in ("resize", "shard_size", "pages", "split"):
        old, new = (getattr(each, name) or "none" for each in (before, settings))
        if old != new:
            differing.append(f"--{name} was {old} and is {new}")
    changed = settings.content != before.content or before.groups not in (None, settings.groups)
    if changed and not differing:
        differing.append("its images, labels or groups were others")
    if differing:
        raise UserError(
            f"out ({out}) was begun with other settings: {'; '.join(differing)}; give another --out, or delete it"
        )


def _summarize(result: PrepareResult, settings: Settings, path: Path) -> None:
    shards, images = len(result.index.shards), len(result.index)
    size = f"{shards:,} shard{'s' * (shards > 1)}, {readable_bytes(result.bytes)}"
    say(f"written     {path}    {images:,} images in {size}")
    if result.skipped:
        first = [f"{plain_name(name)}: {reason}" for name, reason in result.skipped[:_SHOWN_SKIPPED]]
        unread = f"{counted(len(result.skipped), 'image')} cannot be read; {path / 'skipped.csv'} lists them"
        say(f"skipped     {BELOW.join([unread, *first])}")
    say(f"spectrum    {BELOW.join(spectrum_words(result.reductions, images, settings.resize))}")
    say(f"use it      freqmask pretrain {shell_path(path)}")


def empty_octave_share(side: int) -> float:
    """How much of a crop's uppermost octave is empty, on average, because the crop had to be enlarged.

    A window of the share s (uniform in SCALE) of a square image of ``side`` pixels is enlarged by
    z = VIEW / (side sqrt(s)) where that is above 1. Its frequencies then end at 0.5 / z cycles a pixel instead of
    0.5, which takes 2 (1 - 1 / z) of the octave from 0.25 to 0.5.

    >>> round(empty_octave_share(448), 2), round(empty_octave_share(256), 2)
    (0.01, 0.31)
    """
    import numpy as np

    shares = np.linspace(*SCALE, 10_001)
    enlargement = np.maximum(VIEW / (side * np.sqrt(shares)), 1)
    return float(np.minimum(2 * (1 - 1 / enlargement), 1).mean())


def spectrum_words(reductions: Sequence[float], images: int, side: int | None) -> list[str]:
    """Sentences on what became of the frequencies of so many images, brought down to a shorter ``side``.

    ``reductions`` are sides over those of the original, of the images that were reduced.
    """
    if not len(reductions) or side is None:
        return ["untouched: no image was reduced, and every one keeps all its bits"]
    median = statistics.median(reductions)
    kept, rival = 1 - empty_octave_share(side), 1 - empty_octave_share(RIVAL)
    others = "" if len(reductions) == images else "; the others keep every bit"
    words = [
        f"{len(reductions):,} of {images:,} images ({len(reductions) / images:.0%}) were reduced, the median one to "
        f"{median:.2f} of its sides:",
        f"what lay above {0.5 * median:.2g} cycles a pixel of the original is gone from it{others}",
        f"a {VIEW}-pixel crop of {SCALE[0]:.0%} to {SCALE[1]:.0%} of such an image has {kept:.0%} of its upper octave",
    ]
    if side > RIVAL:
        words[-1] += f" (from {RIVAL} pixels: {rival:.0%})"
    return [*words, "--crop native sees the reduced pixels: for signals in single pixels take --resize none"]
