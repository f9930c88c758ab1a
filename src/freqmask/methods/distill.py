"""Distill: from a part of an image, tell what a frozen public network sees in the whole of it (docs/methods.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from freqmask.backbones import Backbone, Features, height_and_width
from freqmask.errors import UserError
from freqmask.heads import FeatureNorm
from freqmask.methods.words import PartlySeen, at_places
from freqmask.options.of_methods import DistillOptions
from freqmask.rng import Keys
from freqmask.spectrum import Images, Normalization

HIDDEN = 512  # width of the heads
ENLARGED = 3  # a teacher's image has at most three times the student's side: more is time without new detail


class Distill(PartlySeen):
    """FOLK whose teacher is a frozen public backbone.

    loss = (1 - cos(h(mean g(x~)), n(t))) + token_weight mean over cells (1 - cos(k(g(x~)_c), m(T)_c))
    + reconstruction_weight mean (decoder(g(x~)) - x)^2

    with g the student, given some patches c of x~, the image with frequencies hidden (``filter_share`` of the images);
    t and T the teacher's pooled feature and its map, brought to the student's grid, of the whole image x; n and m
    standardize each number over the batch, so that the part that all images share is not what the cosine measures;
    h and k small heads. Without weight the decoder is trained beside it, and no gradient of it reaches the student.

    After FitNets (Romero et al. 2015) and the patient teacher of Beyer et al. (2022), which sees what the student sees;
    here the student sees less.

    Its options are those of :class:`~freqmask.options.of_methods.DistillOptions`; ``teacher`` is a :class:`Teacher`.
    With a mere name of one, as ``settings`` record it, the method draws and exports what it has learned, but cannot
    train.
    """

    name = "distill"
    Options: ClassVar[type[DistillOptions]] = DistillOptions
    about = (
        "hides patches and frequencies; the network tells what the frozen --teacher sees in the whole image"
    )
    parts = ("distillation", "token_distillation", "reconstruction")
    teacher: Teacher | None

    def add_heads(self, options: DistillOptions) -> None:
        """The teacher, and a head for each of its features that is to be told."""
        self.token_weight, self.reconstruction_weight = options.token_weight, options.reconstruction_weight
        self.teacher = options.teacher if isinstance(options.teacher, Teacher) else None
        if self.teacher is None:
            if not options.teacher:
                raise UserError("method distill needs a teacher; name one, such as --teacher timm:resnet50")
            return
        self.settings |= {"teacher": self.teacher.name, "teacher_size": min(self.teacher.size)}
        taken, seen = self.teacher.backbone.channels, self.backbone.channels
        if taken != seen:
            raise UserError(
                f"teacher ({self.teacher.name}) takes {taken} channels and the images have {seen}; try "
                f"--channels {taken}, or a teacher for {seen}"
            )
        self.make_heads(self.teacher.backbone.feature_dim)

    def make_heads(self, outputs: int) -> None:
        """Heads and standardization for so many features of a teacher."""
        self.head = prediction_head(self.backbone.feature_dim, outputs)
        self.norm = FeatureNorm(outputs, affine=False)
        if self.token_weight > 0:
            self.token_head = prediction_head(self.backbone.feature_dim, outputs)
            self.token_norm = FeatureNorm(outputs, affine=False)

    def forward(
        self, views: Sequence[Images], keys: Keys | None = None, details: bool = False
    ) -> dict[str, Float[Tensor, ""]]:
        """The loss of one view of each image and, detached, its three parts, see :class:`Method`."""
        (images,), keys = self.checked(views, keys)
        if self.teacher is None:
            raise UserError(f"teacher ({self.settings['teacher']}) must be opened before it can teach")
        told = self.teacher(images)
        cells, places = self.see(images, keys)
        distillation = cosine_distance(self.head(cells.mean(dim=1)), self.norm(self.teacher.summary(told)))
        parts = {"distillation": distillation}
        loss = distillation
        if self.token_weight > 0:
            rows, columns = (side // self.backbone.stride for side in self.backbone.padded(images).shape[-2:])
            wanted = at_places(on_grid(told.feature_map, (rows, columns)), places).flatten(0, 1)
            parts["token_distillation"] = cosine_distance(
                self.token_head(cells.flatten(0, 1)), self.token_norm(wanted)
            )
            loss = loss + self.token_weight * parts["token_distillation"]
        weight = self.reconstruction_weight
        parts["reconstruction"] = self.picture_loss(cells if weight else cells.detach(), places, images)
        loss = loss + (weight or 1.0) * parts["reconstruction"]
        if details:
            parts["relative_loss"] = distillation  # a prediction that has nothing to do with the target has 1
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *more: Any) -> None:
        # without a teacher its width is known from the weights alone
        if self.teacher is None and f"{prefix}norm.running_mean" in state_dict:
            self.make_heads(len(state_dict[f"{prefix}norm.running_mean"]))
        super()._load_from_state_dict(state_dict, prefix, *more)


class Teacher(nn.Module):
    """A frozen backbone and what it is to be fed: never trained, always in evaluation mode, in no checkpoint.

    Args:
        backbone: any; its weights stop needing gradients.
        name: as it was asked for, such as ``timm:resnet50``; recorded in its place.
        size: height and width in pixels that images are brought to; None: the backbone's own.
        mean: of each channel in [0, 1]; None is ImageNet's.
        std: likewise.
    """

    def __init__(
        self,
        backbone: Backbone,
        name: str,
        size: int | tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.name = backbone.requires_grad_(False), name
        if backbone.is_cnn:
            # EfficientNet-Lite0 in bf16 on a CPU: 1.5 times as fast
            self.to(memory_format=torch.channels_last)
        self.size = backbone.image_size if size is None else height_and_width(size)
        self.normalise = Normalization(backbone.channels, mean, std)
        self.register_load_state_dict_post_hook(_leave_out)
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode, so that batch norm and dropout do."""
        return super().train(False)

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """Nothing: the weights lie where they came from, and a checkpoint is as small as without a teacher."""
        return {} if destination is None else destination

    @torch.no_grad()
    def forward(self, images: Images) -> Features:
        """What it says of images in [0, 1]."""
        if images.shape[-2:] != self.size:
            smaller = min(self.size) < min(images.shape[-2:])
            images = F.interpolate(
                images, self.size, mode="bicubic", antialias=smaller, align_corners=False
            ).clamp(0, 1)
        return self.backbone(self.normalise(images))

    def summary(self, features: Features) -> Float[Tensor, "batch dim"]:
        """What the model itself would classify from: its class token, or the mean of its map."""
        pooling = getattr(self.backbone.timm_model, "global_pool", "avg")
        token = features.class_token
        return token if token is not None and pooling == "token" else features.pooled


