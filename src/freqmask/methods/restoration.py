"""Restoration tasks: undo a spatial corruption, evaluated on the whole spectrum (docs/methods.md, MFM)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from freqmask.backbones import Backbone
from freqmask.degradations import Blur, Downscale, Noise
from freqmask.filters import Filtered
from freqmask.losses import SpectrumLoss
from freqmask.methods.method import Method
from freqmask.methods.mfm import reconstruction_health
from freqmask.options.of_methods import (
    DeblurOptions,
    DenoiseOptions,
    RestorationOptions,
    SuperResolutionOptions,
)
from freqmask.rng import Keys, combine
from freqmask.spectrum import Images


class Restoration(Method):
    """loss = mean(|F(decoder(backbone(degrade(x)))) - F(x)|^gamma), over the full spectrum.

    The three tasks differ in ``degrade`` alone, which their options describe; the rest is MFM's.
    """

    Options: ClassVar[type[RestorationOptions]]
    backbone: Backbone

    def build(self, options: Any) -> None:
        """Degradation, loss and decoder."""
        self.degradation = self.degrade(options)
        self.loss = SpectrumLoss(gamma=options.gamma, focal=options.focal)
        self.decoder = self.make_decoder()

    @staticmethod
    @abstractmethod
    def degrade(options: Any) -> nn.Module:
        """What is done to an image, by the options of the task."""

    def forward(
        self, views: Sequence[Images], keys: Keys | None = None, details: bool = False
    ) -> dict[str, Float[Tensor, ""]]:
        """The loss of one view of each image, see :class:`Method`."""
        (images,), keys = self.checked(views, keys)
        prediction = self.predict(self.degradation(images, combine(keys, 0)))
        target = self.normalise(images)
        parts = {"loss": self.loss(prediction, target, None)}
        if details:
            parts |= reconstruction_health(self.loss, prediction, target, None)
        return parts

    def corrupt(self, images: Images, keys: Keys) -> Filtered:
        """The degraded images; keep is 0: no frequency is given."""
        batch, _, height, width = images.shape
        return Filtered(self.degradation(images, keys), images.new_zeros(batch, 1, height, width // 2 + 1))


class SuperResolution(Restoration):
    """Undo a bicubic reduction without antialiasing; see :class:`Restoration`."""

    name: ClassVar[str] = "sr"
    about: ClassVar[str] = "makes an image smaller; the network predicts the large one"
    Options = SuperResolutionOptions

    @staticmethod
    def degrade(options: SuperResolutionOptions) -> nn.Module:
        """``factor`` pixels become one."""
        return Downscale(options.factor)


class Deblur(Restoration):
    """Undo an isotropic Gaussian blur; see :class:`Restoration`."""

    name: ClassVar[str] = "deblur"
    about: ClassVar[str] = "blurs an image; the network predicts the sharp one"
    Options = DeblurOptions

    @staticmethod
    def degrade(options: DeblurOptions) -> nn.Module:
        """One of the odd ``kernel_sizes`` is drawn per image."""
        return Blur(options.kernel_sizes, options.sigma)


class Denoise(Restoration):
    """Undo Gaussian noise, drawn per pixel and channel and not clamped; see :class:`Restoration`."""

    name: ClassVar[str] = "denoise"
    about: ClassVar[str] = "adds noise to an image; the network predicts it without"
    Options = DenoiseOptions

    @staticmethod
    def degrade(options: DenoiseOptions) -> nn.Module:
        """``sigma`` for images in [0, 1]; 75/255 at any size unless it is given."""
        return Noise() if options.sigma == "auto" else Noise(options.sigma)
