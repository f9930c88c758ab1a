"""UperNet, segmentation-models-pytorch's decoder on a backbone: network, numbers and steps of its training, windows.

The published numbers are BEiT's for ADE20K with self-supervised weights
(https://github.com/microsoft/unilm, upernet_beit_base_12_512_slide_160k_ade20k_pt): 160,000 steps of 16 crops of
512 pixels out of 20,210 images, AdamW (0.9, 0.999), learning rate 7e-4, linear decay after 1,500 steps of warm-up,
weight decay 0.05, layer decay 0.65, drop path 0.1; windows of 512 every 341 pixels. CNNs and hierarchical networks
get 1e-4 and no layer decay (as UperNet on ConvNeXt, roughly), and fresh weights none either.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from timm.layers.drop import DropPath
from torch import Tensor, nn

from freqmask.backbones import Backbone
from freqmask.data.values import Survey
from freqmask.errors import UserError
from freqmask.evaluation.mask_files import IGNORED
from freqmask.evaluation.trainings import AUTO, BETAS, Plan, TrainingNumbers, layer_groups, train_reached
from freqmask.interop.models import OpenedModel, stage_features
from freqmask.spectrum import Images, Normalization, as_float
from freqmask.timm_models import strides
from freqmask.training.auto import Choice
from freqmask.training.loop import ScheduledModule
from freqmask.training.optim import Schedule, make_adamw, parameter_groups, scaled_lr

NETWORK = "network.safetensors"
BATCH, STEPS, IMAGES, WARMUP = 16, 160_000, 20_210, 1_500
LR, LR_OTHERS, WEIGHT_DECAY, LAYER_DECAY, DROP_PATH = 7e-4, 1e-4, 0.05, 0.65, 0.1
CROP, CROP_ON_CPU = 512, 224
SCALE = (0.5, 2.0)
STRIDE_SHARE = 341 / 512  # of the window
_BEIT = "as BEiT on ADE20K"
Network = Callable[[Tensor], Tensor]  # images (B, C, H, W) in [0, 1] -> logits (B, K, h, w)
STRIDES = (4, 8, 16, 32)


class Rescale(nn.Module):
    """A map made 2^steps times as large (BEiT's transposed convolutions), as it is, or pooled (negative steps)."""

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
        return self.enlarge(feature_map)


class FeaturePyramid(nn.Module):
    """The maps that a segmentation decoder takes, finest first.

    Of a plain ViT (one stride throughout) the blocks at 1/4, 1/2, 3/4 and the end, each brought to its stride
    as in BEiT (x4, x2, as it is, /2 for patches of 16). BEiT itself takes the blocks 4, 6, 8 and 12 of 12.
    Of other networks the last four stages as they are.

    All parameters of the backbone are trained from here on, but those that no map depends on.

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
        empty = torch.zeros(1, backbone.channels, *backbone.image_size)
        self.channels = [one.shape[1] for one in train_reached(backbone, lambda: self._maps(empty))]
        # LeViT and its like keep what they compute in evaluation, gradients with it, until they train
        backbone.train().eval()
        wanted = zip(self.channels, STRIDES, strict=True) if self.is_plain else ()
        steps = ((channels, round(math.log2(backbone.stride / stride))) for channels, stride in wanted)
        self.rescale = nn.ModuleList(itertools.starmap(Rescale, steps))

    def forward(self, normalized: Images) -> list[Tensor]:
        """The maps of normalized images."""
        maps = self._maps(normalized)
        return [scale(one) for scale, one in zip(self.rescale, maps, strict=True)] if self.is_plain else maps

    def _maps(self, normalized: Tensor) -> list[Tensor]:
        wanted = sorted(set(self.stages))  # a ViT of less than four blocks gives some of them twice
        features = stage_features(self.backbone, normalized, wanted)
        by_stage = {stage: one.feature_map for stage, one in zip(wanted, features, strict=True)}
        return [by_stage[stage] for stage in self.stages]


AUXILIARY_WEIGHT = 0.4  # of its loss, as in PSPNet and BEiT
AUXILIARY_CHANNELS = 256
DROPOUT = 0.1  # before each classifier
CNN_CHANNELS = 512  # of UperNet's decoder; with a plain ViT, BEiT takes the ViT's own width


class Logits(NamedTuple):
    """Of the decoder, and in training of the auxiliary head; None elsewhere."""

    decoder: Float[Tensor, "batch classes rows columns"]
    auxiliary: Float[Tensor, "batch classes rows columns"] | None


class UperNet(nn.Module):
    """A backbone with UperNet's decoder, as wide as the backbone for a plain ViT, else 512, unless told otherwise.

    Raises:
        UserError: segmentation-models-pytorch is missing, or the backbone has no pyramid.
    """

    def __init__(self, opened: OpenedModel, classes: int, decoder_channels: int | None = None) -> None:
        super().__init__()
        decoder = decoder_class()
        self.pyramid = FeaturePyramid(opened.backbone)
        channels = self.pyramid.channels
        width = decoder_channels or (channels[-1] if self.pyramid.is_plain else CNN_CHANNELS)
        self.decoder_channels = width
        # The decoder counts from the strides 1 and 2, which it does not use.
        self.decoder = decoder([0, 0, *channels], encoder_depth=len(channels) + 1, decoder_channels=width)
        self.classifier = nn.Sequential(nn.Dropout2d(DROPOUT), nn.Conv2d(width, classes, kernel_size=1))
        hidden = min(AUXILIARY_CHANNELS, width)
        self.auxiliary = nn.Sequential(  # FCN on the last map but one: it keeps the gradient short
            nn.Conv2d(channels[-2], hidden, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Dropout2d(DROPOUT),
            nn.Conv2d(hidden, classes, kernel_size=1),
        )
        self.normalize = Normalization(len(opened.mean), opened.mean, opened.std)

    def forward(self, images: Images) -> Logits:
        """Logits of images in [0, 1], at about a quarter of their size."""
        maps = self.pyramid(self.normalize(images))
        decoded = self.classifier(self.decoder([None, None, *maps]))
        return Logits(decoded, self.auxiliary(maps[-2]) if self.training else None)


def segmentation_losses(logits: Logits, masks: Int64[Tensor, "batch height width"]) -> dict[str, Tensor]:
    """Cross-entropy of every pixel that counts: ``loss = decoder + 0.4 auxiliary``.

    Args:
        logits: in training mode.
        masks: classes, ``IGNORED`` where a pixel does not count; all of them may be.
    """
    parts = {"decoder": _cross_entropy(logits.decoder, masks)}
    if logits.auxiliary is not None:
        parts["auxiliary"] = _cross_entropy(logits.auxiliary, masks)
    loss = parts["decoder"] + AUXILIARY_WEIGHT * parts.get("auxiliary", 0.0)
    return {"loss": loss, **parts}


def _cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    height, width = masks.shape[-2:]
    total = F.cross_entropy(resized(logits, (height, width)), masks, ignore_index=IGNORED, reduction="sum")
    return total / (masks != IGNORED).sum().clamp_min(1)  # the plain mean of nothing would be no number


def decoder_class() -> Any:
    """segmentation-models-pytorch's decoder.

    Raises:
        UserError: it is not installed.
    """
    try:
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
    except ModuleNotFoundError as error:
        raise UserError(
            f"segmentation needs segmentation-models-pytorch, and {error.name} is missing; "
            "pip install 'freqmask[seg]'"
        ) from error
    return UPerNetDecoder


@dataclass(frozen=True, kw_only=True)
class Training(TrainingNumbers):
    """Every number of one training."""

    crop: int  # side of the training samples, and of the windows of an evaluation, in pixels
    image_size: int | None  # shorter side that images are brought to first; None leaves them as they are
    scale: tuple[float, float]  # smallest and largest random factor on the image
    decoder_channels: int

    @staticmethod
    def check_parts(numbers: Mapping[str, Any]) -> None:
        batch, devices, parts = (int(numbers[name]) for name in ("batch_size", "devices", "accumulate"))
        images, rest = divmod(batch, devices * parts)
        if rest or images < 2:
            raise UserError(
                f"batch_size ({batch}) over {devices} devices in {parts} parts must leave two images or more at once, "
                "because the decoder has batch norm; take a larger batch_size or a smaller crop"
            )


def choose_crop(asked: Mapping[str, Any], survey: Survey) -> Choice:
    """Side of the samples: BEiT's 512, less for smaller images and on a CPU; a multiple of 32."""
    if asked["crop"] not in (None, AUTO):
        return Choice(int(asked["crop"]), "as asked")
    on_gpu = torch.cuda.is_available() and asked["accelerator"] != "cpu"
    shorter, most = survey.shorter_side, CROP if on_gpu else CROP_ON_CPU
    side = max(32, min(most, shorter) // 32 * 32)
    if side < most:
        return Choice(side, f"the median shorter side is {shorter}")
    return Choice(side, _BEIT if on_gpu else "training runs on the CPU")


@dataclass
class SegmentationPlan(Plan):
    """The numbers of one training as they come together."""

    def resolve(self) -> Training:
        """Every number.

        Raises:
            UserError: numbers do not fit each other.
        """
        values = self.values
        self.take_model()
        values["crop"], self.reasons["crop"] = choose_crop(self.asked, self.job.survey)
        values["image_size"] = self.asked["image_size"]
        values["decoder_channels"] = self.network.decoder_channels
        self.take("scale", SCALE, _BEIT)
        self.take_machine(num_nodes=1, strategy="auto")
        if int(values["devices"]) > 1:
            values["strategy"] = "ddp"
        self._take_length()
        self._take_rates()
        self.take_records(self.CHECKPOINTS)
        return Training.read(values)

    def _take_length(self) -> None:
        values, asked, side = self.values, self.asked, int(self.values["crop"])
        self.take_cost(self.network, (values["channels"], side, side), _trial_loss, BATCH, images=2)
        self.take_batch(lambda *_: Choice(BATCH, _BEIT))
        Training.check_parts(values)
        batch = int(values["batch_size"])
        epochs = asked["epochs"] or STEPS * BATCH / IMAGES
        usual = min(math.ceil(epochs * self.images / batch), STEPS)
        self.take("steps", max(usual, 1), "" if asked["epochs"] else f"{epochs:.0f} epochs, {_BEIT}")
        warmup = max(round(values["steps"] * WARMUP / STEPS), 1)
        self.take("warmup_steps", warmup, f"{WARMUP:,} of {STEPS:,}, {_BEIT}")
        values["warmup_steps"] = min(values["warmup_steps"], values["steps"] - 1)

    def _take_rates(self) -> None:
        plain = self.network.pyramid.is_plain
        base = LR if plain else LR_OTHERS
        self.take("lr", scaled_lr(base, int(self.values["batch_size"]), BATCH), f"{base:g} x batch/{BATCH}")
        self.take("weight_decay", WEIGHT_DECAY, _BEIT)
        if self.job.model.kind == "random":
            self.take("layer_decay", 1.0, "fresh weights have nothing to keep")
        else:
            self.take("layer_decay", LAYER_DECAY if plain else 1.0, _BEIT if plain else "no plain ViT")
        self.take("drop_path", DROP_PATH, _BEIT)
        if not drops_paths(self.network.pyramid.backbone.timm_model):
            self.values["drop_path"] = 0.0

    def lines(self, training: Training) -> Iterator[str]:
        """The plan of a new training."""
        pyramid, (low, high), side = self.network.pyramid, training.scale, training.image_size
        stages = ", ".join(str(stage + 1) for stage in pyramid.stages)
        yield (
            f"model       {self.job.model.name}, {'blocks' if pyramid.is_plain else 'stages'} {stages}; UperNet of "
            f"{training.decoder_channels} channels"
        )
        size = "as large as they are" if side is None else f"shorter side {side}"
        mirrored = "mirrored half of the time" if training.flip else "never mirrored"
        yield (
            f"samples     crops of {training.crop} pixels{self.why('crop')}, images {size}, times {low:g} to {high:g}, "
            f"{mirrored}"
        )
        yield from self.length_lines(training, "samples", "AdamW", "linear to 0")
        yield from self.machine_lines(training)


def _trial_loss(network: UperNet, samples: Tensor) -> Tensor:
    masks = torch.zeros(len(samples), *samples.shape[2:], dtype=torch.int64, device=samples.device)
    return segmentation_losses(network(samples), masks)["loss"]


def drops_paths(model: nn.Module) -> bool:
    return any(isinstance(part, DropPath) for part in model.modules())


class SegmentationModule(ScheduledModule):
    """Trains backbone and decoder."""

    def __init__(self, network: UperNet, training: Training) -> None:
        super().__init__()
        self.network = network
        self.training_numbers = training

    def training_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Tensor]:
        """One part of an optimizer step: the losses of both heads."""
        images, masks = batch["views"]
        losses = segmentation_losses(self.network(as_float(images)), masks.long())
        self.check(losses["loss"])
        return losses

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW: the backbone's layers at learning rates of their own, all that is new at the whole one."""
        numbers = self.training_numbers
        optimizer = make_adamw(groups_of(self.network, numbers), numbers.lr, BETAS, numbers.precision)
        # linear warm-up, then linear decay to nothing (poly of power 1)
        self.schedule = Schedule(optimizer, numbers.optim(0.0, numbers.lr * 1e-6, power=1.0))
        return optimizer


def groups_of(network: UperNet, training: Training) -> list[dict[str, Any]]:
    """The backbone's parameters by layer, those of the decoder and the heads with the factor 1.

    timm gives a backbone without a head the factor 1 at its last block; here the decoder stands above it.
    """
    decay = training.layer_decay
    backbone = network.pyramid.backbone.timm_model
    new = nn.ModuleList([network.pyramid.rescale, network.decoder, network.classifier, network.auxiliary])
    fresh = [{**group, "lr_scale": 1.0} for group in parameter_groups(new, training.weight_decay)]
    old = layer_groups(backbone, training.weight_decay, decay)
    return [*({**group, "lr_scale": decay * group["lr_scale"]} for group in old), *fresh]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side, so that they cover it: the last one ends where the side ends.

    >>> window_starts(100, 40, 30), window_starts(30, 40, 30)
    ([0, 30, 60], [0])
    """
    if length <= window:
        return [0]
    return [min(start, length - window) for start in range(0, length - window + stride, stride)]


def segment_windows(
    logits: Network,
    image: Float[Tensor, "channel height width"],
    window: int,
    stride: int,
    batch_size: int,
    fill: Float[Tensor, " channel"],
) -> Float[Tensor, "classes height width"]:
    """The mean logits of overlapping square windows of an image in [0, 1].

    Window and stride are in pixels, the stride at most the window; ``batch_size`` windows are taken at once, filled up
    where the image is smaller.
    """
    height, width = image.shape[1:]
    padded = image
    if min(height, width) < window:  # else a large image would be copied
        padded = fill.to(image)[:, None, None].expand(-1, max(height, window), max(width, window)).clone()
        padded[:, :height, :width] = image
    corners = list(itertools.product(*(window_starts(side, window, stride) for side in (height, width))))
    total, counts = None, image.new_zeros(padded.shape[1:])
    for first in range(0, len(corners), batch_size):
        some = corners[first : first + batch_size]
        windows = torch.stack([padded[:, top : top + window, left : left + window] for top, left in some])
        batch = resized(logits(windows), (window, window))
        total = batch.new_zeros(batch.shape[1], *padded.shape[1:]) if total is None else total
        for (top, left), window_logits in zip(some, batch, strict=True):
            total[:, top : top + window, left : left + window] += window_logits
            counts[top : top + window, left : left + window] += 1
    assert total is not None  # there is always a window
    return (total / counts)[:, :height, :width]


def resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(logits.shape[-2:]) == size:
        return logits.float()
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


@dataclass
class Predictor:
    """A network on a device."""

    network: UperNet
    training: Training  # how it was trained
    device: torch.device
    batch_size: int  # windows at once
    stride: int = 0  # from window to window in pixels; 0 is two thirds of the crop

    def __post_init__(self) -> None:
        self.network.to(self.device).eval()
        self.stride = self.stride or max(1, round(self.training.crop * STRIDE_SHARE))
        self.fill = torch.tensor(self.training.mean)

    def __call__(
        self, image: Shaped[Tensor, "channel height width"], size: tuple[int, int], inference: str
    ) -> tuple[Int64[np.ndarray, "mask_height mask_width"], bool]:
        """The class of every pixel of the mask, and whether all logits were finite.

        Args:
            image: uint8 or in [0, 1], at the network's input size.
            size: of the mask.
            inference: ``windows`` or ``whole``.
        """
        pixels = as_float(image.to(self.device))
        if inference == "whole":  # in one piece; the network must take its size
            logits = resized(self._logits(pixels[None]), (pixels.shape[1], pixels.shape[2]))[0]
        else:
            crop = self.training.crop
            logits = segment_windows(self._logits, pixels, crop, self.stride, self.batch_size, self.fill)
        classes = resized(logits[None], size)[0].argmax(dim=0)  # logits are resampled, never classes
        return classes.cpu().numpy(), bool(torch.isfinite(logits).all())

    def _logits(self, images: Tensor) -> Tensor:
        kind = torch.bfloat16 if "bf16" in self.training.precision else torch.float16
        with torch.autocast(self.device.type, kind, enabled="mixed" in self.training.precision):
            return self.network(images).decoder
