"""Images that are there without a download: photographs from scikit-image, digits from scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from freqmask.data.cache import hash_of
from freqmask.data.pixels import ArrayPicture, Picture
from freqmask.data.source import Source
from freqmask.errors import UserError, nearest

# The color photographs inside scikit-image's wheel; its other images would be fetched from the network. The
# right eye of the motorcycle pair is left out, being nearly the left one.
PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)


@cache
def _photograph(name: str) -> Image.Image:
    """One decoded photograph; all eight take 13 MB in each process that reads them."""
    import skimage

    with Image.open(Path(skimage.__file__).parent / "data" / name, formats=["PNG", "JPEG"]) as picture:
        return picture.convert("RGB")


class BuiltinPhotos(Source):
    """Square cut-outs of eight photographs: always the same ones for the same seed.

    A cut-out shows a window of ``size`` to ``2 size`` pixels, reduced to ``size`` with an antialiased bicubic
    filter, so that the small set has more than one scale. Photographs take turns.
    """

    kind = "built-in photographs"

    def __init__(self, count: int = 2048, size: int = 128, seed: int = 0) -> None:
        self.count, self.size, self.seed = count, size, seed
        self.notes = [
            f"{count:,} cut-outs of {len(PHOTOGRAPHS)} photographs that come with scikit-image: enough to see that "
            "training works, too few to learn a useful backbone from."
        ]
        self.windows = np.random.default_rng(seed).random((count, 3), dtype=np.float32)

    def __len__(self) -> int:
        return self.count

    def open(self, index: int) -> Picture:
        side, top, left = self.windows[index].tolist()
        window = self._window(index, side, top, left)
        if not np.ptp(np.asarray(window), axis=(0, 1)).any():  # the black round the retina: take its middle
            window = self._window(index, side, 0.5, 0.5)
        return ArrayPicture(np.asarray(window))

    def _window(self, index: int, side_draw: float, top_draw: float, left_draw: float) -> Image.Image:
        photograph = _photograph(self._file(index))
        width, height = photograph.size
        side = min(int(self.size * 2**side_draw), width, height)
        top, left = int(top_draw * (height - side + 1)), int(left_draw * (width - side + 1))
        box = (left, top, left + side, top + side)
        return photograph.resize((self.size, self.size), Image.Resampling.BICUBIC, box)

    def _file(self, index: int) -> str:
        return PHOTOGRAPHS[index % len(PHOTOGRAPHS)]

    def name(self, index: int) -> str:
        return f"{Path(self._file(index)).stem}-{index:04d}"

    def group(self, index: int) -> str:
        return Path(self._file(index)).stem

    def fingerprint(self) -> str:
        return hash_of(f"photos {self.count} {self.size} {self.seed}")


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 8, 8) of float 0 to 16 and labels (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


class BuiltinDigits(Source):
    """1,797 handwritten digits of 8×8 pixels with labels, enlarged with a bicubic filter to ``size`` pixels.

    Frequencies beyond 4 cycles a side are empty.
    """

    kind = "built-in digits"

    def __init__(self, size: int = 32) -> None:
        self.size = size
        self.notes = [f"Digits of 8×8 pixels enlarged to {size}×{size}: their higher frequencies are empty."]
        self.class_names = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(_digits()[1])

    def open(self, index: int) -> Picture:
        eight = np.rint(_digits()[0][index] * (255 / 16)).astype(np.uint8)
        return ArrayPicture(
            np.asarray(Image.fromarray(eight).resize((self.size,) * 2, Image.Resampling.BICUBIC))
        )

    def label(self, index: int) -> int:
        return int(_digits()[1][index])

    def name(self, index: int) -> str:
        return f"digit-{index:04d}"

    def fingerprint(self) -> str:
        return hash_of(f"digits {self.size}")


BUILTINS: dict[str, Callable[[], Source]] = {"photos": BuiltinPhotos, "digits": BuiltinDigits}


def open_builtin(text: str) -> Source:
    """The set that ``builtin:NAME`` names; a UserError where there is none."""
    name = text.removeprefix("builtin:")
    if name not in BUILTINS:
        hint = nearest(text, [f"builtin:{known}" for known in BUILTINS])
        raise UserError(f"DATA ({text}) is no built-in set; {hint}")
    return BUILTINS[name]()