def _leave_out(teacher: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if "teacher." not in name]


def prediction_head(features: int, outputs: int) -> nn.Sequential:
    """From a student's features to as many numbers as the teacher has."""
    return nn.Sequential(
        FeatureNorm(features), nn.Linear(features, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, outputs)
    )


def cosine_distance(
    prediction: Float[Tensor, "row dim"], target: Float[Tensor, "row dim"]
) -> Float[Tensor, ""]:
    """1 - cos, the mean over rows, in float32: 0 where directions agree, 1 where they have nothing in common."""
    return 1 - F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()


def on_grid(
    feature_map: Float[Tensor, "batch dim rows columns"], grid: tuple[int, int]
) -> Float[Tensor, "batch dim new_rows new_columns"]:
    """A map with other rows and columns: means of its cells where there are fewer, else interpolated."""
    if feature_map.shape[-2:] == grid:
        return feature_map
    if feature_map.shape[-2] >= grid[0] and feature_map.shape[-1] >= grid[1]:
        return F.adaptive_avg_pool2d(feature_map, grid)
    return F.interpolate(feature_map, grid, mode="bilinear", align_corners=False)


def teacher_size(image_size: tuple[int, int], own: tuple[int, int], side: int | str) -> tuple[int, int]:
    """Height and width of a teacher's images.

    Args:
        image_size: the student's.
        own: those that the teacher was trained at.
        side: the shorter one as asked for; ``"auto"`` is the teacher's own, but at most three times the student's.
    """
    shorter = min(min(own), ENLARGED * min(image_size)) if side == "auto" else int(side)
    height, width = (round(shorter * length / min(image_size)) for length in image_size)
    return height, width
