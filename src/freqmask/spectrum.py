"""Images in [0, 1], and the Fourier layout that everything shares: half spectra, radii in integers, conjugate pairs.

Spectra are ``rfft2`` halves ``(batch, channel, H, W // 2 + 1)`` with ``norm="ortho"``, not shifted: DC is at
[0, 0], row ``H - k`` is frequency ``-k``. The missing half is the complex conjugate of the stored one; in the
columns 0 and (even W) W/2 both partners are stored. Tables are made for a ``height`` and a ``width`` in pixels, on
a ``device``.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal, ParamSpec, TypeVar

import torch
from jaxtyping import Bool, Complex, Float, Int64, Shaped
from torch import Tensor, nn

from freqmask.errors import UserError

REFERENCE_SIDE = 224  # pixels of the papers' images; their radii and strengths are scaled from here

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
# Without ImageNet's three channels: the middle of the range, and about the contrast of photographs.
PLAIN_MEAN, PLAIN_STD = 0.5, 0.25

Images = Float[Tensor, "batch channel height width"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def constant(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Remembers the tensor that a function of sizes and settings returned, eager and compiled.

    Masks of a size are made once, not once a step, and live on the device: making them anew would copy
    small tables from the host, which waits. A compiled graph takes the result as a constant.

    Args:
        function: pure, of hashable arguments; returns one tensor, which nobody may write to.

    Returns:
        The remembering function.
    """
    remembered = functools.lru_cache(maxsize=256)(function)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def held(*args: _P.args, **kwargs: _P.kwargs) -> tuple[_R]:
        # a mask first made under inference_mode could not be saved for a later backward pass
        with torch.inference_mode(False), torch.no_grad():
            return (remembered(*args, **kwargs),)  # type: ignore[arg-type]

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # the tuple: torch 2.14 names every bare tensor of a constant function alike, after the function, and
        # its compiler then refuses a graph that holds two of them
        return held(*args, **kwargs)[0]

    return call


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _expect_complex_operators() -> None:
    # Inductor leaves FFTs to the library that eager uses, as it should, and warns; this runs only while one
    # of our functions is being traced, so that nobody else's graphs lose the warning
    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")


def image_size(images: Float[Tensor, "*batch height width"]) -> tuple[int, int]:
    """(H, W) as plain numbers, in a graph compiled for changing sizes too.

    Args:
        images: any tensor whose last two axes are H and W.

    Returns:
        Numbers that ``constant`` functions can take; a compiled graph is then for this size alone, as its
        FFT and its masks are.
    """
    if torch.compiler.is_compiling():
        torch._dynamo.mark_static(images, -2)
        torch._dynamo.mark_static(images, -1)
    return images.size(-2), images.size(-1)


def rfft2(
    images: Float[Tensor, "*batch height width"],
) -> Complex[Tensor, "*batch height half_width"]:
    """Half spectrum of real images, ortho-normal, in float32 whatever autocast says.

    Args:
        images: any floating type; float64 gives complex128, everything else complex64 (spectra in half
            precision overflow).

    Returns:
        The ``W // 2 + 1`` non-negative columns, DC at [0, 0].
    """
    if torch.compiler.is_compiling():
        _expect_complex_operators()
    return torch.fft.rfft2(single_or_double(images), norm="ortho")


def irfft2(
    spectrum: Complex[Tensor, "*batch height half_width"], size: tuple[int, int]
) -> Float[Tensor, "*batch height width"]:
    """Real images of a half spectrum, the inverse of ``rfft2``.

    Args:
        spectrum: half spectrum.
        size: (H, W) of the images; W cannot be read off the half spectrum.

    Returns:
        float32, or float64 for complex128.
    """
    if torch.compiler.is_compiling():
        _expect_complex_operators()
    return torch.fft.irfft2(spectrum, s=size, norm="ortho")


