"""Any timm model as one feature map and one pooled feature."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from freqmask.errors import UserError
from freqmask.spectrum import Images
from freqmask.timm_models import (
    attends_anywhere,
    cannot,
    create_model,
    has_attending_blocks,
    initialise_as_mfm,
    parameters_behind,
    round_up,
    strides,
)

ImageSize = int | tuple[int, int]
FEW_TOKENS = 128


class Features(NamedTuple):
    """What a backbone says about images: a map, its mean and, where the model has one, its class token."""

    feature_map: Float[Tensor, "batch dim rows columns"]
    pooled: Float[Tensor, "batch dim"]
    class_token: Float[Tensor, "batch dim"] | None


class Backbone(nn.Module):
    """A timm model without its classifier, read at one stage.

    Images whose sides the model's stride does not divide are padded at the bottom and the right by repeating
    the edge, so that the map covers every pixel. Parameters that the chosen stage never reaches do not
    require gradients: DDP refuses to train a model that leaves some without.

    Args:
        name: a timm model, or ``local-dir:PATH`` or ``hf-hub:NAME`` as timm writes them.
        image_size: side of the (normalized) images in pixels, or (height, width).
        channels: channels of the images.
        patch_size: side of a patch in pixels; None leaves the model's own.
        stage: the stage whose features are taken, counted as timm does (for a ViT a stage is a block);
            -1 is the last: what the model itself would classify from.
        model_args: timm's own arguments for this model, such as ``{"output_stride": 8}``.
        pretrained: start from timm's public weights.
        initialisation: ``"mfm"`` initializes a ViT as MFM's authors do and leaves other families as timm
            makes them; ``"timm"`` leaves all of them. Public weights stay as they are.
        optional_model_args: like ``model_args``, but left out where the family does not know them.

    Attributes:
        timm_model: the plain timm module.
        feature_dim: channels D of the map.
        stride: pixels of the image per cell of the map.
        is_vit: blocks of attention at one resolution.
        is_cnn: no attention at all (Swin is neither).
        has_class_token: whether ``forward`` gives one.
        settings: the constructor's arguments from ``patch_size`` on.

    Raises:
        UserError: for an unknown name, or a model that cannot do what is asked.
    """

    def __init__(
        self,
        name: str = "vit_small_patch16_224",
        image_size: ImageSize = 224,
        channels: int = 3,
        patch_size: int | None = None,
        stage: int = -1,
        model_args: Mapping[str, Any] | None = None,
        pretrained: bool = False,
        initialisation: Literal["mfm", "timm"] = "mfm",
        optional_model_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if initialisation not in ("mfm", "timm"):
            raise UserError(f"initialisation ({initialisation}) must be 'mfm' or 'timm'")
        self.name, self.stage, self.channels = name, stage, channels
        self.image_size = height_and_width(image_size)
        self.settings: dict[str, Any] = {
            "patch_size": patch_size,
            "stage": stage,
            "model_args": None if model_args is None else dict(model_args),
            "initialisation": initialisation,
        }
        self.timm_model: Any  # timm's methods are its own, nn.Module's type knows none of them
        self.timm_model, self.fixed_size = create_model(
            name, self.image_size, channels, patch_size, model_args, pretrained, optional_model_args
        )
        stage_strides = strides(self.timm_model)
        count = len(stage_strides)
        if not -count <= stage < count:
            raise UserError(f"stage ({stage}) must be between {-count} and {count - 1} for {name}")
        self._reads_the_end = stage in (-1, len(stage_strides) - 1)
        # A model of fixed size has to divide its own coarsest grid, whichever stage is read.
        self._multiple = max(stage_strides) if self.fixed_size else stage_strides[stage]
        self._pass_one_image()
        self.is_vit = len(set(stage_strides)) == 1 and has_attending_blocks(self.timm_model)
        self.is_cnn = self._ends_in_map and not attends_anywhere(self.timm_model)
        has_own_weights = pretrained or ":" in name
        if self.is_vit and initialisation == "mfm" and not has_own_weights:
            initialise_as_mfm(self.timm_model)

    @property
    def padded_size(self) -> tuple[int, int]:
        """Height and width in pixels of what the timm model is given."""
        return round_up(self.image_size, self._multiple)

    def forward(self, images: Images) -> Features:
        """Feature map (B, D, h, w), its mean (B, D) and the class token (B, D) or None."""
        weights = next(self.timm_model.parameters())
        padded = self.padded(images)
        with few_tokens_attention(self.timm_model, cells(padded, self.stride)):
            feature_map, class_token = self._read(padded.to(weights.dtype))  # bf16-true: no autocast casts
        return Features(feature_map, feature_map.mean(dim=(2, 3)), class_token)

    @property
    def can_leave_tokens_out(self) -> bool:
        """Whether it can be given some of an image's patches alone (:meth:`read_tokens`)."""
        return isinstance(self.timm_model, VisionTransformer) and self._reads_the_end

    def read_tokens(
        self, images: Images, places: Int64[Tensor, "batch token"]
    ) -> Float[Tensor, "batch token dim"]:
        """Features of some patches; the model's blocks see no others, and take the time of no others.

        Args:
            images: normalized.
            places: of the patches, row by row from 0, each at most once.
        """
        model, weights = self.timm_model, next(self.timm_model.parameters())
        whole = model.patch_drop
        model.patch_drop = _Chosen(places, model.num_prefix_tokens)
        try:
            with few_tokens_attention(model, places.shape[1]):
                tokens: Tensor = model.forward_features(self.padded(images).to(weights.dtype))
        finally:
            model.patch_drop = whole
        return tokens[:, model.num_prefix_tokens :]

    def compile(self, **options: Any) -> None:
        """Compiles in place, by ``torch.compile``'s options: the blocks of a ViT one by one, else the whole.

        Blocks that are alike share one compiled graph, which is there in a tenth of the time that the graph of
        all of them takes.
        """
        blocks = getattr(self.timm_model, "blocks", None)
        if not self.is_vit or not isinstance(blocks, nn.Sequential | nn.ModuleList):
            super().compile(**options)
            return
        # the tracer looks at the gradient of what a block is given, and torch warns of its own look
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        for block in blocks:
            block.compile(**options)

    def set_gradient_checkpointing(self, enable: bool = True) -> None:
        """Recomputes activations in the backward pass instead of keeping them.

        Raises:
            UserError: if the model does not offer it.
        """
        try:
            self.timm_model.set_grad_checkpointing(enable)
        except (AssertionError, AttributeError, NotImplementedError) as error:
            raise UserError(f"gradient_checkpointing is not offered by {self.name}; leave it off") from error

    def padded(self, images: Images) -> Tensor:
        """The images, repeated at their lower and right edge up to whole cells.

        Raises:
            UserError: for images of other channels, or of another size where the model has one.
        """
        channels, height, width = images.shape[1:]
        if channels != self.channels:
            raise UserError(
                f"images of {channels} channels do not fit {self.name}, built for {self.channels}"
            )
        if self.fixed_size and (height, width) != self.image_size:
            raise UserError(
                f"images of {height}x{width} pixels do not fit {self.name}, built for "
                f"{self.image_size[0]}x{self.image_size[1]}; build it with that image_size"
            )
        below, right = -height % self._multiple, -width % self._multiple
        return F.pad(images, (0, right, 0, below), mode="replicate") if below or right else images

    def _read(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._reads_the_end and self._ends_in_map:
            # EfficientNet and others end in a layer that timm counts to no stage.
            end = self.timm_model.forward_features(images)
            return end.permute(0, 3, 1, 2) if self._ends_channels_last else end, None
        (stage,) = self.timm_model.forward_intermediates(
            images, indices=[self.stage], intermediates_only=True, **self._how
        )
        return (stage[0], stage[1][:, 0]) if self.has_class_token else (stage, None)

    def _pass_one_image(self) -> None:
        """Finds out the map's shape and which parameters it never reaches."""
        model = self.timm_model
        model.eval()  # running statistics stay untouched, and one image is enough for batch norm
        image = torch.zeros(1, self.channels, *self.padded_size)
        try:
            with torch.enable_grad():
                self._find_interface(image)
                feature_map, class_token = self._read(image)
        except (AssertionError, RuntimeError, ValueError, IndexError, TypeError) as error:
            raise cannot(self.name, f"images of {self.image_size[0]}x{self.image_size[1]}", error) from error
        model.train()
        self.feature_dim, rows, columns = feature_map.shape[1:]
        height, width = self.padded_size
        self.stride = height // rows
        if (rows * self.stride, columns * self.stride) != (height, width):
            raise UserError(
                f"backbone ({self.name}) makes a {rows}x{columns} map of {height}x{width} pixels, which "
                "is no whole stride; take another image_size or backbone"
            )
        reached = parameters_behind([feature_map] if class_token is None else [feature_map, class_token])
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter in reached)

    def _find_interface(self, image: Tensor) -> None:
        """Finds out how this family is asked: timm's share one way, but not all of its arguments."""
        model = self.timm_model
        offered = inspect.signature(model.forward_intermediates).parameters
        self._how: dict[str, Any] = {"stop_early": True} if "stop_early" in offered else {}
        holder = model if hasattr(model, "cls_token") else getattr(model, "embeds", None)  # NaFlexViT's
        has_token = getattr(holder, "cls_token", None) is not None
        self.has_class_token = "return_prefix_tokens" in offered and has_token
        if self.has_class_token:
            self._how["return_prefix_tokens"] = True
        end = model.forward_features(image)
        self._ends_in_map = isinstance(end, Tensor) and end.dim() == 4  # CoaT ends in several sequences
        self._ends_channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        if self._reads_the_end and self._ends_in_map:
            return
        try:
            model.forward_intermediates(
                image, indices=[self.stage], intermediates_only=True, norm=True, **self._how
            )
            self._how["norm"] = True  # the model's final normalization, where its width fits the stage
        except (AssertionError, TypeError):  # Hiera has it behind its pooling
            pass


