"""One image on its way to a tensor: channels as asked, missing values filled, empty images refused."""

from __future__ import annotations

import numpy as np
from jaxtyping import Shaped

from freqmask.errors import BadImage

MOSTLY_MISSING = 0.9  # an image with less than a tenth of its pixels measured teaches how gaps are filled
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601, as in the filters


def check_channels(found: int, wanted: int, convert: bool = True) -> None:
    """Refuse an image whose channels cannot become the wanted ones.

    Args:
        found: the image's channels.
        wanted: the channels of the run.
        convert: False refuses every image that has not just the wanted ones.

    Raises:
        BadImage: with the counts and the rule.
    """
    if found == wanted:
        return
    if not convert:
        raise BadImage(f"it has {found} channels, the other images have {wanted}")
    if (found, wanted) not in {(1, 3), (3, 1), (4, 3), (4, 1)}:
        raise BadImage(f"it has {found} channels, which cannot be made into {wanted}")


def convert_channels(
    image: Shaped[np.ndarray, "found height width"], wanted: int
) -> Shaped[np.ndarray, "wanted height width"]:
    """Grey to colour by repetition, colour to grey by luma (ITU-R 601), four channels to three without alpha.

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
    grey = np.tensordot(_LUMA, image[:3].astype(np.float32), axes=1)[None]
    return grey.astype(image.dtype) if image.dtype.kind == "f" else np.rint(grey).astype(image.dtype)


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
