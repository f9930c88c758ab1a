"""What a filter is: a map of what an image's spectrum keeps, and the filtered image."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from jaxtyping import Complex, Float, Int64
from torch import Tensor, nn

from freqmask.errors import UserError
from freqmask.rng import fresh_keys
from freqmask.spectrum import image_size, irfft2, rfft2


class Filtered(NamedTuple):
    """Filtered images (batch, C, H, W), not clamped, and keep (batch, 1 or C, H, W // 2 + 1) in [0, 1]."""

    images: Tensor
    keep: Tensor


class Filter(nn.Module):
    """Hides frequencies: one FFT, a map ``keep``, one inverse FFT.

    A filter of your own defines ``keep`` and stores its constructor's arguments as attributes of the same
    names; ``describe`` and the run's configuration read them from there.
    """

    name = ""  # what ``build_filter`` calls it; empty: the import path of the class

    @abstractmethod
    def keep(
        self,
        spectrum: Complex[Tensor, "batch channel height half_width"],
        size: tuple[int, int],
        keys: Int64[Tensor, " batch"],
    ) -> Float[Tensor, "batch mask_channel height half_width"]:
        """Which frequencies each image keeps.

        Args:
            spectrum: half spectra of images in [0, 1].
            size: (H, W) of the images.
            keys: one an image; all randomness comes from them.

        Returns:
            1 = kept, 0 = hidden, for one or all channels; the same for both partners of a conjugate pair.
        """

    def forward(
        self, images: Float[Tensor, "batch channel height width"], keys: Int64[Tensor, " batch"] | None = None
    ) -> Filtered:
        """Filters a batch.

        Args:
            images: in [0, 1], any channels and size.
            keys: one an image; ``None`` draws fresh ones.

        Returns:
            Re F^-1(F(images) keep), which may leave [0, 1], and keep. float32, float64 for float64 images.
        """
        if keys is None:
            keys = fresh_keys(len(images), images.device)
        size = image_size(images)
        spectrum = rfft2(images)
        keep = self.keep(spectrum, size, keys)
        return Filtered(irfft2(spectrum * keep, size), keep)

    def check(self, image_size: tuple[int, int]) -> None:
        """Whether the settings make sense for images of a size; nothing to check unless overridden.

        Args:
            image_size: (H, W).

        Raises:
            UserError: for a radius outside the spectrum and the like.
        """

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, from which an equal filter can be built.

        Returns:
            Plain values by name.

        Raises:
            UserError: where a filter does not store an argument under its name.
        """
        names = [name for name in inspect.signature(type(self)).parameters if name not in ("args", "kwargs")]
        missing = [name for name in names if not hasattr(self, name)]
        if missing:
            raise UserError(
                f"filter {type(self).__name__} must store its argument(s) {', '.join(missing)} as attributes "
                "of the same names, so that a run can record them"
            )
        return {name: getattr(self, name) for name in names}

    def describe(self) -> str:
        """A text from which ``build_filter`` makes an equal filter, for example ``lowpass(radius=16)``."""
        name = self.name or f"{type(self).__module__}:{type(self).__qualname__}"
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in self.settings().items())})"

    def extra_repr(self) -> str:
        """The description, for printing."""
        return self.describe()


def per_image(mask: Tensor, spectrum: Tensor) -> Tensor:
    """One mask (H, W // 2 + 1) for a whole batch: (batch, 1, H, W // 2 + 1) in the spectrum's precision."""
    return mask.to(spectrum.real.dtype).expand(len(spectrum), 1, -1, -1)


def mix(index: Tensor, keeps: list[Tensor]) -> Tensor:
    """Takes each image's map from the list entry that its index names, without asking the device which."""
    chosen = keeps[0]
    for number, keep in enumerate(keeps[1:], start=1):
        chosen = torch.where((index == number)[:, None, None, None], keep, chosen)
    return chosen
