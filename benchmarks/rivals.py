"""Rivals of our methods in one harness: SimMIM, MAE, DINO, LeJEPA, and SparK's masking for a CNN, each as published.

They keep the contract of :class:`freqmask.methods.Method`, so that data, views, optimizer and evaluation are the same
for all (benchmarks/learning.py). They measure; they are not part of the package.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from freqmask.heads import ProjectionHead
from freqmask.methods.folk import DistillationLoss
from freqmask.methods.method import Method, build_backbone
from freqmask.options.of_methods import BackboneOptions
from freqmask.spectrum import Normalization
from freqmask.training.optim import cosine_momentum, update_ema


class Rival(Method):
    """A rival: a backbone by name, its options as attributes; nothing of it draws pictures."""

    def __init__(
        self,
        backbone: str,
        image_size: int = 32,
        channels: int = 3,
        *,
        patch_size: int | None = None,
        model_args: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        given = BackboneOptions(patch_size=patch_size, model_args=model_args)
        built = build_backbone(backbone, image_size, channels, given)
        self.normalize = Normalization(channels)
        self.side, self.channels = built.stride, channels
        self.rows = image_size // built.stride
        self.wire(built, **options)

    def wire(self, backbone: nn.Module, **options: Any) -> None:
        """Build the parts around the backbone."""
        raise NotImplementedError


def patches_of(images: Tensor, side: int) -> Tensor:
    """(B, C, H, W) as (B, patches, side * side * C)."""
    batch, channels, height, width = images.shape
    cut = images.reshape(batch, channels, height // side, side, width // side, side)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, side * side * channels)


def normalised(patches: Tensor) -> Tensor:
    """Each patch with mean 0 and variance 1, MAE's target."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def shown_and_hidden(
    batch: int, count: int, hidden_share: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Places of the patches that the encoder is shown, and of those it is not, drawn for each image."""
    order = torch.rand(batch, count, device=device).argsort(dim=1)
    shown = round(count * (1 - hidden_share))
    return order[:, :shown], order[:, shown:]


def taken(tokens: Tensor, places: Tensor) -> Tensor:
    """Some tokens of each image."""
    return torch.gather(tokens, 1, places[..., None].expand(-1, -1, tokens.shape[-1]))


class MAE(Rival):
    """Masked autoencoder (He et al. 2022): the encoder sees a quarter of the patches, a small decoder the rest."""

    name = "mae"

    def wire(self, backbone: Any, mask: float = 0.75, depth: int = 2, width: int = 64) -> None:
        self.backbone, self.mask, count = backbone, mask, self.rows**2
        self.embed = nn.Linear(backbone.feature_dim, width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, count, width) * 0.02)
        self.blocks = nn.Sequential(*[Block(width, 4, qkv_bias=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.side**2 * self.channels)

    def forward(self, views: Any, keys: Tensor | None = None, details: bool = False) -> dict[str, Tensor]:
        (images,), _ = self.checked(views, keys)
        images = self.normalize(images)
        model: Any = self.backbone.timm_model
        tokens = model.patch_embed(images) + model.pos_embed[:, 1:]
        shown, hidden = shown_and_hidden(len(images), tokens.shape[1], self.mask, images.device)
        first = (model.cls_token + model.pos_embed[:, :1]).expand(len(images), -1, -1)
        encoded = model.norm(model.blocks(torch.cat([first, taken(tokens, shown)], dim=1)))[:, 1:]
        whole = torch.cat(
            [self.embed(encoded), self.mask_token.expand(len(images), hidden.shape[1], -1)], dim=1
        )
        whole = taken(whole, torch.cat([shown, hidden], dim=1).argsort(dim=1)) + self.position
        predicted = self.head(taken(self.norm(self.blocks(whole)), hidden))
        target = taken(normalised(patches_of(images, self.side)), hidden)
        return {"loss": F.mse_loss(predicted.float(), target)}


class SimMIM(Rival):
    """SimMIM (Xie et al. 2022): mask tokens in the place of patches, a linear decoder, L1 on what was hidden.

    For a CNN the patches are hidden in the image (by the mean color, as A2MIM does), of the size of a cell.
    """

    name = "simmim"

    def wire(self, backbone: Any, mask: float = 0.6) -> None:
        self.backbone, self.mask = backbone, mask
        self.decoder = nn.Linear(backbone.feature_dim, self.side**2 * self.channels)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.feature_dim if backbone.is_vit else 1))

    def forward(self, views: Any, keys: Tensor | None = None, details: bool = False) -> dict[str, Tensor]:
        (images,), _ = self.checked(views, keys)
        images = self.normalize(images)
        _, hidden = shown_and_hidden(len(images), self.rows**2, self.mask, images.device)
        mask = images.new_zeros(len(images), self.rows**2, 1).scatter(1, hidden[..., None], 1.0)
        if self.backbone.is_vit:
            model: Any = self.backbone.timm_model
            tokens = model.patch_embed(images) * (1 - mask) + self.mask_token * mask
            tokens = torch.cat([model.cls_token.expand(len(images), -1, -1), tokens], dim=1) + model.pos_embed
            cells = model.norm(model.blocks(tokens))[:, 1:]
        else:
            blocked = _as_image(mask, self.rows, self.side)
            cells = (
                self.backbone(images * (1 - blocked) + self.mask_token * blocked).feature_map.flatten(2).mT
            )
        target = taken(patches_of(images, self.side), hidden)
        return {"loss": F.l1_loss(self.decoder(taken(cells, hidden)).float(), target)}


class SparK(Rival):
    """Masking for a CNN after SparK (Tian et al. 2023): hidden cells stay empty through every stage.

    Its sparse convolutions are imitated by emptying hidden cells again after each stage, which the paper reports as
    equivalent for submanifold convolutions up to the borders; a light decoder, normalised patches, as MAE.
    """

    name = "spark"

    def wire(self, backbone: Any, mask: float = 0.6, width: int = 64) -> None:
        self.backbone, self.mask = backbone, mask
        self.mask_token = nn.Parameter(torch.randn(1, backbone.feature_dim, 1, 1) * 0.02)
        self.decoder = nn.Sequential(
            nn.Conv2d(backbone.feature_dim, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, self.side**2 * self.channels, 1),
        )
        self._shown: Tensor | None = None
        for name in ("maxpool", "layer1", "layer2", "layer3", "layer4"):
            stage = getattr(backbone.timm_model, name, None)
            if stage is not None:
                stage.register_forward_hook(self._empty)

    def _empty(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output if self._shown is None else output * F.interpolate(self._shown, output.shape[-2:])

    def forward(self, views: Any, keys: Tensor | None = None, details: bool = False) -> dict[str, Tensor]:
        (images,), _ = self.checked(views, keys)
        images = self.normalize(images)
        _, hidden = shown_and_hidden(len(images), self.rows**2, self.mask, images.device)
        mask = images.new_zeros(len(images), self.rows**2, 1).scatter(1, hidden[..., None], 1.0)
        self._shown = 1 - mask.mT.reshape(-1, 1, self.rows, self.rows)
        cells = self.backbone(images * (1 - _as_image(mask, self.rows, self.side))).feature_map
        filled = cells * self._shown + self.mask_token * (1 - self._shown)
        self._shown = None
        predicted = taken(self.decoder(filled).flatten(2).mT, hidden)
        target = taken(normalised(patches_of(images, self.side)), hidden)
        return {"loss": F.mse_loss(predicted.float(), target)}


def _as_image(mask: Tensor, rows: int, side: int) -> Tensor:
    """(B, cells, 1) as an image (B, 1, H, W)."""
    grid = mask.mT.reshape(-1, 1, rows, rows)
    return grid.repeat_interleave(side, 2).repeat_interleave(side, 3)


class DINO(Rival):
    """DINO (Caron et al. 2021) with two global views: the student predicts the teacher's output for the other view."""

    name, n_views, default_backbone = "dino", 2, "student"

    def wire(self, backbone: Any, ema: float = 0.99, temperature: float = 0.04, outputs: int = 1024) -> None:
        self.student = backbone
        self.student_head = ProjectionHead(backbone.feature_dim, outputs, 512, 256)
        self.teacher = copy.deepcopy(backbone).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.student_head).requires_grad_(False)
        self.distillation = DistillationLoss(outputs, 0.1, temperature, 0.9)
        self.register_buffer("temperature", torch.tensor(temperature))
        self.ema = ema

    def _read(self, network: nn.Module, images: Tensor) -> Tensor:
        features = network(self.normalize(images))
        return features.pooled if features.class_token is None else features.class_token

    def forward(self, views: Any, keys: Tensor | None = None, details: bool = False) -> dict[str, Tensor]:
        (first, second), _ = self.checked(views, keys)
        student = self.student_head(self._read(self.student, torch.cat([first, second])))
        with torch.no_grad():
            teacher = self.teacher_head(self._read(self.teacher, torch.cat([second, first])))
        loss = self.distillation(student, teacher, self.temperature)
        if self.training:
            self.distillation.collect(teacher)
            self.distillation.update_center()
        return {"loss": loss}

    def before_optimizer_step(self, step: int, total_steps: int) -> None:
        if step < math.ceil(0.01 * total_steps):
            self.student_head.last_layer.grad = None

    def after_step(self, step: int, total_steps: int) -> None:
        momentum = cosine_momentum(self.ema, step, total_steps)
        update_ema(self.teacher, self.student, momentum)
        update_ema(self.teacher_head, self.student_head, momentum)


