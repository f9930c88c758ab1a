"""One image on its way to a tensor: its colors, channels as asked, missing values filled, empty images refused."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped

from freqmask.data.pictures import kept_type
from freqmask.errors import BadImage
from freqmask.images import LUMA

MOSTLY_MISSING = 0.9  # an image with less than a tenth of its pixels measured teaches how gaps are filled
_LUMA = np.array(LUMA, dtype=np.float32)


@dataclass(frozen=True)
class Color:
    """What the samples of a pixel mean in a file; one step makes gray, RGB or bands of them, for every format.

    Attributes:
        model: ``gray``, ``rgb``, ``cmyk``, ``palette`` or ``bands``.
        samples: samples of a pixel, alpha and all.
        top: the largest value of a sample, which is white; None where the type has none (signed numbers).
        negative: True where 0 is white (MINISWHITE).
        alpha: ``none``; ``straight``, to be laid over white; ``premultiplied``, where colors have been
            multiplied by it already; ``mask``, which marks where bands were measured and is left out.
        palette: 8-bit colors by number (3, count).
        stretch: True for samples of fewer than 8 bits, which become 0 to 255 as in a viewer.
    """

    model: str
    samples: int
    top: float | None = None
    negative: bool = False
    alpha: str = "none"
    palette: Shaped[np.ndarray, "3 count"] | None = None
    stretch: bool = False

    def __post_init__(self) -> None:
        if self.top is None and (self.negative or self.model == "cmyk" or self.alpha not in ("none", "mask")):
            raise BadImage("its samples are signed, so that white or full alpha has no number")
        if self.alpha == "premultiplied" and (self.negative or self.model == "cmyk"):
            raise BadImage("it multiplies inks by alpha, which no reader agrees on; store it as RGB")

    @property
    def channels(self) -> int:
        """The channels of `apply`'s result."""
        if self.model == "bands":
            return self.samples - (self.alpha == "mask")
        return 1 if self.model == "gray" else 3

    def dtype(self, stored: np.dtype) -> str:
        """The sample type of `apply`'s result, as it is handed on."""
        return "uint8" if self.stretch or self.palette is not None else kept_type(stored)

    def nodata(self, value: float | None) -> float | None:
        """What becomes of the value that stands for "not measured"."""
        if value is None or self.model in ("cmyk", "palette"):
            return None
        value = (self.top or 0) - value if self.negative else value
        return value * 255 / (self.top or 255) if self.stretch else value

    def apply(
        self, samples: Shaped[np.ndarray, "sample height width"]
    ) -> Shaped[np.ndarray, "channel height width"]:
        """Samples as stored to gray, RGB or bands; of the same type, except that palettes and few bits give 8."""
        if self.model == "bands":
            return samples[: self.channels]
        colors, alpha = (samples, None) if self.alpha == "none" else (samples[:-1], samples[-1:])
        if self.palette is not None:
            colors = self.palette[:, colors[0].astype(np.intp)]
        elif colors.dtype.kind == "b":
            colors = colors.astype(np.uint8)
        if self.negative and self.top is not None:
            colors = (np.array(self.top, colors.dtype) - colors).astype(colors.dtype)
        if self.stretch:
            colors = np.rint(colors * (255 / (self.top or 1))).astype(np.uint8)
        white = 255.0 if self.stretch or self.palette is not None else float(self.top or 0)
        if self.model == "cmyk":
            inks, light = colors[:3].astype(np.float64), white - colors[3:].astype(np.float64)
            colors = np.rint(light - np.rint(inks * light / white)).astype(samples.dtype)
        if alpha is None or (alpha == self.top).all():
            return colors
        opacity = np.clip(alpha.astype(np.float64) / float(self.top or 1), 0, 1)
        lit = colors.astype(np.float64)
        mixed = (lit if self.alpha == "premultiplied" else lit * opacity) + white * (1 - opacity)
        if colors.dtype.kind == "f":
            return mixed.astype(colors.dtype)
        return np.rint(np.minimum(mixed, white)).astype(colors.dtype)


