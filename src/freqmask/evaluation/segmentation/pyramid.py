"""Four maps of an image at strides 4, 8, 16 and 32: made for a plain ViT, taken from the stages of others."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from freqmask.backbones import Backbone
from freqmask.errors import UserError
from freqmask.interop.models import stage_features
from freqmask.timm_models import parameters_behind, strides

STRIDES = (4, 8, 16, 32)


class Rescale(nn.Module):
    """A map made 2^steps times as large (BEiT's transposed convolutions), as it is, or pooled.

    Args:
        channels: of the map, and of what comes out.
        steps: doublings; halvings where negative.
    """

    def __init__(self, channels: int, steps: int) -> None:
        super().__init__()
        self.halvings = max(-steps, 0)
        layers: list[nn.Module] = []
        for number in range(steps):
            if number:
                layers += [nn.BatchNorm2d(channels), nn.GELU()]
            layers.append(nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2))
        self.enlarge = nn.Sequential(*layers)

    def forward(self, feature_map: Float[Tensor, "batch dim rows columns"]) -> Tensor:
        """(B, D, rows 2^steps, columns 2^steps), odd sizes rounded up."""
        for _ in range(self.halvings):
            feature_map = F.max_pool2d(feature_map, kernel_size=2, ceil_mode=True)
        enlarged: Tensor = self.enlarge(feature_map)
        return enlarged


class FeaturePyramid(nn.Module):
    """The maps that a segmentation decoder takes, finest first.

    Of a plain ViT (one stride throughout) the blocks at 1/4, 1/2, 3/4 and the end, each brought to its stride
    as in BEiT (x4, x2, as it is, /2 for patches of 16). BEiT itself takes the blocks 4, 6, 8 and 12 of 12.
    Of other networks the last four stages as they are.

    Args:
        backbone: whose parameters are all trained from here on, but those that no map depends on.

    Attributes:
        channels: of each map.

    Raises:
        UserError: the network has a single stage that is no sequence of blocks.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        stage_strides = strides(backbone.timm_model)
        count = len(stage_strides)
        self.is_plain = len(set(stage_strides)) == 1
        if self.is_plain:
            self.stages = [math.ceil(count * share / 4) - 1 for share in (1, 2, 3, 4)]
        else:
            self.stages = list(range(max(count - 4, 0), count))
        if len(self.stages) < 2:
            raise UserError(f"model ({backbone.name}) has one stage only; segmentation needs two or more")
        maps = self._look_once()
        self.channels = [one.shape[1] for one in maps]
        self.rescale = nn.ModuleList()
        if self.is_plain:
            for channels, wanted in zip(self.channels, STRIDES, strict=True):
                self.rescale.append(Rescale(channels, round(math.log2(backbone.stride / wanted))))

    def forward(self, normalised: Float[Tensor, "batch channel height width"]) -> list[Tensor]:
        """The maps of normalised images."""
        maps = self._maps(normalised)
        return [scale(one) for scale, one in zip(self.rescale, maps, strict=True)] if self.is_plain else maps

    def _maps(self, normalised: Tensor) -> list[Tensor]:
        wanted = sorted(set(self.stages))  # a ViT of less than four blocks gives some of them twice
        found = stage_features(self.backbone, normalised, wanted)
        by_stage = {stage: features.feature_map for stage, features in zip(wanted, found, strict=True)}
        return [by_stage[stage] for stage in self.stages]

    def _look_once(self) -> list[Tensor]:
        """Learns the channels, and which parameters are trained: DDP refuses those without a gradient."""
        backbone = self.backbone
        backbone.requires_grad_(True).eval()
        with torch.enable_grad():
            maps = self._maps(torch.zeros(1, backbone.channels, *backbone.image_size))
        reached = parameters_behind(maps)
        for parameter in backbone.parameters():
            parameter.requires_grad_(parameter in reached)
        return maps