class LeJEPA(Rival):
    """LeJEPA (Balestriero and LeCun 2025): views meet in one embedding, which SIGReg keeps a standard normal."""

    name, n_views = "lejepa", 2

    def wire(self, backbone: Any, weight: float = 0.05, outputs: int = 64, hidden: int = 512) -> None:
        self.backbone, self.weight = backbone, weight
        self.projector = Mlp(backbone.feature_dim, hidden, outputs, norm_layer=nn.BatchNorm1d)
        self.normality = SIGReg()

    def forward(self, views: Any, keys: Tensor | None = None, details: bool = False) -> dict[str, Tensor]:
        views, _ = self.checked(views, keys)
        pooled = self.backbone(self.normalize(torch.cat(list(views)))).pooled
        embedded = self.projector(pooled).float().unflatten(0, (2, -1))
        agreement = (embedded - embedded.mean(dim=0)).square().mean()
        return {"loss": (1 - self.weight) * agreement + self.weight * self.normality(embedded)}


class SIGReg(nn.Module):
    """How far random one-dimensional views of embeddings are from a standard normal (Epps and Pulley's statistic)."""

    def __init__(self, knots: int = 17, slices: int = 256) -> None:
        super().__init__()
        points = torch.linspace(0, 3, knots)
        weights = torch.full((knots,), 2 * 3 / (knots - 1))
        weights[[0, -1]] /= 2
        self.slices = slices
        self.register_buffer("points", points, persistent=False)
        self.register_buffer("normal", torch.exp(-points.square() / 2), persistent=False)
        self.register_buffer("weights", weights * torch.exp(-points.square() / 2), persistent=False)

    def forward(self, embedded: Tensor) -> Tensor:
        """Of embeddings (view, image, dim)."""
        directions = torch.randn(embedded.shape[-1], self.slices, device=embedded.device)
        along = (embedded @ F.normalize(directions, dim=0))[..., None] * self.points
        error = (along.cos().mean(dim=1) - self.normal).square() + along.sin().mean(dim=1).square()
        return ((error @ self.weights) * embedded.shape[1]).mean()


RIVALS = {rival.name: rival for rival in (SimMIM, MAE, SparK, DINO, LeJEPA)}
