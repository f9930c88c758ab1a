"""The common corruptions of images: 15, and 4 more, in five severities each (arXiv 1903.12261).

Written anew on numpy, scipy, scikit-image and torch; the constants are the published ones. What departs from
the authors' programs is listed in docs/evaluating.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from freqmask.errors import UserError, nearest
from freqmask.evaluation import corruption_functions as functions
from freqmask.evaluation import weather
from freqmask.evaluation.corruption_constants import SEVERITIES, Strengths
from freqmask.rng import identity_of, sample_key

FAMILIES: dict[str, dict[str, Callable[..., functions.Image]]] = {
    "noise": {
        "gaussian_noise": functions.gaussian_noise,
        "shot_noise": functions.shot_noise,
        "impulse_noise": functions.impulse_noise,
    },
    "blur": {
        "defocus_blur": functions.defocus_blur,
        "glass_blur": functions.glass_blur,
        "motion_blur": functions.motion_blur,
        "zoom_blur": functions.zoom_blur,
    },
    "weather": {
        "snow": weather.snow,
        "frost": weather.frost,
        "fog": weather.fog,
        "brightness": functions.brightness,
    },
    "digital": {
        "contrast": functions.contrast,
        "elastic_transform": functions.elastic_transform,
        "pixelate": functions.pixelate,
        "jpeg_compression": functions.jpeg_compression,
    },
    "extra": {
        "speckle_noise": functions.speckle_noise,
        "gaussian_blur": functions.gaussian_blur,
        "spatter": weather.spatter,
        "saturate": functions.saturate,
    },
}
CORRUPTIONS = {name: function for family in FAMILIES.values() for name, function in family.items()}
EXTRA = tuple(FAMILIES["extra"])
COMMON = tuple(name for name in CORRUPTIONS if name not in EXTRA)
_LAYOUT = 1  # raised when the same settings would give other images


@dataclass(frozen=True)
class Corruption:
    """What is done to every image; a function of the image, its key and these settings.

    Attributes:
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        strengths: the constants for the images' size.
        frost: folder of photographs of frost, or None.
    """

    name: str
    severity: int
    strengths: Strengths
    frost: str | None = None

    def describe(self) -> str:
        """Tells apart all that changes the images."""
        frost = f" frost {self.frost}" if self.name == "frost" and self.frost else ""
        return (
            f"{self.name} {self.severity} of {self.strengths.published} x {self.strengths.stretch:.6g}"
            f"{frost} v{_LAYOUT}"
        )

    def __call__(
        self, image: Shaped[Tensor, "channel height width"], key: int
    ) -> Shaped[Tensor, "channel height width"]:
        """The corrupted image.

        Args:
            image: uint8, or float in [0, 1].
            key: of the image; the same key gives the same result, another severity draws anew.

        Returns:
            Of the same type. 8-bit values are cut off, not rounded, as in the published images.
        """
        whole = image.dtype == torch.uint8
        values = np.ascontiguousarray(image.numpy().transpose(1, 2, 0).astype(np.float32))
        function: Any = CORRUPTIONS[self.name]
        if self.name == "frost":
            function = partial(function, pictures=self.frost)
        strength = self.strengths.of(self.name, self.severity)
        corrupted = np.clip(function(values / 255 if whole else values, self._random(key), *strength), 0, 1)
        # float32 puts 254 / 255 x 255 a hair below 254
        corrupted = np.floor(corrupted * 255 + 1e-3).astype(np.uint8) if whole else corrupted
        return torch.from_numpy(
            np.ascontiguousarray(corrupted.astype(image.numpy().dtype).transpose(2, 0, 1))
        )

    def warm(self, size: tuple[int, int]) -> None:
        """Get pictures of frost ready for images of a size: once, before a loader's workers fork."""
        if self.name == "frost":
            weather.frost_pictures(self.frost, self.strengths.of(self.name, self.severity)[2], max(size))

    def _random(self, key: int) -> np.random.Generator:
        own = sample_key(key, self.severity, identity_of(self.name))
        return np.random.Generator(np.random.Philox(key=own % (1 << 64)))


def choose_corruptions(words: Sequence[str]) -> list[str]:
    """Names of corruptions from what a user typed.

    Args:
        words: names, families (noise, blur, weather, digital, extra), ``common`` (15), ``all`` (19), ``none``.

    Raises:
        UserError: a word is none of these.

    >>> choose_corruptions(["digital", "fog"])
    ['fog', 'contrast', 'elastic_transform', 'pixelate', 'jpeg_compression']
    """
    groups: dict[str, Sequence[str]] = {
        "common": COMMON,
        "all": tuple(CORRUPTIONS),
        "none": (),
        **{family: tuple(members) for family, members in FAMILIES.items()},
    }
    chosen: set[str] = set()
    for word in words:
        name = word.replace("-", "_")
        if name not in groups and name not in CORRUPTIONS:
            raise UserError(
                f"corruptions ({word}) must be common, all, none, a family ({', '.join(FAMILIES)}) or names; "
                f"{nearest(name, [*groups, *CORRUPTIONS])}"
            )
        chosen.update(groups.get(name, (name,)))
    return [name for name in CORRUPTIONS if name in chosen]


def check_severities(severities: Sequence[int]) -> list[int]:
    """Severities in order, each once.

    Raises:
        UserError: one is not 1 to 5.
    """
    wrong = [severity for severity in severities if severity not in SEVERITIES]
    if wrong or not severities:
        raise UserError(f"severities ({' '.join(map(str, severities))}) must be some of 1 2 3 4 5")
    return sorted(set(severities))
