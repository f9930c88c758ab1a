"""``freqmask prepare``: images into shards."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from freqmask.commands.given import command
from freqmask.console import Progress, plain_name, readable_bytes, say, shell_word
from freqmask.errors import UserError
from freqmask.options import Auto, Range

if TYPE_CHECKING:
    from freqmask.data.sharding import Parts, PrepareResult, Settings

_SHOWN_SKIPPED = 3


@command(imports="freqmask.data.sharding")
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

    Large images are reduced once; those of 8 bits become JPEG of quality 95, all others keep every bit and band.
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
    from freqmask.data.sharding import (
        PARTS,
        images_there,
        open_parts,
        prepare_shards,
        read_manifest,
    )
    from freqmask.data.storage import INDEX_NAME
    from freqmask.training.auto import usable_cores
    from freqmask.training.files import check_out, check_writable, clear_leftovers

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
    say(f"images      {counts}{classes}")
    for note in notes:
        say(f"            {note}")
    settings = _settings(parts, (side, shard_size, pages, split), processes, before, path)
    if finished:
        say(f"shards      {path} is there already, of the same images and settings")
        return path
    for folder, pattern in ((path, ".*.tmp"), (path, f"{INDEX_NAME}*.tmp"), (path / PARTS, "*.tmp")):
        clear_leftovers(folder, pattern=pattern)
    there, began = images_there(path, parts, settings), time.monotonic()
    if there:
        say(f"resumes     {there:,} of {parts.count:,} images are in finished shards")
    progress = Progress(parts.count, there, {"rate": "{:.0f} images/s"}, unit="image")

    def count(done: int) -> None:
        progress.update(there + done, {"rate": done / max(time.monotonic() - began, 1e-9)})

    progress.start()
    try:
        result = prepare_shards(parts, settings, path, processes, count)
    finally:
        progress.close()
    _summarize(result, settings, path)
    return path


def _settings(
    parts: Parts, asked: tuple[Any, Any, Any, str], workers: int, before: Settings | None, out: Path
) -> Settings:
    """The settings of this start; those of a folder that was begun must be the same."""
    from freqmask.data.sharding import Settings, choose_shard_size
    from freqmask.training.files import existing_parent

    side, size, pages, split = asked
    if before is not None:
        size = before.shard_size if size == "auto" else size
        settings = Settings(side, size, pages, split, parts.content, before.workers)
        _check_same(settings, before, out)
        return settings
    chosen, mean = choose_shard_size(parts, side)
    size = chosen if size == "auto" else size
    needed = mean * parts.count
    free = shutil.disk_usage(existing_parent(out)).free
    say(
        f"shards      {len(parts.shards(size)):,} of up to {size:,} images, about {readable_bytes(needed)} in all; "
        f"{readable_bytes(free)} are free"
    )
    if needed > free:
        say(
            "note: that may not fit; it stops where the disk is full, and the same command resumes when there is room"
        )
    dealt = 1 if parts.blocks is None else max(workers, 1)
    return Settings(side, size, pages, split, parts.content, dealt)


def _check_same(settings: Settings, before: Settings, out: Path) -> None:
    differing = []
    for name in ("resize", "shard_size", "pages", "split"):
        old, new = (getattr(each, name) or "none" for each in (before, settings))
        if old != new:
            differing.append(f"--{name} was {old} and is {new}")
    if settings.content != before.content and not differing:
        differing.append("its images or labels were others")
    if differing:
        raise UserError(
            f"out ({out}) was begun with other settings: {'; '.join(differing)}; give another --out, or delete it"
        )


def _summarize(result: PrepareResult, settings: Settings, path: Path) -> None:
    from freqmask.data.encode import spectrum_words

    shards, images = len(result.index.shards), len(result.index)
    say(
        f"written     {path}    {images:,} images in {shards:,} shard{'s' * (shards > 1)}, "
        f"{readable_bytes(result.bytes)}"
    )
    if result.skipped:
        say(f"skipped     {len(result.skipped):,} images cannot be read; {path / 'skipped.csv'} lists them")
        for name, reason in result.skipped[:_SHOWN_SKIPPED]:
            say(f"            {plain_name(name)}: {reason}")
    first, *rest = spectrum_words(result.reductions, images, settings.resize)
    say(f"spectrum    {first}")
    for line in rest:
        say(f"            {line}")
    say(f"use it      freqmask pretrain {shell_word(path)}")
