"""Pictures small enough to live inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from freqmask.reporting.thinning import spread_out

WIDEST = 1400  # pixels; previews are drawn about this wide
NARROWEST = 640  # below it the titles in a preview cannot be read
MOST = 60  # pictures of a run; a slider with more is no finer to the hand
WANTED = 24  # pictures for which sharpness is given up
QUALITY = 75  # of WebP


@dataclass(frozen=True)
class Picture:
    """An image as the page holds it.

    Attributes:
        step: the step that it shows.
        source: a data URI.
        width: in pixels.
        height: in pixels.
    """

    step: int
    source: str
    width: int
    height: int


def embed(path: Path, step: int = 0, widest: int = WIDEST) -> Picture | None:
    """The picture as WebP in a data URI; None where the file is no image that can be read."""
    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    if image.width > widest:
        image = image.resize((widest, round(image.height * widest / image.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY)
    source = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(step, source, image.width, image.height)


def embed_within(path: Path, budget: int) -> Picture | None:
    """The picture, narrower where it would take more bytes of the page than ``budget``; at worst none."""
    widest = WIDEST
    picture = embed(path, widest=widest)
    while picture is not None and len(picture.source) > budget:
        widest = int(min(widest, picture.width) * 0.75)
        picture = embed(path, widest=widest) if widest >= NARROWEST // 2 else None
    return picture


def embed_previews(previews: Sequence[tuple[int, Path]], budget: int) -> tuple[list[Picture], list[str]]:
    """Previews spread evenly over the run, first and last among them, that fit into the budget.

    Args:
        previews: step and file, rising.
        budget: bytes in the page.

    Returns:
        The pictures, and a sentence for each file that is no image.
    """
    if not previews:
        return [], []
    widest, size = _width_and_size(previews, budget)
    chosen = spread_out(previews, max(min(MOST, budget // size), 1))
    pictures = {path: embed(path, step, widest) for step, path in chosen}
    damaged = [
        f"{path.name} cannot be read as an image." for path, picture in pictures.items() if picture is None
    ]
    good = [picture for picture in pictures.values() if picture is not None]
    while sum(map(_size, good)) > budget and good:
        good = spread_out(good, len(good) - 1)
    return good, damaged


def _width_and_size(previews: Sequence[tuple[int, Path]], budget: int) -> tuple[int, int]:
    """Width at which the wanted number fits, and the mean bytes of three samples at that width."""
    samples = [path for _, path in spread_out(previews, 3)]
    widest = WIDEST
    while True:
        size = sum(_size(embed(path, widest=widest)) for path in samples) // len(samples) + 1
        if size * min(WANTED, len(previews)) <= budget or widest <= NARROWEST:
            return widest, size
        widest = max(int(widest * 0.8), NARROWEST)


def _size(picture: Picture | None) -> int:
    return len(picture.source) if picture is not None else 1
