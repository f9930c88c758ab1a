"""What every room takes for granted of images: numbers in [0, 1], and the field's constants about them."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601


def as_float(images: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """uint8 becomes float32 in [0, 1] on the device it is on; floats pass."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def psnr(image: Float[Tensor, "*shape"], target: Float[Tensor, "*shape"]) -> float:
    """Peak signal-to-noise ratio in dB of an image, clipped to [0, 1], against a target."""
    error = image.detach().float().clamp(0, 1) - target.detach().float()
    return decibel(error.square().mean().item())


def decibel(mean_squared_error: float) -> float:
    """PSNR against a peak of 1; infinite below 1e-11, which is float32's own rounding."""
    return math.inf if mean_squared_error < 1e-11 else -10 * math.log10(mean_squared_error)
