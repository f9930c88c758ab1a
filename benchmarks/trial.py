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
    ) -> None:
        self.backbone, self.o = backbone, dict(locals())
        self.keep_share, self.where, self.target, self.agree, self.second = keep, where, target, agree, second
        self.weight, self.recon, self.filter_share, self.ptype, self.mix = weight, recon, filter_share, ptype, mix
        self.temperature, self.sig = temperature, sig
        size = self.rows * self.side
        if filter in ("fixed", "com"):
            self.filter = masking_filter(
                filter, (size, size), False, radius=radius if filter == "fixed" else "auto",
                low_pass_share=low_pass_share if filter == "fixed" else "auto", com_fractions=com_fractions,
                com_share=0.5, magnitude="luma", softness=0.0,
            )
        elif filter == "none":
            self.filter = None
        else:
            self.filter = build_filter(filter, (size, size))
        self.n_views = 1 if agree == "none" else 2
        dim = backbone.feature_dim
        if backbone.is_vit:
            self.embed = nn.Linear(dim, width)
            self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
            self.position = nn.Parameter(torch.randn(1, self.rows**2, width) * 0.02)
            self.blocks = nn.Sequential(*[Block(width, 4, qkv_bias=True) for _ in range(depth)])
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, self.side**2 * self.channels)
            if mix:
                self.mixture = nn.Parameter(torch.zeros(len(backbone.timm_model.blocks)))
        else:
            self.mask_token = nn.Parameter(torch.zeros(1, 3, 1, 1))
            layers: list[nn.Module] = []
            for number in range(depth):
                layers += [nn.Conv2d(width if number else dim, width, 3, padding=1), nn.BatchNorm2d(width), nn.GELU()]
            self.head = nn.Sequential(*layers, nn.Conv2d(width if depth else dim, self.side**2 * self.channels, 1))
        if agree != "none":
            layers = [nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.GELU()]
            layers += [nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.GELU(), nn.Linear(hidden, outputs)]
            self.projector = nn.Sequential(*layers)
            self.normality = SIGReg()
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

    def goal(self, images: Tensor) -> Tensor:
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
        if self.recon:
            if self.backbone.is_vit:
                full = torch.cat([self.embed(cells), self.mask_token.expand(len(x), hidden.shape[1], -1)], dim=1)
                full = taken(full, torch.cat([shown, hidden], dim=1).argsort(dim=1)) + self.position
                predicted = self.head(self.norm(self.blocks(full)))
            else:
                predicted = self.head(cells).flatten(2).mT
            target = self.goal(images)
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
