"""Trials of what our own method could be: every idea one option (docs/log.md)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from benchmarks.rivals import Rival, SIGReg, normalised, patches_of, shown_and_hidden, taken
from freqmask.draws import combine
from freqmask.filters import build_filter
from freqmask.methods.masking import masking_filter
from freqmask.spectrum import frequency_radius, irfft2, rfft2


class Trial(Rival):
    name = "trial"

    def wire(
        self,
        backbone: Any,
        filter: str = "fixed",
        radius: Any = "auto",
        low_pass_share: float = 0.3,
        filter_share: float = 1.0,
        keep: float = 0.5,
        depth: int = 2,
        width: int = 64,
        mix: bool = False,
        target: str = "patch",
        alpha: float = 1.0,
        where: str = "all",
        agree: str = "none",
        weight: float = 1.0,
        recon: float = 1.0,
        outputs: int = 128,
        hidden: int = 512,
        second: str = "filtered",
        ptype: str = "mean",
        temperature: float = 0.2,
        sig: float = 0.05,
        com_fractions: Any = (0.005, 0.01, 0.05),
        glob: float = 0.0,
        grid: int = 2,
        words: int = 256,
        extra: float = 0.0,
        jitter: bool = True,
        mlp: bool = False,
        teacher: float = 0.0,
        teacher_size: int = 96,
    ) -> None:
        self.backbone, self.o = backbone, dict(locals())
        self.keep_share, self.where, self.target, self.agree, self.second = keep, where, target, agree, second
        self.weight, self.recon, self.filter_share, self.ptype, self.mix = (
            weight,
            recon,
            filter_share,
            ptype,
            mix,
        )
        self.temperature, self.sig = temperature, sig
        size = self.rows * self.side
        if filter in ("fixed", "com"):
            self.filter = masking_filter(
                filter,
                (size, size),
                False,
                radius=radius if filter == "fixed" else "auto",
                low_pass_share=low_pass_share if filter == "fixed" else "auto",
                com_fractions=com_fractions,
                com_share=0.5,
                magnitude="luma",
                softness=0.0,
            )
        elif filter == "none":
            self.filter = None
        else:
            self.filter = build_filter(filter, (size, size))
        self.n_views = 1 if agree == "none" else 2
        self.glob, self.grid, self.extra, self.jitter = glob, grid, extra, jitter
        goal_dim = words if target == "words" else self.side**2 * self.channels
        self.words = Words(words) if target == "words" or glob or extra else None
        if glob:
            out = words * grid**2
            self.to_glob = (
                nn.Sequential(
                    nn.BatchNorm1d(backbone.feature_dim),
                    nn.Linear(backbone.feature_dim, 256),
                    nn.GELU(),
                    nn.Linear(256, out),
                )
                if mlp
                else nn.Sequential(nn.BatchNorm1d(backbone.feature_dim), nn.Linear(backbone.feature_dim, out))
            )
        dim = backbone.feature_dim
        if backbone.is_vit:
            self.embed = nn.Linear(dim, width)
            self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
            self.position = nn.Parameter(torch.randn(1, self.rows**2, width) * 0.02)
            self.blocks = nn.Sequential(*[Block(width, 4, qkv_bias=True) for _ in range(depth)])
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, goal_dim)
            if mix:
                self.mixture = nn.Parameter(torch.zeros(len(backbone.timm_model.blocks)))
        else:
            self.mask_token = nn.Parameter(torch.zeros(1, 3, 1, 1))
            layers: list[nn.Module] = []
            for number in range(depth):
                layers += [
                    nn.Conv2d(width if number else dim, width, 3, padding=1),
                    nn.BatchNorm2d(width),
                    nn.GELU(),
                ]
            self.head = nn.Sequential(*layers, nn.Conv2d(width if depth else dim, goal_dim, 1))
        if agree != "none":
            layers = [nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.GELU()]
            layers += [
                nn.Linear(hidden, hidden),
                nn.BatchNorm1d(hidden),
                nn.GELU(),
                nn.Linear(hidden, outputs),
            ]
            self.projector = nn.Sequential(*layers)
            self.normality = SIGReg()
        self.teach = teacher
        if teacher:
            self.teacher = Teacher(teacher_size)
            self.to_teacher = nn.Sequential(
                nn.BatchNorm1d(dim), nn.Linear(dim, 512), nn.GELU(), nn.Linear(512, 1280)
            )
        radius_map = frequency_radius(size, size).float()
        self.register_buffer("gain", (radius_map / radius_map[radius_map > 0].min()).clamp_min(1.0) ** alpha)

    def filtered(self, images: Tensor, keys: Tensor) -> Tensor:
        if self.filter is None:
            return images
        out = self.filter(images, keys).images.clamp(0, 1)
        if self.filter_share >= 1:
            return out
        use = torch.rand(len(images), device=images.device) < self.filter_share
        return torch.where(use[:, None, None, None], out, images)

    def encode_vit(self, images: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        model: Any = self.backbone.timm_model
        tokens = model.patch_embed(images) + model.pos_embed[:, 1:]
        shown, hidden = shown_and_hidden(len(images), tokens.shape[1], 1 - share, images.device)
        first = (model.cls_token + model.pos_embed[:, :1]).expand(len(images), -1, -1)
        x = torch.cat([first, taken(tokens, shown)], dim=1)
        if self.mix:
            outs = []
            for block in model.blocks:
                x = block(x)
                outs.append(F.layer_norm(x, x.shape[-1:]))
            mixed = sum(w * o for w, o in zip(self.mixture.softmax(0), outs, strict=True))
            x = model.norm(x)
            return x, mixed[:, 1:], shown, hidden
        x = model.norm(model.blocks(x))
        return x, x[:, 1:], shown, hidden

    def goal(self, images: Tensor, raw: Tensor) -> Tensor:
        if self.target == "words":
            return self.words.at(raw, self.rows).flatten(2).mT
        if self.target == "white":
            size = (images.shape[-2], images.shape[-1])
            images = irfft2(rfft2(images) * self.gain, size)
            images = images / images.std(dim=(1, 2, 3), keepdim=True).clamp_min(1e-4)
            return patches_of(images, self.side)
        patches = patches_of(images, self.side)
        return normalised(patches) if self.target == "patch" else patches

    def forward(self, views: Any, keys: Tensor | None = None, details: bool = False) -> dict[str, Tensor]:
        views, keys = self.checked(views, keys)
        inputs = [self.filtered(view, combine(keys, number)) for number, view in enumerate(views)]
        if len(views) == 2 and self.second == "natural":
            inputs[1] = views[1]
        x, images = self.normalise(torch.cat(inputs)), self.normalise(torch.cat(list(views)))
        if self.backbone.is_vit:
            encoded, cells, shown, hidden = self.encode_vit(x, self.keep_share)
            pooled = encoded[:, 0] if self.ptype == "token" else encoded[:, 1:].mean(1)
        else:
            if self.keep_share < 1:
                _, hidden = shown_and_hidden(len(x), self.rows**2, 1 - self.keep_share, x.device)
                mask = x.new_zeros(len(x), self.rows**2, 1).scatter(1, hidden[..., None], 1.0)
                grid = mask.mT.reshape(-1, 1, self.rows, self.rows)
                blocked = grid.repeat_interleave(self.side, 2).repeat_interleave(self.side, 3)
                x = x * (1 - blocked) + self.mask_token * blocked
            features = self.backbone(x)
            cells, pooled = features.feature_map, features.pooled
        loss = x.new_zeros(())
        if self.words is not None and not self.words.fitted:
            self.words.fit(views[0])
        found = self.words(torch.cat(list(views))) if self.words is not None else None
        if self.glob:
            loss = loss + self.glob * F.mse_loss(
                self.to_glob(pooled).float(), self.words.at(found, self.grid).flatten(1)
            )
        if self.teach:
            told = self.teacher(torch.cat(list(views)))
            loss = loss + self.teach * F.mse_loss(self.to_teacher(pooled).float(), told)
        if self.recon:
            if self.backbone.is_vit:
                full = torch.cat(
                    [self.embed(cells), self.mask_token.expand(len(x), hidden.shape[1], -1)], dim=1
                )
                full = taken(full, torch.cat([shown, hidden], dim=1).argsort(dim=1)) + self.position
                predicted = self.head(self.norm(self.blocks(full)))
            else:
                predicted = self.head(cells).flatten(2).mT
            target = self.goal(images, found)
            if self.where == "hidden" and self.keep_share < 1:
                predicted, target = taken(predicted, hidden), taken(target, hidden)
            loss = loss + self.recon * F.mse_loss(predicted.float(), target)
        if self.agree != "none":
            z = self.projector(pooled).float().unflatten(0, (2, -1))
            loss = loss + self.weight * self.agreement(z)
        return {"loss": loss}

    def agreement(self, z: Tensor) -> Tensor:
        if self.agree == "sigreg":
            inv = (z - z.mean(0)).square().mean()
            return (1 - self.sig) * inv + self.sig * self.normality(z)
        if self.agree == "infonce":
            a, b = F.normalize(z[0], dim=-1), F.normalize(z[1], dim=-1)
            both = torch.cat([a, b])
            sim = both @ both.T / self.temperature
            n = len(a)
            sim = sim.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), -1e9)
            label = torch.cat([torch.arange(n, 2 * n, device=z.device), torch.arange(n, device=z.device)])
            return F.cross_entropy(sim, label)
        inv = F.mse_loss(z[0], z[1])
        centred = z - z.mean(1, keepdim=True)
        var = F.relu(1 - (centred.var(1) + 1e-4).sqrt()).mean()
        cov = centred.mT @ centred / (z.shape[1] - 1)
        off = cov.square().sum((1, 2)) - cov.diagonal(dim1=1, dim2=2).square().sum(1)
        return inv + var + 0.04 * (off / z.shape[-1]).mean()


class Words(nn.Module):
    """Visual words of whitened patches, found once in the first batch: which words stand in each cell of an image."""

    def __init__(self, count: int, side: int = 6) -> None:
        super().__init__()
        self.count, self.side, self.fitted = count, side, False
        self.register_buffer("weight", torch.zeros(count, 3, side, side))
        self.register_buffer("offset", torch.zeros(count))
        self.register_buffer("means", torch.zeros(2, count))
        self.register_buffer("scales", torch.ones(2, count))

    @torch.no_grad()
    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def fit(self, images: Tensor) -> None:
        images = images.float()
        some = F.unfold(images, self.side, stride=3).mT.flatten(0, 1)
        some = some[torch.randperm(len(some), device=some.device)[:20000]]
        some = (some - some.mean(1, keepdim=True)) / (some.var(1, keepdim=True, unbiased=False) + 1e-3).sqrt()
        mean = some.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov((some - mean).mT))
        whiten = vectors @ torch.diag((values + 0.1 * values.mean()).rsqrt()) @ vectors.mT
        some = F.normalize((some - mean) @ whiten, dim=1)
        words = some[: self.count].clone()
        for _ in range(8):
            nearest = (some @ words.mT).argmax(1)
            words = F.normalize(torch.zeros_like(words).index_add_(0, nearest, some) + 1e-6 * words, dim=1)
        self.weight.copy_((whiten @ words.mT).mT.reshape(self.weight.shape))
        self.offset.copy_(mean @ whiten @ words.mT)
        self.fitted = True
        found = self.raw(images)
        for number, grid in enumerate((8, 2)):
            cells = F.adaptive_avg_pool2d(found, grid)
            self.means[number] = cells.mean((0, 2, 3))
            self.scales[number] = cells.std((0, 2, 3)).clamp_min(1e-4)

    def raw(self, images: Tensor) -> Tensor:
        padded = F.pad(images, [2] * 4, mode="reflect")
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(torch.cpu._is_avx512_bf16_supported())):
            found = F.conv2d(padded, self.weight, stride=2)
        grey = padded.mean(1, keepdim=True)
        mean = F.avg_pool2d(grey, self.side, 2)
        variance = F.avg_pool2d(padded.square().mean(1, keepdim=True), self.side, 2) - mean.square()
        scale = (variance.clamp_min(0) + 1e-3).rsqrt()
        found = (found - mean * self.weight.sum((1, 2, 3))[:, None, None]) * scale - self.offset[
            :, None, None
        ]
        return F.avg_pool2d(F.relu(found - found.mean(1, keepdim=True)), 2)

    @torch.no_grad()
    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, images: Tensor) -> Tensor:
        return self.raw(images.float()).float()

    def at(self, found: Tensor, grid: int) -> Tensor:
        number = 0 if grid > 3 else 1
        return (F.adaptive_avg_pool2d(found, grid) - self.means[number][:, None, None]) / self.scales[number][
            :, None, None
        ]


class Teacher(nn.Module):
    """EfficientNet-Lite0 with public ImageNet weights, frozen; features standardised by the first batch."""

    def __init__(self, size: int) -> None:
        super().__init__()
        import os

        import timm

        self.size, self.known = size, False
        model = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
        state = torch.load(os.environ["TEACHER"], map_location="cpu", weights_only=True)
        names = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
        values = [value for name, value in state.items() if not name.endswith("num_batches_tracked")]
        model.load_state_dict(dict(zip(names, values, strict=True)), strict=False)
        model.reset_classifier(0)
        self.model = model.requires_grad_(False)
        self.register_buffer("mean", torch.zeros(1280))
        self.register_buffer("std", torch.ones(1280))

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)

    @torch.no_grad()
    def raw(self, images: Tensor) -> Tensor:
        larger = F.interpolate(images, size=(self.size, self.size), mode="bicubic", align_corners=False)
        return self.model((larger - 0.5) / 0.5).float()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        told = self.raw(images)
        if not self.known:
            self.mean.copy_(told.mean(0))
            self.std.copy_(told.std(0).clamp_min(1e-3))
            self.known = True
        return (told - self.mean) / self.std