def single_or_double(values: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return values if values.dtype == torch.float64 else values.to(torch.float32)


def power(spectrum: Complex[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Squared magnitude.

    Args:
        spectrum: any complex tensor.

    Returns:
        re^2 + im^2.
    """
    return spectrum.real.square() + spectrum.imag.square()


def squared_radius(
    height: int, width: int, device: torch.device | str | None = None
) -> tuple[Int64[Tensor, "height half_width"], int]:
    """Squared distance from DC as exact fractions with one denominator.

    With m = min(H, W) the radius is r^2 = m^2 (ky^2 / H^2 + kx^2 / W^2), in cycles per shorter side. With
    q / p = (longer side) / m in lowest terms, q^2 r^2 is an integer: q^2 k^2 along the shorter side plus
    p^2 k^2 along the longer one. Fits int64 for images of up to 4e9 pixels.

    Returns:
        The integers q^2 r^2 and the denominator q^2 (1 for square images).
    """
    short = min(height, width)
    vertical, horizontal = Fraction(short, height), Fraction(short, width)
    denominator = max(vertical.denominator, horizontal.denominator)
    ky = torch.arange(height, dtype=torch.int64, device=device)
    ky = torch.minimum(ky, height - ky) * int(vertical * denominator)
    kx = torch.arange(width // 2 + 1, dtype=torch.int64, device=device) * int(horizontal * denominator)
    return ky[:, None].square() + kx.square(), denominator**2


def inside(
    height: int, width: int, radius: Fraction, device: torch.device | str | None = None
) -> Bool[Tensor, "height half_width"]:
    """Bins with r^2 < radius^2 (MFM, arXiv 2206.07706), decided in integers.

    Float radii misplace bins that lie on the circle: at 224 and radius 5, 77 bins instead of 69.

    Args:
        height: H in pixels.
        width: W in pixels.
        radius: in cycles per shorter side, exact.
        device: where the mask is wanted.

    Returns:
        True inside, the circle itself is outside.
    """
    numerator, denominator = squared_radius(height, width, device)
    threshold = math.ceil(radius * radius * denominator)  # n < T for an integer n: n < ceil(T)
    return numerator < min(threshold, torch.iinfo(torch.int64).max)


def frequency_radius(
    height: int, width: int, device: torch.device | str | None = None
) -> Float[Tensor, "height half_width"]:
    """Distance from DC in cycles per shorter side; for a square image the distance in bins.

    Returns:
        float32, rounded; compare with ``inside`` where an edge must be exact.

    >>> frequency_radius(4, 8)[0].tolist()  # eight columns in the time of four rows
    [0.0, 0.5, 1.0, 1.5, 2.0]
    """
    numerator, denominator = squared_radius(height, width)
    return (numerator.double() / denominator).sqrt().float().to(device)


def pair_weights(
    height: int, width: int, device: torch.device | str | None = None
) -> Float[Tensor, "height half_width"]:
    """How often a bin of the half spectrum stands in the full one.

    Returns:
        2, or 1 in the columns that hold both partners (0, and W/2 for an even W); adds up to H W.

    >>> pair_weights(2, 4).tolist()
    [[1.0, 2.0, 1.0], [1.0, 2.0, 1.0]]
    """
    weights = torch.full((width // 2 + 1,), 2.0, device=device)
    for column in self_conjugate_columns(width):
        weights[column].fill_(1.0)  # an assignment would copy the number from the host and wait
    return weights.expand(height, -1)


@constant
def bin_weights(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``pair_weights`` in a precision, made once for a size.

    Returns:
        (H, W // 2 + 1), nobody's to write to.
    """
    return pair_weights(height, width, device).to(dtype)


def self_conjugate_columns(width: int) -> list[int]:
    """Columns of a half spectrum in which both partners of a pair are stored.

    Returns:
        [0], and W/2 as well for an even W.
    """
    return [0, width // 2] if width % 2 == 0 else [0]


def full_spectrum(half: Tensor, width: int) -> Tensor:
    """The whole, unshifted spectrum-sized map of a half map that is the same for both partners of a pair.

    Args:
        half: (..., H, W // 2 + 1) real: a mask, a magnitude, a radius.
        width: W in pixels.

    Returns:
        (..., H, W); shift it with ``torch.fft.fftshift(..., dim=(-2, -1))`` (without ``dim`` it would also
        roll batch and channels).
    """
    columns = half[..., 1 : (width + 1) // 2]
    partners = columns.flip(-2, -1).roll(1, dims=-2)  # row k of a partner is row -k of the stored bin
    return torch.cat((half, partners), dim=-1)


def log_magnitude(images: Float[Tensor, "*batch height width"]) -> Float[Tensor, "*batch height width"]:
    """log(1 + |F|) of the full spectrum with DC in the center (H // 2, W // 2), for pictures.

    Args:
        images: real images.

    Returns:
        Non-negative numbers in the images' layout.
    """
    magnitude = full_spectrum(rfft2(images).abs(), images.shape[-1])
    return torch.fft.fftshift(torch.log1p(magnitude), dim=(-2, -1))


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


class Normalization(nn.Module):
    """(images - mean) / std, channel by channel.

    Args:
        channels: channels C.
        mean: one a channel, in [0, 1]; None or auto: ImageNet's for three channels, else 0.5.
        std: one a channel, above 0; None or auto: ImageNet's for three channels, else 0.25.

    Raises:
        UserError: for another number of values, or a std that is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        channels: int,
        mean: Sequence[float] | Literal["auto"] | None = None,
        std: Sequence[float] | Literal["auto"] | None = None,
    ) -> None:
        super().__init__()
        of_color = {"mean": (mean, IMAGENET_MEAN, PLAIN_MEAN), "std": (std, IMAGENET_STD, PLAIN_STD)}
        for name, (given, imagenet, plain) in of_color.items():
            values = given
            if values is None or values == "auto":
                values = imagenet if channels == 3 else [plain] * channels
            if len(values) != channels:
                raise UserError(
                    f"{name} ({list(values)}) must hold one value for each of the {channels} channels"
                )
            values = [float(value) for value in values]
            if name == "std" and min(values) <= 0:
                raise UserError(
                    f"std ({values}) must be above 0 in every channel; leave constant channels out"
                )
            # Not part of the state: they are settings, and a checkpoint's must not override a user's.
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, images: Float[Tensor, "*batch channel height width"]) -> Tensor:
        """Images in [0, 1] become the network's numbers, of about mean 0 and deviation 1."""
        return (images - self.mean) / self.std

    def inverse(self, normalized: Float[Tensor, "*batch channel height width"]) -> Tensor:
        """The network's numbers become images; a prediction may leave [0, 1]."""
        return normalized.float() * self.std + self.mean
