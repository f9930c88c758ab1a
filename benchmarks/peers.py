"""Claim: FOLK costs no more than DINO with the same views, MFM less than SimMIM.

Full training steps (forward, backward, clip, AdamW, moving average) of our methods beside lightly's documented
modules, put together as its documentation does: the same timm backbone, the same views in, head sizes, outputs,
batch, precision and compilation of the backbone, the same optimiser, all in turns in one run. Images are already
there (decoding and augmentation are the same work for all). FOLK works on two global views; so does DINO here.

    pip install "lightly>=1.6"     # for this comparison alone, not a dependency
    python benchmarks/peers.py                                   # CPU sizes
    python benchmarks/peers.py --device cuda --batch 256 --precision bf16 --compile
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import resource
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightly
import timm
import torch
from lightly.loss import DINOLoss
from lightly.models import utils
from lightly.models.modules import DINOProjectionHead, MAEDecoderTIMM, MaskedVisionTransformerTIMM
from record import show, write_record
from step import Row, Work, compile_parts, method_works, stepper, take_turns, timm_arguments
from torch import Tensor, nn

from freqmask.methods import build_method

RESULTS = Path(__file__).parent / "results" / "peers.csv"
OUTPUTS, HIDDEN, BOTTLENECK = 65_536, 2_048, 256  # DINO's, and FOLK's defaults


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of lightly's own modules
    rows = table(arguments, torch.device(arguments.device))
    show(rows)
    write_record(RESULTS, rows, arguments.device, timm=timm.__version__, lightly=lightly.__version__)


def table(arguments: argparse.Namespace, device: torch.device) -> list[Row]:
    """One row a method; the last columns set it beside each rival."""
    makers = all_makers(arguments, device)
    memory = {name: peak_megabytes(make, device) for name, make in makers.items()}
    works = {name: make() for name, make in makers.items()}
    times = take_turns(works, arguments.rounds, device)
    return [
        {
            "method": name,
            "backbone": arguments.backbone,
            "precision": arguments.precision,
            "compile": arguments.compile,
            "batch": arguments.batch,
            "ms_a_step": round(1000 * seconds, 1),
            "images_per_second": round(arguments.batch / seconds, 1),
            "peak_MB": memory[name],
            "speed_over_simmim": round(times["simmim"] / seconds, 3),
            "speed_over_mae": round(times["mae"] / seconds, 3),
            "speed_over_dino": round(times["dino"] / seconds, 3),
        }
        for name, seconds in times.items()
    ]


def in_turns(
    arguments: argparse.Namespace, device: torch.device, failed: Callable[[str, str], None]
) -> dict[str, float]:
    """Seconds of a step of each method; one that fails is told, and left out."""
    works: dict[str, Work] = {}
    for name, make in all_makers(arguments, device).items():
        try:
            work = make()
            take_turns({name: work}, 0, device)
            works[name] = work
        except Exception as error:
            failed(name, (str(error).strip().splitlines() or [type(error).__name__])[0][:200])
    return take_turns(works, arguments.rounds, device, arguments.repeats)


def all_makers(arguments: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], Work]]:
    """How each method's step is put together."""
    return {
        "mfm": lambda: method_works("mfm", arguments.backbone, arguments, device)["step"],
        "mfm-com": lambda: method_works("mfm-com", arguments.backbone, arguments, device)["step"],
        "mfm's network": lambda: network_step(arguments, device),
        "folk": lambda: method_works("folk", arguments.backbone, arguments, device)["step"],
        "simmim": lambda: masked_step(SimMIM(vit(arguments)), arguments, device),
        "mae": lambda: masked_step(MAE(vit(arguments)), arguments, device),
        "dino": lambda: dino_step(arguments, device),
    }


def network_step(arguments: argparse.Namespace, device: torch.device) -> Work:
    """MFM's encoder and decoder with nothing of frequencies: no step of MFM can be faster."""
    more = getattr(arguments, "model", {})
    method: Any = build_method("mfm", backbone=arguments.backbone, image_size=arguments.size, **more).to(
        device
    )
    compile_parts(method.backbone, arguments)
    images = torch.randn(arguments.batch, 3, arguments.size, arguments.size, device=device)
    (backbone,) = method.backbones().values()

    def loss() -> Tensor:
        prediction = method.decoder(backbone(images).feature_map, images.shape[-2:])
        return nn.functional.l1_loss(prediction, images)

    return stepper(method, loss, arguments)


def vit(arguments: argparse.Namespace) -> nn.Module:
    more = timm_arguments(arguments.backbone, arguments)
    model: nn.Module = timm.create_model(arguments.backbone, num_classes=0, **more)
    return model


