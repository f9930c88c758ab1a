"""What methods share whose network is given a part of an image: some patches, and for some images some frequencies."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from freqmask.backbones import Backbone, height_and_width
from freqmask.errors import UserError
from freqmask.filters import Filter, Filtered, build_filter
from freqmask.methods.method import Method
from freqmask.options.of_methods import PartlySeenOptions
from freqmask.rng import combine, uniform

RADIUS_SHARE = 4  # the low-pass keeps a quarter of the shorter side: milder filters cost nothing, docs/log.md
TOKEN_SHARE = 0.5


class PartlySeen(Method):
    """A backbone that is given some patches of x~, the image with frequencies hidden; a linear decoder for pictures.

    ``filter_share`` of the images are filtered; what the network is to tell from the rest is a subclass's matter.
    """

    Options: ClassVar[type[PartlySeenOptions]]
    backbone: Backbone
    tiny_lr = (2e-3, 128)  # of the trials in docs/log.md

    def build(self, options: Any) -> None:
        """Filter, heads and decoder."""
        settings, size = self.settings, height_and_width(self.settings["image_size"])
        if options.filter == "lowpass" and options.radius == "auto":
            settings["radius"] = min(size) / RADIUS_SHARE
        self.filter = _filter(options.filter, settings["radius"], size)
        self.filter_share = options.filter_share
        self.token_share = settings["token_share"] = _token_share(options.token_share, self.backbone)
        self.add_heads(options)
        self.decoder = self.make_decoder()

    @abstractmethod
    def add_heads(self, options: Any) -> None:
        """What the features are asked through, by the options; ``settings`` gets what was ``auto`` among them."""

    def hidden(
        self, images: Float[Tensor, "batch channel height width"], keys: Int64[Tensor, " batch"]
    ) -> Filtered:
        """The images, frequencies of some of them hidden, and keep (1 throughout for the others)."""
        filtered = self.filter(images, keys, clamp=True)
        chosen = (uniform(keys, "filtered", (1,)) < self.filter_share).view(-1, 1, 1, 1)
        return Filtered(torch.where(chosen, filtered.images, images), torch.where(chosen, filtered.keep, 1.0))

    def see(
        self, images: Float[Tensor, "batch channel height width"], keys: Int64[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch cell dim"], Int64[Tensor, "batch cell"] | None]:
        """Features of the cells that the backbone is given of x~, and their places; None: all, in order.

        Args:
            images: whole, in [0, 1].
            keys: one an image.
        """
        images = self.normalise(self.hidden(images, combine(keys, 0)).images)
        if self.token_share == 1:
            return self.backbone(images).feature_map.flatten(2).mT, None
        height, width = self.backbone.padded(images).shape[-2:]
        count = height * width // self.backbone.stride**2
        order = uniform(combine(keys, 1), "tokens", (count,)).argsort(dim=1)
        places = order[:, : max(1, round(self.token_share * count))]
        return self.backbone.read_tokens(images, places), places

    def picture_loss(
        self,
        cells: Float[Tensor, "batch cell dim"],
        places: Int64[Tensor, "batch cell"] | None,
        images: Float[Tensor, "batch channel height width"],
    ) -> Float[Tensor, ""]:
        """How far the decoder's pixels are from the cells' own in the whole images, normalized."""
        convolution: Any = self.decoder[0]
        weight, bias = convolution.weight.flatten(1), convolution.bias
        padded = self.backbone.padded(self.normalise(images))
        wanted = at_places(F.pixel_unshuffle(padded, self.backbone.stride), places)
        return F.mse_loss(F.linear(cells, weight, bias).float(), wanted)


def at_places(
    cells: Float[Tensor, "batch dim rows columns"], places: Int64[Tensor, "batch cell"] | None
) -> Float[Tensor, "batch cell dim"]:
    """A map's cells as a sequence: those at ``places``, row by row from 0; None: all."""
    sequence = cells.flatten(2).mT
    if places is None:
        return sequence
    return torch.gather(sequence, 1, places[..., None].expand(-1, -1, sequence.shape[-1]))


def _filter(text: Any, radius: float | str, size: tuple[int, int]) -> Filter:
    """The low-pass of a radius, or the filter that was named, which has its radius inside."""
    if text == "lowpass":
        return build_filter(f"lowpass(radius={radius!r})", size)
    if radius != "auto":
        raise UserError(
            f"radius ({radius}) is not used by filter {text}; write it inside, as in 'highpass(radius=8)'"
        )
    return build_filter(text, size)


def _token_share(share: float | str, backbone: Backbone) -> float:
    """The share of patches, 1 where the backbone takes all."""
    if share == "auto":
        return TOKEN_SHARE if backbone.can_leave_tokens_out else 1.0
    if float(share) < 1 and not backbone.can_leave_tokens_out:
        raise UserError(
            f"token_share ({share}) must be 1 for {backbone.name}, which takes all patches; try token_share=auto"
        )
    return float(share)
