"""Claim: our MFM step is faster than a straightforward one of the same network, in the same and in full precision.

The rival is what the paper's equations suggest when written down as they stand: whole complex spectra shifted to
the centre (`fft2`, `fftshift`) for the filter and twice for the loss, masks that a loader made, AdamW as a loop over
parameters. Ours: half spectra, one transform of the difference, masks drawn in the step, fused AdamW, and the
precision that `--precision auto` chooses on this machine. Both are whole steps on images that are there already, in
turns in one run.

    python benchmarks/straightforward.py                          # ViT-B/16 and ResNet-50, 224 pixels, batch 8
    python benchmarks/straightforward.py --backbone vit_small_patch16_224 --rounds 3
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from record import write_record
from step import Row, Work, show, take_turns
from torch import Tensor, nn

from freqmask.methods import build_method
from freqmask.training.auto import choose_precision
from freqmask.training.optim import OptimConfig, build_optimizer

RESULTS = Path(__file__).parent / "results" / "straightforward.csv"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", nargs="+", default=["vit_base_patch16_224", "resnet50"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rows = [row for backbone in arguments.backbone for row in table(backbone, arguments)]
    show(rows)
    write_record(RESULTS, rows, arguments.device, precision_chosen=choose_precision(arguments.device).reason)


def table(backbone: str, arguments: argparse.Namespace) -> list[Row]:
    """Ours and the rival's steps in both precisions, all in turns."""
    device = torch.device(arguments.device)
    works = {
        f"{who} {precision}": make(backbone, arguments, device, precision == "bf16")
        for precision in ("fp32", "bf16")
        for who, make in (("ours", ours), ("straightforward", straightforward), ("network alone", alone))
    }
    times = take_turns(works, arguments.rounds, device)
    chosen = "bf16" if choose_precision(device.type).value == "bf16-mixed" else "fp32"
    return [
        {
            "step": name,
            "backbone": backbone,
            "batch": arguments.batch,
            "ms_a_step": round(1000 * seconds, 1),
            "chosen_here": name == f"ours {chosen}",
            "over_straightforward_fp32": round(times["straightforward fp32"] / seconds, 2),
            "over_straightforward_same_precision": round(
                times[f"straightforward {name.split()[-1]}"] / seconds, 2
            ),
        }
        for name, seconds in times.items()
    ]


def ours(backbone: str, arguments: argparse.Namespace, device: torch.device, bf16: bool) -> Work:
    method: Any = build_method("mfm", backbone=backbone, image_size=arguments.size).to(device).train()
    if method.backbone.is_cnn:
        method.to(memory_format=torch.channels_last)  # as a run does
    optimizer = build_optimizer(method, OptimConfig(1e-4, 0.0, 0.0, 0, 1))
    images = torch.rand(arguments.batch, 3, arguments.size, arguments.size, device=device)
    keys = torch.arange(arguments.batch, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = method([images], keys)["loss"]
        finish(loss, method, optimizer)

    return step


def straightforward(backbone: str, arguments: argparse.Namespace, device: torch.device, bf16: bool) -> Work:
    """The same network around plain code for filter, loss and optimiser."""
    network: Any = build_method("mfm", backbone=backbone, image_size=arguments.size).to(device).train()
    decayed = [p for p in network.parameters() if p.requires_grad and p.ndim > 1]
    free = [p for p in network.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), foreach=False, fused=False)
    images = torch.rand(arguments.batch, 3, arguments.size, arguments.size, device=device)
    keep = masks_of_a_loader(arguments.batch, arguments.size).to(device)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))

    def step() -> None:
        with torch.no_grad():
            spectrum = torch.fft.fftshift(torch.fft.fft2(images, norm="ortho"), dim=(-2, -1))
            back = torch.fft.ifft2(torch.fft.ifftshift(spectrum * keep, dim=(-2, -1)), norm="ortho")
            filtered = (back.real.clamp(0, 1) - mean) / std
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            features = network.backbone(filtered)
            prediction = network.decoder(features.feature_map, images.shape[-2:])
        loss = spectrum_loss(prediction.float(), (images - mean) / std, keep)
        finish(loss, network, optimizer)

    return step


def alone(backbone: str, arguments: argparse.Namespace, device: torch.device, bf16: bool) -> Work:
    """Backbone and decoder forward and backward in the rival's memory layout: no rival's step can be shorter."""
    network: Any = build_method("mfm", backbone=backbone, image_size=arguments.size).to(device).train()
    images = torch.rand(arguments.batch, 3, arguments.size, arguments.size, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            prediction = network.decoder(network.backbone(images).feature_map, images.shape[-2:])
        prediction.float().mean().backward()
        network.zero_grad(set_to_none=True)

    return step


def masks_of_a_loader(batch: int, size: int) -> Tensor:
    """Low-pass and high-pass masks in turns over the whole, shifted spectrum: (batch, 1, size, size)."""
    place = torch.arange(size) - size // 2
    low = (place[:, None] ** 2 + place[None, :] ** 2 < (16 * size / 224) ** 2).float()
    return torch.stack([low if number % 2 else 1 - low for number in range(batch)])[:, None]


def spectrum_loss(prediction: Tensor, target: Tensor, keep: Tensor) -> Tensor:
    """The released form: two whole spectra, a distance at each frequency, the mean over the hidden ones."""
    first, second = (
        torch.fft.fftshift(torch.fft.fft2(image, norm="ortho"), dim=(-2, -1))
        for image in (prediction, target)
    )
    distance = torch.sqrt((first.real - second.real) ** 2 + (first.imag - second.imag) ** 2 + 1e-12)
    weight = (1 - keep).expand_as(distance)
    return (distance * weight).sum() / weight.sum()


def finish(loss: Tensor, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None], 3.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
