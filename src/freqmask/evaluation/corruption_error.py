"""mCE: errors on ImageNet-C over those of AlexNet (arXiv 1903.12261, section 4.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from freqmask.evaluation.corruptions import COMMON, SEVERITIES

IMAGENET_CLASSES = 1000

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


def applies(classes: Sequence[str], side: int, measured: Mapping[tuple[str, int], float]) -> bool:
    """Whether AlexNet's errors may be divided by: ImageNet's 1,000 classes, 224 pixels, everything measured.

    Args:
        classes: names of the classes that were answered with.
        side: of the images that were corrupted, in pixels.
        measured: (corruption, severity) -> accuracy.
    """
    from timm.data.imagenet_info import ImageNetInfo

    everything = {(name, severity) for name in COMMON for severity in SEVERITIES}
    if len(classes) != IMAGENET_CLASSES or side != 224 or not everything <= set(measured):
        return False
    return set(classes) == set(ImageNetInfo("imagenet-1k").label_names())


def corruption_errors(measured: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """CE of each of the 15: the sum of the errors over severities, over that of AlexNet. mCE is the mean.

    Args:
        measured: (corruption, severity) -> accuracy in [0, 1]; all 15 in all 5.
    """
    return {
        name: sum(1 - measured[name, severity] for severity in SEVERITIES) / sum(ALEXNET[name])
        for name in COMMON
    }


def mean_corruption_error(measured: Mapping[tuple[str, int], float]) -> float:
    """The mean of the 15 corruption errors, mCE; that of AlexNet is 1.

    >>> alexnet = {(name, severity): 1 - ALEXNET[name][severity - 1] for name in COMMON for severity in SEVERITIES}
    >>> round(mean_corruption_error(alexnet), 6)
    1.0
    """
    return float(np.mean(list(corruption_errors(measured).values())))