class _Chosen(nn.Module):
    """In the place of timm's patch dropout: the prefix tokens and the patches that were chosen."""

    def __init__(self, places: Tensor, prefix: int) -> None:
        super().__init__()
        self.places, self.prefix = places, prefix

    def forward(self, tokens: Tensor) -> Tensor:
        places = self.places[..., None].expand(-1, -1, tokens.shape[-1])
        return torch.cat([tokens[:, : self.prefix], tokens[:, self.prefix :].gather(1, places)], dim=1)


def cells(images: Tensor, stride: int) -> int:
    """Into how many cells a network of that stride divides each of the images."""
    return images[0, 0].numel() // stride**2


def few_tokens_attention(model: nn.Module, tokens: int) -> AbstractContextManager[Any]:
    """The kernel for attention among few tokens on a CPU in half precision, by autocast or of the weights themselves.

    Whatever trains a network calls it so (docs/log.md): the backward pass of the CPU's fused kernel in bf16 took 7
    times as long as the plain product at 17 tokens and 5 times at 65, half of a whole step; at 197 the two are even.
    """
    weights = next(model.parameters())
    on_cpu = weights.device.type == "cpu"
    half = on_cpu and (torch.is_autocast_enabled("cpu") or weights.dtype in (torch.bfloat16, torch.float16))
    if not half or tokens > FEW_TOKENS or torch.compiler.is_compiling():
        return nullcontext()
    if any(getattr(part, "grad_checkpointing", False) for part in model.modules()):
        # blocks are passed again on the way back, outside of this, by the kernel of before
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH)


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Its batch norms that keep running statistics."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]


