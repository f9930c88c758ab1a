"""From features to an image, and from features to what a student is compared in with its teacher."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from freqmask.errors import UserError
from freqmask.spectrum import Images
from freqmask.timm_models import PatchConv2d


class ReconstructionHead(nn.Sequential):
    """MFM's decoder: a 1x1 convolution to stride^2 C channels, then pixel shuffle (docs/methods.md, MFM).

    Its two parameters are ``0.weight`` and ``0.bias``, as in the authors' checkpoints (``decoder.0.*``).

    Args:
        in_dim: channels D of the feature map.
        channels: channels C of the image.
        stride: pixels of the image per cell of the map.
    """

    def __init__(self, in_dim: int, channels: int, stride: int) -> None:
        super().__init__(PatchConv2d(in_dim, stride**2 * channels, kernel_size=1), nn.PixelShuffle(stride))

    def forward(
        self, feature_map: Float[Tensor, "batch dim rows columns"], size: tuple[int, int] | None = None
    ) -> Images:
        """An image of the given height and width, or of the map's size times the stride.

        A map that covers more than the image (whose sides the stride does not divide) is cut at the bottom
        and the right, where the backbone padded; one that covers less is stretched.

        Args:
            feature_map: (B, D, h, w).
            size: (H, W) of the image in pixels; None is (h, w) times the stride.

        Returns:
            (B, C, H, W), normalized as the target of the loss is.
        """
        image = super().forward(feature_map)
        if size is None or image.shape[-2:] == size:
            return image
        height, width = size
        if image.shape[-2] < height or image.shape[-1] < width:
            return F.interpolate(image, size=size, mode="bilinear", align_corners=False)
        return image[..., :height, :width]


class ProjectionHead(nn.Module):
    """DINO's head, which FOLK compares features with: MLP, unit length, weight-normalized last layer.

    The last layer's rows have length 1 (its scale is fixed), so that every output is a cosine.

    Args:
        in_dim: length D of a feature.
        outputs: how many prototypes K to compare with.
        hidden: width of the MLP.
        bottleneck: length of the normalized vector before the last layer.
        layers: linear layers of the MLP, at least 1.

    Raises:
        UserError: for a number below 1.
    """

    def __init__(
        self, in_dim: int, outputs: int = 65536, hidden: int = 2048, bottleneck: int = 256, layers: int = 3
    ) -> None:
        super().__init__()
        sizes = {"outputs": outputs, "hidden": hidden, "bottleneck": bottleneck, "layers": layers}
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"{name} ({value}) must be at least 1; leave it out for the published value")
        widths = [in_dim, *[hidden] * (layers - 1), bottleneck]
        self.mlp = nn.Sequential()
        for number, (width_in, width_out) in enumerate(pairwise(widths)):
            if number:
                self.mlp.append(nn.GELU())
            layer = nn.Linear(width_in, width_out)
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
            self.mlp.append(layer)
        self.last_layer = nn.Parameter(nn.init.trunc_normal_(torch.empty(outputs, bottleneck), std=0.02))

    def forward(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch outputs"]:
        """The cosine of each projected feature with each prototype, in [-1, 1]."""
        projected = F.normalize(self.mlp(features), dim=-1, eps=1e-6)
        return F.linear(projected, F.normalize(self.last_layer, dim=-1, eps=1e-6))


class FeatureNorm(nn.BatchNorm1d):
    """Batch norm of features (B, D); a single image, which has no statistics of a batch, takes the running ones."""

    def forward(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Each feature with mean 0 and variance 1 over the batch, then scaled where it is affine."""
        training = self.training and len(features) > 1
        statistics = self.running_mean, self.running_var
        return F.batch_norm(
            features, *statistics, self.weight, self.bias, training, self.momentum or 0.0, self.eps
        )