def check_channels(found: int, wanted: int, convert: bool = True) -> None:
    """Refuse an image whose channels cannot become the wanted ones.

    Args:
        found: the image's channels.
        wanted: the channels of the run.
        convert: False makes only gray and color into each other, and refuses four bands of which nobody said
            that the fourth is not to be used.

    Raises:
        BadImage: with the counts and the rule.
    """
    if found == wanted or {found, wanted} == {1, 3}:
        return
    if not convert:
        raise BadImage(f"it has {found} channels, the other images have {wanted}")
    if (found, wanted) not in {(1, 3), (3, 1), (4, 3), (4, 1)}:
        raise BadImage(f"it has {found} channels, which cannot be made into {wanted}")


def convert_channels(
    image: Shaped[np.ndarray, "found height width"], wanted: int
) -> Shaped[np.ndarray, "wanted height width"]:
    """Gray to color by repetition, color to gray by luma (ITU-R 601), four channels to three without alpha.

    Args:
        image: any type and range.
        wanted: the channels asked for.

    Returns:
        The image with that many channels, same type and range.

    Raises:
        BadImage: there is no such conversion.
    """
    found = image.shape[0]
    check_channels(found, wanted)
    if found == wanted:
        return image
    if found == 1:
        return np.repeat(image, 3, axis=0)
    if wanted == 3:
        return image[:3]
    gray = np.tensordot(_LUMA, image[:3].astype(np.float32), axes=1)[None]
    return gray.astype(image.dtype) if image.dtype.kind == "f" else np.rint(gray).astype(image.dtype)


def missing_pixels(
    image: Shaped[np.ndarray, "channel height width"], nodata: float | None
) -> Shaped[np.ndarray, "channel height width"] | None:
    """Where nothing was measured: NaN, infinite, or the file's nodata value.

    Args:
        image: the pixels as decoded.
        nodata: the value that stands for "not measured", or None.

    Returns:
        True where a value is missing; None where there cannot be any, which costs nothing to find out.
    """
    missing = ~np.isfinite(image) if image.dtype.kind == "f" else None
    if nodata is None or np.isnan(nodata):
        return missing
    marked: np.ndarray = image == nodata
    return marked if missing is None else missing | marked


def is_empty(image: Shaped[np.ndarray, "channel height width"], missing: np.ndarray | None) -> str | None:
    """Why an image holds nothing to learn from.

    Args:
        image: the pixels as decoded.
        missing: what :func:`missing_pixels` said of them.

    Returns:
        The reason: more than nine tenths missing, or one constant value; None for an image with content.
    """
    if missing is not None and missing.any():
        share = float(missing.mean())
        return f"{share:.0%} of its values are missing (NaN or nodata)" if share > MOSTLY_MISSING else None
    first = image[:, :1, :1]
    # A coarse grid settles it for nearly every image at a hundredth of the cost.
    if (image[:, ::8, ::8] == first).all() and (image == first).all():
        return "every pixel has the same value"
    return None


def fill_missing(
    image: Shaped[np.ndarray, "channel height width"], missing: np.ndarray | None
) -> Shaped[np.ndarray, "channel height width"]:
    """Put the channel's mean where nothing was measured; a channel without any value gets the image's mean.

    Args:
        image: the pixels as decoded.
        missing: what :func:`missing_pixels` said of them; not all of it True.

    Returns:
        The image itself where nothing is missing, else a filled copy of the same type.
    """
    if missing is None or not missing.any():
        return image
    present = np.where(missing, 0, image).astype(np.float64)
    counts = (~missing).sum(axis=(1, 2))
    overall = present.sum() / counts.sum()
    means = np.where(counts > 0, present.sum(axis=(1, 2)) / np.maximum(counts, 1), overall)
    return np.where(missing, means[:, None, None], image).astype(image.dtype)