@torch.no_grad()
def recalibrate_batch_norm(backbone: nn.Module, batches: Iterable[Images]) -> None:
    """Recomputes the running statistics of batch norm as the mean over ``batches``, by their images, in place.

    During pre-training they are gathered from filtered images, which the backbone never meets afterwards.
    Weights, modes and momenta are left as they were; without batch norm nothing is read from ``batches``.

    Args:
        backbone: any module that takes a batch of images.
        batches: normalized, unfiltered images (B, C, H, W) on the backbone's device; at least one batch.

    Raises:
        UserError: if there is no batch.
    """
    norms = batch_norms(backbone)
    if not norms:
        return
    before = [(norm.momentum, copy.deepcopy(norm.state_dict())) for norm in norms]
    count = 0  # images
    with eval_no_grad(backbone):  # dropout off
        images = None
        try:
            for images in _without_lone_images(batches):
                count += len(images)
                for norm in norms:
                    if count == len(images):
                        norm.reset_running_stats()
                        norm.train()
                    norm.momentum = len(images) / count  # the cumulative mean; a last batch may be small
                backbone(images)
        except ValueError:
            if images is None or len(images) > 1:
                raise
            for norm, (_, state) in zip(norms, before, strict=True):
                norm.load_state_dict(state)  # one image and a map of 1x1: no variance
        finally:
            for norm, (momentum, _) in zip(norms, before, strict=True):
                norm.momentum = momentum
    if count == 0:
        raise UserError("batches (none) must hold at least one batch of images to recalibrate batch norm")


def _without_lone_images(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches, one that holds a single image joined to its neighbor: batch norm needs two values a channel."""
    held: Tensor | None = None
    for images in batches:
        if held is not None and 1 in (len(held), len(images)):
            images = torch.cat([held, images])
        elif held is not None:
            yield held
        held = images
    if held is not None:
        yield held


@contextmanager
def eval_no_grad(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside, afterwards every part's own mode again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def height_and_width(image_size: ImageSize) -> tuple[int, int]:
    """(height, width) in pixels of a side or a pair.

    Raises:
        UserError: unless both are positive whole numbers.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or any(not isinstance(side, int) or side < 1 for side in sides):
        raise UserError(f"image_size ({image_size}) must be a side in pixels or (height, width), such as 224")
    return sides[0], sides[1]