class SimMIM(nn.Module):
    """lightly's SimMIM: mask tokens at three quarters of the patches, a linear decoder, L1 on those."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.patch_size = backbone.patch_embed.patch_size[0]
        self.backbone = MaskedVisionTransformerTIMM(vit=backbone)
        self.decoder = nn.Linear(backbone.embed_dim, self.patch_size**2 * 3)

    def forward(self, images: Tensor) -> Tensor:
        shape = (len(images), self.backbone.sequence_length)
        _, hidden = utils.random_token_mask(size=shape, mask_ratio=0.75, device=images.device)
        encoded = self.backbone.encode(images=images, idx_mask=hidden)
        prediction = self.decoder(utils.get_at_index(encoded, hidden))
        target = utils.get_at_index(utils.patchify(images, self.patch_size), hidden - 1)
        return nn.functional.l1_loss(prediction, target)


class MAE(nn.Module):
    """lightly's MAE: the encoder sees a quarter of the patches, a small transformer decodes all."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.patch_size = backbone.patch_embed.patch_size[0]
        self.backbone = MaskedVisionTransformerTIMM(vit=backbone)
        self.decoder = MAEDecoderTIMM(
            num_patches=backbone.patch_embed.num_patches,
            patch_size=self.patch_size,
            embed_dim=backbone.embed_dim,
            decoder_embed_dim=512,
            decoder_depth=1,
            decoder_num_heads=16,
        )

    def forward(self, images: Tensor) -> Tensor:
        shape = (len(images), self.backbone.sequence_length)
        kept, hidden = utils.random_token_mask(size=shape, mask_ratio=0.75, device=images.device)
        encoded = self.decoder.embed(self.backbone.encode(images=images, idx_keep=kept))
        tokens = utils.repeat_token(self.decoder.mask_token, shape)
        tokens = utils.set_at_index(tokens, kept, encoded.type_as(tokens))
        prediction = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), hidden))
        target = utils.get_at_index(utils.patchify(images, self.patch_size), hidden - 1)
        return nn.functional.mse_loss(prediction, target)


def masked_step(model: Any, arguments: argparse.Namespace, device: torch.device) -> Work:
    model = model.to(device).train()
    compile_parts(model.backbone.vit, arguments)
    images = torch.randn(arguments.batch, 3, arguments.size, arguments.size, device=device)
    return stepper(model, lambda: model(images), arguments)


class DINO(nn.Module):
    """lightly's DINO with two global views and no small ones."""

    def __init__(self, backbone: nn.Module, width: int, outputs: int) -> None:
        super().__init__()
        sizes = (width, HIDDEN, BOTTLENECK, outputs)
        self.student = backbone
        self.student_head = DINOProjectionHead(*sizes, freeze_last_layer=1)
        self.teacher = copy.deepcopy(backbone)
        self.teacher_head = DINOProjectionHead(*sizes)
        utils.deactivate_requires_grad(self.teacher)
        utils.deactivate_requires_grad(self.teacher_head)
        self.loss = DINOLoss(output_dim=outputs)

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            teacher = [self.teacher_head(self.teacher(view)) for view in views]
        student = [self.student_head(self.student(view)) for view in views]
        loss: Tensor = self.loss(teacher, student, epoch=1)
        return loss

    def follow(self) -> None:
        utils.update_momentum(self.student, self.teacher, m=0.996)
        utils.update_momentum(self.student_head, self.teacher_head, m=0.996)


def dino_step(arguments: argparse.Namespace, device: torch.device) -> Work:
    backbone: Any = vit(arguments)
    model = DINO(backbone, backbone.num_features, getattr(arguments, "outputs", OUTPUTS)).to(device).train()
    for part in (model.student, model.teacher):
        compile_parts(part, arguments)
    shape = (arguments.batch, 3, arguments.size, arguments.size)
    views = [torch.randn(shape, device=device) for _ in range(2)]
    train = stepper(model, lambda: model(views), arguments)

    def step() -> None:
        train()
        model.follow()

    return step


def peak_megabytes(make: Callable[[], Work], device: torch.device) -> int:
    """The most memory that two steps take: of the GPU, or of a process of their own less what torch itself takes."""
    if device.type != "cuda":
        return alone(lambda: peak_of_this_process(make))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work = make()
    work()
    work()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6)


def peak_of_this_process(make: Callable[[], Work]) -> int:
    """Megabytes that this process has held at most, more than now."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work = make()
    work()
    work()
    return round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)


def alone(measure: Callable[[], int]) -> int:
    """What a measurement finds in a forked process, which leaves no memory behind here."""
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    worker = multiprocessing.get_context("fork").Process(target=lambda: theirs.send(measure()))
    worker.start()
    found: int = ours.recv()
    worker.join()
    return found


if __name__ == "__main__":
    main()
