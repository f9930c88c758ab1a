"""The common corruptions of images: 15, and 4 more, in five severities each (arXiv 1903.12261).

Written anew on numpy, scipy, scikit-image and torch. The constants are facts from Hendrycks and Dietterich,
"Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", as their programs that made
ImageNet-C, Tiny-ImageNet-C and CIFAR-10-C hold them. What departs from those programs is listed in docs/robustness.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from PIL import Image as PillowImage
from torch import Tensor

from freqmask.data.cache import hash_of
from freqmask.data.loader import Item, Sample, TrainDataset
from freqmask.errors import UserError, nearest
from freqmask.evaluation import corruption_functions
from freqmask.evaluation.eval_model import EvalModel
from freqmask.evaluation.features import ImageChange
from freqmask.evaluation.labelled import LabelledData
from freqmask.rng import identity_of, sample_key
from freqmask.spectrum import as_float
from freqmask.training.files import save_figure

FAMILIES = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}
EXTRA = FAMILIES["extra"]
CORRUPTIONS = tuple(name for family in FAMILIES.values() for name in family)
COMMON = tuple(name for name in CORRUPTIONS if name not in EXTRA)
SEVERITIES = (1, 2, 3, 4, 5)
AUTO = "auto"
_LAYOUT = 2  # raised when the same settings would give other images
# Which of the numbers that a corruption takes are lengths in pixels, by their place.
LENGTHS: dict[str, tuple[int, ...]] = {
    "gaussian_blur": (0,),
    "defocus_blur": (0, 1),
    "glass_blur": (0, 1),
    "motion_blur": (0, 1),
    "snow": (2, 4, 5),
    "frost": (2,),
    "elastic_transform": (0, 1, 2),
    "spatter": (2, 4),  # of mud; of water the last is how strongly it shines
}
Strength = tuple[float, ...]
Points = dict[tuple[str, int], float]  # (corruption, severity) -> accuracy
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Published:
    """The constants of one data set."""

    title: str  # what the data set is called
    side: int  # of its images in pixels
    table: Mapping[str, Sequence[Strength]]  # corruption -> what its function takes, by severity from 1 to 5


@dataclass(frozen=True)
class Strengths:
    """Constants for images of one size."""

    published: str  # the data set whose constants they are
    stretch: float  # what lengths in pixels are multiplied by

    def of(self, corruption: str, severity: int) -> Strength:
        """What the function of a corruption takes in a severity from 1 to 5."""
        values = PUBLISHED[self.published].table[corruption][severity - 1]
        lengths = LENGTHS.get(corruption, ())
        if corruption == "spatter" and not values[5]:
            lengths = (2,)
        return tuple(value * self.stretch if k in lengths else value for k, value in enumerate(values))

    def describe(self) -> str:
        """For the user and the records."""
        title = PUBLISHED[self.published].title
        return f"{title}'s" if self.stretch == 1 else f"{title}'s, lengths x {self.stretch:.3g}"


def strengths_for(side: int, published: str = AUTO) -> Strengths:
    """The constants for images of a size.

    Those of the data set whose images are nearest in size, as a ratio: up to 45 pixels CIFAR-10-C's, up to
    119 Tiny-ImageNet-C's, above ImageNet-C's. Lengths in pixels (radii, widths, shifts) are scaled by the
    side over that of the data set, which is our rule; amplitudes, shares and qualities stay. At 32, 64 and
    224 pixels everything is as published.

    >>> strengths_for(32).describe(), strengths_for(128).describe()
    ("CIFAR-10-C's", "ImageNet-C's, lengths x 0.571")
    """
    if published == AUTO:
        published = min(PUBLISHED, key=lambda name: abs(math.log(side / PUBLISHED[name].side)))
    return Strengths(published, side / PUBLISHED[published].side)


# ImageNet-C adds photographs of frozen panes, which are not ours to ship (`--frost FOLDER` takes them). What stands in
# for them is drawn: needles of ice in patches of one direction each, with the brightness, the tint, the contrast and
# the falling spectrum of the photographs.
Picture = Float[np.ndarray, "height width 3"]

# Red, green and blue on average, and the standard deviation: as measured on the authors' five photographs.
_PANES = (
    ((0.31, 0.58, 0.65), 0.07),
    ((0.79, 0.80, 0.84), 0.09),
    ((0.79, 0.80, 0.84), 0.09),
    ((0.54, 0.60, 0.65), 0.11),
    ((0.44, 0.48, 0.53), 0.17),
)
_PANE = (360, 540)  # pixels, about the size of the photographs
_DIRECTIONS = 9
_SUFFIXES = (".png", ".jpg", ".jpeg")


@lru_cache(maxsize=4)
def frost_pictures(folder: str | None, scale: float, least: int) -> tuple[Picture, ...]:
    """Pictures of frost in [0, 1] from a folder of photographs (PNG, JPEG), or drawn ones, at a scale of their size.

    Reducing takes single pixels, as the published program does, so that frost stays sharp; the shorter side has at
    least ``least`` pixels, whatever the scale.

    Raises:
        UserError: the folder holds no pictures.
    """
    originals = _drawn_panes() if folder is None else _photographs(Path(folder))
    return tuple(_scaled(picture, scale, least) for picture in originals)


def check_frost(folder: str | None) -> None:
    """Raises a UserError for a folder without photographs."""
    if folder is not None:
        _files(Path(folder))


def _files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise UserError(
            f"frost ({folder}) must be a folder of photographs of frost (PNG or JPEG), such as frost1.png to "
            "frost6.jpg of ImageNet-C's authors; leave it out for drawn frost"
        )
    return files


def _photographs(folder: Path) -> list[Picture]:
    pictures = []
    for file in _files(folder):
        try:
            with PillowImage.open(file, formats=["PNG", "JPEG"]) as opened:
                pictures.append(np.asarray(opened.convert("RGB"), np.float32) / 255)
        except OSError as error:
            raise UserError(f"frost ({file}) cannot be read as an image; take it away") from error
    return pictures


def _scaled(picture: Picture, scale: float, least: int) -> Picture:
    scale = max(scale, least / min(picture.shape[:2]))
    if scale == 1:
        return picture
    size = tuple(max(least, round(side * scale)) for side in picture.shape[:2])
    planes = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))[None]
    small = F.interpolate(planes, size=size, mode="bilinear", align_corners=False)
    return np.ascontiguousarray(small[0].numpy().transpose(1, 2, 0))


@lru_cache(maxsize=1)
def _drawn_panes() -> list[Picture]:
    """The drawn pictures, the same everywhere."""
    panes = []
    for number, (tint, contrast) in enumerate(_PANES):
        ice = _needles(np.random.Generator(np.random.Philox(key=number)))
        panes.append(np.clip(np.array(tint, np.float32) + contrast * ice[..., None], 0, 1).astype(np.float32))
    return panes


def _needles(random: np.random.Generator) -> Float[np.ndarray, "height width"]:
    """A drawn pane of mean 0 and deviation 1: in every patch needles of another direction, and uneven light."""
    height, width = _PANE
    down, right = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency, angle = np.hypot(down, right), np.arctan2(down, right)
    ice, total = np.zeros(_PANE), np.zeros(_PANE)
    for number in range(_DIRECTIONS):
        off = (angle - np.pi * number / _DIRECTIONS + np.pi / 2) % np.pi - np.pi / 2
        along = np.exp(-0.5 * (off / 0.13) ** 2) * _falling(frequency, 1.1, 0.015)
        needles = np.abs(_filtered(random, along))
        patch = np.exp(3.5 * _filtered(random, _falling(frequency, 2.0, 0.01)))
        ice, total = ice + patch * needles, total + patch
    light = _filtered(random, _falling(frequency, 2.0, 0.003))
    return _standard(_standard(ice / total) + 0.5 * light)


def _falling(frequency: np.ndarray, power: float, flat_below: float) -> np.ndarray:
    return np.where(frequency > 0, np.maximum(frequency, flat_below) ** -power, 0)


def _filtered(random: np.random.Generator, amplitudes: np.ndarray) -> np.ndarray:
    return _standard(np.fft.irfft2(np.fft.rfft2(random.standard_normal(_PANE)) * amplitudes, _PANE))


def _standard(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / values.std()


@dataclass(frozen=True)
class Corruption(ImageChange):
    """What is done to every image; a function of the image, its key and these settings."""

    name: str  # one of `CORRUPTIONS`
    severity: int  # 1 to 5
    strengths: Strengths  # the constants for the images' size
    frost: str | None = None  # folder of photographs of frost, or None

    def describe(self) -> str:
        """Tells apart all that changes the images."""
        frost = ""
        if self.name == "frost" and self.frost:  # what the photographs hold, wherever they lie
            frost = f" frost {hash_of(*(file.read_bytes() for file in _files(Path(self.frost))))}"
        return (
            f"{self.name} {self.severity} of {self.strengths.published} x {self.strengths.stretch:.6g}"
            f"{frost} v{_LAYOUT}"
        )

    def __call__(
        self, image: Shaped[Tensor, "channel height width"], key: int
    ) -> Shaped[Tensor, "channel height width"]:
        """The corrupted image, of the same type: uint8, or float in [0, 1].

        The same key gives the same result, another severity draws anew. 8-bit values are cut off, not rounded, as in
        the published images.
        """
        whole = image.dtype == torch.uint8
        values = np.ascontiguousarray(image.numpy().transpose(1, 2, 0).astype(np.float32))
        function: Any = getattr(corruption_functions, self.name)
        if self.name == "frost":
            function = partial(function, pictures=self.frost_pictures(max(image.shape[1:])))
        strength = self.strengths.of(self.name, self.severity)
        own = sample_key(key, self.severity, identity_of(self.name))
        random = np.random.Generator(np.random.Philox(key=own % (1 << 64)))
        corrupted = np.clip(function(values / 255 if whole else values, random, *strength), 0, 1)
        # float32 puts 254 / 255 x 255 a hair below 254
        corrupted = np.floor(corrupted * 255 + 1e-3) if whole else corrupted
        planes = corrupted.astype(image.numpy().dtype).transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(planes))

    def in_loader(self, dataset: TrainDataset) -> CorruptedDataset:
        if self.name == "frost":  # pictures get ready once, before a loader's workers fork, as they are now
            frost_pictures.cache_clear()
            self.frost_pictures(max(dataset.geometries[0].size))
        return CorruptedDataset(**vars(dataset), corruption=self)

    def frost_pictures(self, side: int) -> tuple[Picture, ...]:
        """Those for images of a longer side."""
        return frost_pictures(self.frost, self.strengths.of(self.name, self.severity)[2], side)


@dataclass
class CorruptedDataset(TrainDataset):
    """A dataset whose images are corrupted in the loader's workers, after they are cut to the model's size.

    The draws follow from the identity of the image alone: every model of one size sees the same images.
    """

    corruption: Corruption = field(kw_only=True)

    def __getitem__(self, item: Item) -> Sample:
        sample = super().__getitem__(item)
        key = sample_key(0, 0, self.source.identity(sample.index))
        sample.views = [self.corruption(view, key) for view in sample.views]
        return sample


def choose_corruptions(words: Sequence[str]) -> list[str]:
    """Corruptions by names, families, ``common`` (15), ``all`` (19) or ``none``.

    Raises:
        UserError: a word is none of these.

    >>> choose_corruptions(["digital", "fog"])
    ['fog', 'contrast', 'elastic_transform', 'pixelate', 'jpeg_compression']
    """
    groups: dict[str, Sequence[str]] = {
        "common": COMMON,
        "all": CORRUPTIONS,
        "none": (),
        **FAMILIES,
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


def draw_sheet(
    path: Path,
    model: EvalModel,
    data: LabelledData,
    corruptions: Sequence[str],
    severities: Sequence[int],
    constants: str,
    frost: str | None,
) -> None:
    """The first test image as the model sees it, clean and in every corruption and severity."""
    from matplotlib.figure import Figure

    sample = model.dataset(data.source)[(0, 0, int(data.tested[0]))]
    image, key = sample.views[0], sample_key(0, 0, data.source.identity(sample.index))
    strengths = strengths_for(min(image.shape[1:]), constants)
    columns = [0, *severities]
    figure = Figure(figsize=(1.35 * len(columns) + 1.3, 1.35 * len(corruptions) + 0.3), dpi=100)
    axes = figure.subplots(len(corruptions), len(columns), squeeze=False)
    left, top = 1.3 / figure.get_figwidth(), 1 - 0.3 / figure.get_figheight()
    figure.subplots_adjust(left=left, right=1, bottom=0, top=top, wspace=0.03, hspace=0.03)
    for row, name in zip(axes, corruptions, strict=True):
        title = name.replace("_", " ")
        row[0].text(-0.05, 0.5, title, ha="right", va="center", fontsize=9, transform=row[0].transAxes)
        for axis, severity in zip(row, columns, strict=True):
            shown = Corruption(name, severity, strengths, frost)(image, key) if severity else image
            values = as_float(shown).numpy()
            colors = values.transpose(1, 2, 0) if len(values) == 3 else values.mean(axis=0)
            axis.imshow(colors, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_axis_off()
    for axis, severity in zip(axes[0], columns, strict=True):
        axis.set_title(str(severity) if severity else "clean", fontsize=9)
    save_figure(figure, path)


def mce_applies(classes: Sequence[str], side: int, measured: Points) -> bool:
    """Whether AlexNet's errors may be divided by: ImageNet's 1,000 classes, 224 pixels, everything measured."""
    from timm.data.imagenet_info import ImageNetInfo

    everything = {(name, severity) for name in COMMON for severity in SEVERITIES}
    if len(classes) != IMAGENET_CLASSES or side != 224 or not everything <= set(measured):
        return False
    return set(classes) == set(ImageNetInfo("imagenet-1k").label_names())


def corruption_errors(measured: Points) -> dict[str, float]:
    """CE of each of the 15 (arXiv 1903.12261, section 4.2): the sum of the errors over severities, over AlexNet's.

    ``measured`` is (corruption, severity) -> accuracy in [0, 1], all 15 in all 5.
    """
    return {
        name: sum(1 - measured[name, severity] for severity in SEVERITIES) / sum(ALEXNET[name])
        for name in COMMON
    }


def mean_corruption_error(measured: Points) -> float:
    """The mean of the 15 corruption errors, mCE; that of AlexNet is 1.

    >>> alexnet = {(name, severity): 1 - ALEXNET[name][severity - 1] for name in COMMON for severity in SEVERITIES}
    >>> round(mean_corruption_error(alexnet), 6)
    1.0
    """
    return float(np.mean(list(corruption_errors(measured).values())))


def _parse(cell: str) -> Strength:
    """The numbers of one severity; 1.1:0.05 stands for 1, 1.05, 1.1."""
    if ":" not in cell:
        return tuple(float(number) for number in cell.split())
    last, step = (float(number) for number in cell.split(":"))
    return tuple(round(1 + step * number, 4) for number in range(round((last - 1) / step) + 1))


def _read(dataset: str) -> dict[str, tuple[Strength, ...]]:
    lines = (line.split(maxsplit=2) for line in _TABLE.strip().splitlines() if not line.startswith("#"))
    return {name: tuple(map(_parse, cells.split("|"))) for name, of, cells in lines if of == dataset}


_TABLE = """
# standard deviation in [0, 1]
gaussian_noise    cifar-10-c      0.04 | 0.06 | 0.08 | 0.09 | 0.1
gaussian_noise    tiny-imagenet-c 0.04 | 0.08 | 0.12 | 0.15 | 0.18
gaussian_noise    imagenet-c      0.08 | 0.12 | 0.18 | 0.26 | 0.38
# photons of a white pixel
shot_noise        cifar-10-c      500 | 250 | 100 | 75 | 50
shot_noise        tiny-imagenet-c 250 | 100 | 50 | 30 | 15
shot_noise        imagenet-c      60 | 25 | 12 | 5 | 3
# share of the values that become 0 or 1
impulse_noise     cifar-10-c      0.01 | 0.02 | 0.03 | 0.05 | 0.07
impulse_noise     tiny-imagenet-c 0.01 | 0.02 | 0.05 | 0.08 | 0.14
impulse_noise     imagenet-c      0.03 | 0.06 | 0.09 | 0.17 | 0.27
# standard deviation over the value
speckle_noise     cifar-10-c      0.06 | 0.1 | 0.12 | 0.16 | 0.2
speckle_noise     tiny-imagenet-c 0.15 | 0.2 | 0.25 | 0.3 | 0.35
speckle_noise     imagenet-c      0.15 | 0.2 | 0.35 | 0.45 | 0.6
# standard deviation
gaussian_blur     cifar-10-c      0.4 | 0.6 | 0.7 | 0.8 | 1
gaussian_blur     tiny-imagenet-c 0.5 | 0.75 | 1 | 1.25 | 1.5
gaussian_blur     imagenet-c      1 | 2 | 3 | 4 | 6
# radius of the disc, standard deviation of its edge
defocus_blur      cifar-10-c      0.3 0.4 | 0.4 0.5 | 0.5 0.6 | 1 0.2 | 1.5 0.1
defocus_blur      tiny-imagenet-c 0.5 0.6 | 1 0.1 | 1.5 0.1 | 2.5 0.01 | 3 0.1
defocus_blur      imagenet-c      3 0.1 | 4 0.5 | 6 0.5 | 8 0.5 | 10 0.5
# standard deviation, farthest swap, passes
glass_blur        cifar-10-c      0.05 1 1 | 0.25 1 1 | 0.4 1 1 | 0.25 1 2 | 0.4 1 2
glass_blur        tiny-imagenet-c 0.1 1 1 | 0.5 1 1 | 0.6 1 2 | 0.7 2 1 | 0.9 2 2
glass_blur        imagenet-c      0.7 1 2 | 0.9 2 1 | 1 2 3 | 1.1 3 2 | 1.5 4 2
# radius, standard deviation along the way
motion_blur       cifar-10-c      6 1 | 6 1.5 | 6 2 | 8 2 | 9 2.5
motion_blur       tiny-imagenet-c 10 1 | 10 1.5 | 10 2 | 10 2.5 | 12 3
motion_blur       imagenet-c      10 3 | 15 5 | 15 8 | 15 12 | 20 15
# LAST:STEP of the factors that are averaged, from 1 on; a step more than meant in the first, as numpy's arange of the
# program gives
zoom_blur         cifar-10-c      1.06:0.01 | 1.11:0.01 | 1.15:0.01 | 1.2:0.01 | 1.25:0.01
zoom_blur         tiny-imagenet-c 1.06:0.01 | 1.11:0.01 | 1.15:0.01 | 1.2:0.01 | 1.25:0.01
zoom_blur         imagenet-c      1.11:0.01 | 1.15:0.01 | 1.2:0.02 | 1.24:0.02 | 1.3:0.03
# mean and deviation of the layer, size of a flake, threshold, radius and deviation of the fall, share of the image
snow              cifar-10-c      0.1 0.2 1 0.6 8 3 0.95 | 0.1 0.2 1 0.5 10 4 0.9 | 0.15 0.3 1.75 0.55 10 4 0.9 | 0.25 0.3 2.25 0.6 12 6 0.85 | 0.3 0.3 1.25 0.65 14 12 0.8
snow              tiny-imagenet-c 0.1 0.2 1 0.6 8 3 0.8 | 0.1 0.2 1 0.5 10 4 0.8 | 0.15 0.3 1.75 0.55 10 4 0.7 | 0.25 0.3 2.25 0.6 12 6 0.65 | 0.3 0.3 1.25 0.65 14 12 0.6
snow              imagenet-c      0.1 0.3 3 0.5 10 4 0.8 | 0.2 0.3 2 0.5 12 4 0.7 | 0.55 0.3 4 0.9 12 8 0.7 | 0.55 0.3 4.5 0.85 12 8 0.65 | 0.55 0.3 2.5 0.85 12 12 0.55
# share of the image, share of the frost, scale of the photograph
frost             cifar-10-c      1 0.2 0.2 | 1 0.3 0.2 | 0.9 0.4 0.2 | 0.85 0.4 0.2 | 0.75 0.45 0.2
frost             tiny-imagenet-c 1 0.3 0.3 | 0.9 0.4 0.3 | 0.8 0.45 0.3 | 0.75 0.5 0.3 | 0.7 0.55 0.3
frost             imagenet-c      1 0.4 1 | 0.8 0.6 1 | 0.7 0.7 1 | 0.65 0.7 1 | 0.6 0.75 1
# density, by how much finer fog is fainter (see `plasma`)
fog               cifar-10-c      0.2 3 | 0.5 3 | 0.75 2.5 | 1 2 | 1.5 1.75
fog               tiny-imagenet-c 0.4 3 | 0.7 3 | 1 2.5 | 1.5 2 | 2 1.75
fog               imagenet-c      1.5 2 | 2 2 | 2.5 1.7 | 2.5 1.5 | 3 1.4
# added to the value of HSV
brightness        cifar-10-c      0.05 | 0.1 | 0.15 | 0.2 | 0.3
brightness        tiny-imagenet-c 0.1 | 0.2 | 0.3 | 0.4 | 0.5
brightness        imagenet-c      0.1 | 0.2 | 0.3 | 0.4 | 0.5
# what distances from the mean are multiplied by
contrast          cifar-10-c      0.75 | 0.5 | 0.4 | 0.3 | 0.15
contrast          tiny-imagenet-c 0.4 | 0.3 | 0.2 | 0.1 | 0.05
contrast          imagenet-c      0.4 | 0.3 | 0.2 | 0.1 | 0.05
# size and smoothness of the displacement, shift of the corners; 244 is the authors' slip for 224
elastic_transform cifar-10-c      0 0 2.56 | 1.6 6.4 2.24 | 2.56 1.92 1.92 | 3.2 1.28 1.6 | 3.2 0.96 0.96
elastic_transform tiny-imagenet-c 0 0 5.12 | 3.2 19.2 3.84 | 6.4 5.12 3.84 | 6.4 1.92 1.92 | 10.24 1.92 1.28
elastic_transform imagenet-c      488 170.8 24.4 | 488 19.52 48.8 | 12.2 2.44 4.88 | 17.08 2.44 4.88 | 29.28 2.44 4.88
# side of the reduced image over that of the image
pixelate          cifar-10-c      0.95 | 0.9 | 0.85 | 0.75 | 0.65
pixelate          tiny-imagenet-c 0.9 | 0.8 | 0.7 | 0.6 | 0.5
pixelate          imagenet-c      0.6 | 0.5 | 0.4 | 0.3 | 0.25
# quality
jpeg_compression  cifar-10-c      80 | 65 | 58 | 50 | 40
jpeg_compression  tiny-imagenet-c 65 | 58 | 50 | 40 | 25
jpeg_compression  imagenet-c      25 | 18 | 15 | 10 | 7
# mean, deviation and smoothness of the layer, threshold, strength of water or smoothness of mud, 1 for mud
spatter           cifar-10-c      0.62 0.1 0.7 0.7 0.5 0 | 0.65 0.1 0.8 0.7 0.5 0 | 0.65 0.3 1 0.69 0.5 0 | 0.65 0.1 0.7 0.69 0.6 1 | 0.65 0.1 0.5 0.68 0.6 1
spatter           tiny-imagenet-c 0.62 0.1 0.7 0.7 0.6 0 | 0.65 0.1 0.8 0.7 0.6 0 | 0.65 0.3 1 0.69 0.6 0 | 0.65 0.1 0.7 0.68 0.6 1 | 0.65 0.1 0.5 0.67 0.6 1
spatter           imagenet-c      0.65 0.3 4 0.69 0.6 0 | 0.65 0.3 3 0.68 0.6 0 | 0.65 0.3 2 0.68 0.5 0 | 0.65 0.3 1 0.65 1.5 1 | 0.67 0.4 1 0.65 1.5 1
# factor and summand of the saturation of HSV
saturate          cifar-10-c      0.3 0 | 0.1 0 | 1.5 0 | 2 0.1 | 2.5 0.2
saturate          tiny-imagenet-c 0.3 0 | 0.1 0 | 2 0 | 5 0.1 | 30 0.2
saturate          imagenet-c      0.3 0 | 0.1 0 | 2 0 | 5 0.1 | 20 0.2
"""  # noqa: E501

PUBLISHED = {
    "cifar-10-c": Published("CIFAR-10-C", 32, _read("cifar-10-c")),
    "tiny-imagenet-c": Published("Tiny-ImageNet-C", 64, _read("tiny-imagenet-c")),
    "imagenet-c": Published("ImageNet-C", 224, _read("imagenet-c")),
}

# AlexNet's error on ImageNet-C by severity, as published; sums over severities are what mCE divides by.
ALEXNET: dict[str, Sequence[float]] = {
    "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "impulse_noise": (0.78374, 0.89808, 0.94870, 0.98720, 0.99548),
    "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
    "motion_blur": (0.58430, 0.70048, 0.82108, 0.89750, 0.92638),
    "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
    "snow": (0.71726, 0.88392, 0.86468, 0.91870, 0.94952),
    "frost": (0.61390, 0.79734, 0.88790, 0.89942, 0.93430),
    "fog": (0.67474, 0.76050, 0.84378, 0.87260, 0.94500),
    "brightness": (0.45140, 0.48502, 0.54048, 0.62166, 0.72440),
    "contrast": (0.64548, 0.76150, 0.88874, 0.97760, 0.99270),
    "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    "pixelate": (0.52218, 0.54620, 0.73728, 0.87092, 0.91262),
    "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
}
