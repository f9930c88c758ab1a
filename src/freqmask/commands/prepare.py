"""``freqmask prepare``: images into shards."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any, Literal

from freqmask.commands.given import command
from freqmask.console import say
from freqmask.errors import UserError
from freqmask.options import Auto

LEAST_SIDE = 32
_SHOWN_SKIPPED = 3
_WAYS_OUT = "give another --out, or delete it"


@command()
def prepare(
    data: list[str],
    *,
    out: str,
    resize: int | Literal["none"] = 448,
    shard_size: int | Auto = "auto",
    split: str = "all",
    labels: str | None = None,
    pages: Literal["channels", "images"] = "channels",
    workers: int | Auto = "auto",
) -> Path:
    """Packs images into tar shards that every command reads fast, from a disk or over a network.

    Large images are reduced once; those of 8 bits become JPEG of quality 95, all others keep every bit and band.
    An image that needs no reduction stays the file it was, byte for byte. Labels, groups, splits and names are
    kept; images that cannot be read are listed in skipped.csv. The same command goes on where it was cut short.

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
    from freqmask.data.sharding import clear_leftovers, open_parts, prepare_shards, read_manifest
    from freqmask.interop.outputs import check_out
    from freqmask.training.files import check_writable

    side = _side(resize)
    path = Path(out).expanduser()
    begun = read_manifest(path)
    if begun is None and not path.exists():
        check_out(out, overwrite=False, folder=True)
    check_writable(path, folder=True)
    processes = _processes(workers)
    parts, notes = open_parts([data] if isinstance(data, str) else data, pages, split, labels)
    _say_images(parts, notes)
    settings = _settings(parts, side, shard_size, pages, split, processes, begun, path)
    if begun is not None and begun[1]:
        say(f"shards      {path} is there already, of the same images and settings")
        return path
    clear_leftovers(path)
    progress, count = _progress(parts, settings, path)
    progress.start()
    try:
        outcome = prepare_shards(parts, settings, path, processes, count)
    finally:
        progress.close()
    _tell(outcome, parts, settings, path)
    return path


def _side(resize: int | str) -> int | None:
    if resize == "none":
        return None
    if not isinstance(resize, int) or isinstance(resize, bool) or resize < LEAST_SIDE:
        raise UserError(f"resize ({resize}) must be none or at least {LEAST_SIDE} pixels; try 448")
    return resize


def _processes(workers: int | str) -> int:
    from freqmask.training.auto import usable_cores

    if workers == "auto":
        return usable_cores()
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 0:
        raise UserError(f"workers ({workers}) must be auto or a whole number of at least 0")
    return workers


def _say_images(parts: Any, notes: list[str]) -> None:
    counts = ", ".join(f"{split or 'images'} {len(source):,}" for split, source in parts.parts)
    classes = f", {len(parts.class_names):,} classes" if parts.class_names else ", no labels"
    say(f"images      {counts}{classes}")
    for note in notes:
        say(f"            {note}")


def _settings(
    parts: Any,
    side: int | None,
    shard_size: int | str,
    pages: str,
    split: str,
    workers: int,
    begun: tuple[Any, bool] | None,
    out: Path,
) -> Any:
    """The settings of this start; those of a folder that was begun must be the same."""
    from freqmask.data.sharding import Settings, choose_shard_size

    if shard_size != "auto" and (not isinstance(shard_size, int) or shard_size < 1):
        raise UserError(f"shard_size ({shard_size}) must be auto or at least 1 image")
    if begun is not None:
        size = begun[0].shard_size if shard_size == "auto" else int(shard_size)
        settings = Settings(side, size, pages, split, parts.content, begun[0].lanes)
        _compare(settings, begun[0], out)
        return settings
    chosen, mean = choose_shard_size(parts, side)
    size = chosen if shard_size == "auto" else int(shard_size)
    _say_size(parts, size, mean, out)
    lanes = 1 if parts.blocks is None else max(workers, 1)
    return Settings(side, size, pages, split, parts.content, lanes)


def _compare(settings: Any, before: Any, out: Path) -> None:
    differing = []
    for name in ("resize", "shard_size", "pages", "split"):
        old, new = getattr(before, name), getattr(settings, name)
        if old != new:
            differing.append(f"--{name} was {_word(old)} and is {_word(new)}")
    if settings.content != before.content and not differing:
        differing.append("its images or labels were others")
    if differing:
        raise UserError(f"out ({out}) was begun with other settings: {'; '.join(differing)}; {_WAYS_OUT}")


def _word(value: Any) -> Any:
    return "none" if value is None else value


def _say_size(parts: Any, size: int, mean: float, out: Path) -> None:
    """How many shards, and whether the disk has room for them."""
    import shutil

    from freqmask.console import readable_bytes

    count = len(parts.shards(size))
    needed = mean * parts.count
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    say(
        f"shards      {count:,} of up to {size:,} images, about {readable_bytes(needed)} in all; "
        f"{readable_bytes(free)} are free"
    )
    if needed > free:
        say(
            "note: that may not fit; it stops where the disk is full, and the same command goes on when there is room"
        )


def _progress(parts: Any, settings: Any, out: Path) -> tuple[Any, Any]:
    """The bar, and what moves it."""
    from freqmask.console import Progress
    from freqmask.data.sharding import images_there

    there, began = images_there(out, parts, settings), time.monotonic()
    if there:
        say(f"goes on     {there:,} of {parts.count:,} images are in finished shards")
    progress = Progress(parts.count, there, {"rate": "{:.0f} images/s"}, unit="image")

    def count(done: int) -> None:
        progress.update(there + done, {"rate": done / max(time.monotonic() - began, 1e-9)})

    return progress, count


def _tell(outcome: Any, parts: Any, settings: Any, path: Path) -> None:
    from freqmask.console import readable_bytes
    from freqmask.data.encode import spectrum_words

    shards = len(outcome.index.shards)
    say(
        f"written     {path}    {len(outcome.index):,} images in {shards:,} shard{'s' * (shards > 1)}, "
        f"{readable_bytes(outcome.bytes)}"
    )
    if outcome.skipped:
        say(f"skipped     {len(outcome.skipped):,} images cannot be read; {path / 'skipped.csv'} lists them")
        for name, reason in outcome.skipped[:_SHOWN_SKIPPED]:
            say(f"            {name}: {reason}")
    first, *rest = spectrum_words(outcome.reductions, len(outcome.index), settings.resize)
    say(f"spectrum    {first}")
    for line in rest:
        say(f"            {line}")
    say(f"use it      freqmask pretrain {shlex.quote(str(path))}")
