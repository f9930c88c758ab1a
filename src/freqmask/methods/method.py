"""What every method is: a module that turns views into a loss, and says what of it is a backbone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from freqmask.backbones import Backbone, ImageSize, eval_no_grad, height_and_width
from freqmask.errors import UserError
from freqmask.filters import Filter, Filtered
from freqmask.heads import ReconstructionHead
from freqmask.options import options_of, read_group, signature
from freqmask.options.of_methods import BackboneOptions
from freqmask.rng import Keys, batch_keys
from freqmask.spectrum import Images, Normalization, irfft2, rfft2


class Method(nn.Module):
    """A self-supervised method as a plain module.

    Args:
        backbone: a timm model's name, or a :class:`~freqmask.backbones.Backbone`, which then has its own
            patch_size, stage, model_args and initialisation.
        image_size: side in pixels, or (height, width).
        channels: channels of the images.
        **options: those of the class's ``Options``.

    Raises:
        UserError: for an option out of range, or one that the filter or the backbone has no use for.

    Attributes:
        name: what the command line calls it.
        about: what it does in a few words, for the plan of a run.
        n_views: views of an image that ``forward`` takes.
        default_backbone: the key of ``backbones()`` that is exported unless asked otherwise.
        tiny_lr: peak learning rate, and the batch it is for, with which networks of few weights learn most.
        Options: a dataclass of its options (:mod:`freqmask.options`); keyword arguments of its constructor.
        parts: what ``forward`` returns beside the loss and is shown while and after a run trains.
        settings: plain values from which ``build_method(name, **settings)`` makes it again.
        normalise: what the network gets of images in [0, 1].
        decoder: from the exported backbone's feature map to a normalized image.
        filter: what hides frequencies, where nothing else corrupts.
        clamp: whether a filtered image is cut to [0, 1].
    """

    name: ClassVar[str] = ""
    about: ClassVar[str] = ""
    n_views: int = 1
    default_backbone: ClassVar[str] = "backbone"
    tiny_lr: ClassVar[tuple[float, int]] = (1e-3, 256)
    Options: ClassVar[type | None] = None
    parts: ClassVar[tuple[str, ...]] = ()
    settings: dict[str, Any]
    normalise: Normalization
    decoder: ReconstructionHead
    filter: Filter
    clamp: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.Options is not None:
            cls.__signature__ = signature(cls, options_of(cls.Options).values())  # type: ignore[attr-defined]

    def __init__(
        self,
        backbone: str | Backbone = "vit_small_patch16_224",
        image_size: ImageSize = 224,
        channels: int = 3,
        **options: Any,
    ) -> None:
        super().__init__()
        if type(self).build is Method.build:  # a constructor of its own does what follows
            return
        kind: Any = self.Options
        given = read_group(kind, options)
        first = {"backbone": backbone, "image_size": image_size, "channels": channels}
        self.settings = recorded({**first, **vars(given)})
        self.normalise = Normalization(channels, given.mean, given.std)
        setattr(self, self.default_backbone, build_backbone(backbone, image_size, channels, given))
        self.build(given)

    def build(self, options: Any) -> None:
        """What a method has beside its backbone, by its options; ``settings`` gets what was ``auto`` among them."""

    def make_decoder(self) -> ReconstructionHead:
        """A decoder behind the exported backbone."""
        backbone: Backbone = getattr(self, self.default_backbone)
        return ReconstructionHead(backbone.feature_dim, backbone.channels, backbone.stride)

    @abstractmethod
    def forward(
        self, views: Sequence[Images], keys: Keys | None = None, details: bool = False
    ) -> dict[str, Float[Tensor, ""]]:
        """The loss of a batch.

        Args:
            views: ``n_views`` batches (B, C, H, W) in [0, 1] of the same images.
            keys: one an image; all randomness comes from them, None draws fresh ones.
            details: also ``relative_loss`` and whatever else tells how much is learned.

        Returns:
            ``"loss"`` and its parts, detached.
        """

    def corrupt(self, images: Images, keys: Keys) -> Filtered:
        """What the network sees, x~ = clamp(Re F^-1(F(x) keep), 0, 1), and keep (docs/methods.md, MFM)."""
        return self.filter(images, keys, clamp=self.clamp)

    def predict(self, filtered: Images) -> Images:
        """The normalized image that the exported backbone and the decoder make of a filtered one in [0, 1]."""
        feature_map = getattr(self, self.default_backbone)(self.normalise(filtered)).feature_map
        return self.decoder(feature_map, (filtered.shape[-2], filtered.shape[-1]))

    @torch.no_grad()
    def reconstruct(self, images: Images, keys: Keys | None = None) -> dict[str, Tensor]:
        """What the method makes of images, all in image space, for pictures.

        Args:
            images: (B, C, H, W) in [0, 1].
            keys: one a view, used as they are; None takes 0, 1, 2, ... so that pictures stay comparable.

        Returns:
            Images (B, C, H, W) ``input`` and ``target`` (the originals), ``filtered``, ``prediction`` (its kept
            frequencies are no part of the loss), ``filled`` (the original's kept frequencies with the predicted
            missing ones), and ``keep`` (B, 1 or C, H, W // 2 + 1), 1 = the network saw this frequency.
        """
        keys = torch.arange(len(images), device=images.device) if keys is None else keys
        with eval_no_grad(self):
            filtered, keep = self.corrupt(images, keys)
            prediction = self.normalise.inverse(self.predict(filtered))
        spectrum = keep * rfft2(images) + (1 - keep) * rfft2(prediction)
        filled = irfft2(spectrum, (images.shape[-2], images.shape[-1]))
        shown = {"input": images, "filtered": filtered, "prediction": prediction, "target": images}
        return {**shown, "keep": keep, "filled": filled}

    def backbones(self) -> dict[str, Backbone]:
        """The backbones by name."""
        return {name: part for name, part in self.named_children() if isinstance(part, Backbone)}

    def compile_parts(self, **options: Any) -> None:
        """Compiles backbones, filter and losses in place, by ``torch.compile``'s options; the state keeps its names."""
        for name, part in self.named_children():
            if isinstance(part, Backbone) or name in ("filter", "loss", "normalise", "distillation"):
                part.compile(**options)

    def before_optimizer_step(self, step: int, total_steps: int) -> None:
        """Called with the gradients of a step, before they are clipped; nothing unless a method says otherwise.

        Args:
            step: the optimizer step, from 0.
            total_steps: of the whole training.
        """

    def after_step(self, step: int, total_steps: int) -> None:
        """Called after an optimizer step, for moving averages and schedules; nothing unless a method says otherwise.

        Args:
            step: the optimizer step that was made, from 0.
            total_steps: of the whole training.
        """

    def checked(self, views: Sequence[Tensor], keys: Keys | None) -> tuple[Sequence[Tensor], Keys]:
        """The views and the keys, fresh ones where none are given.

        Args:
            views: what ``forward`` was given.
            keys: one an image, or None.

        Returns:
            The same views, and int64 keys (B,) on their device.

        Raises:
            UserError: for another number of views, or where they are no batches.
        """
        if isinstance(views, Tensor) or len(views) != self.n_views:
            raise UserError(f"views must be a list of {self.n_views} batches of images for {self.name}")
        return views, batch_keys(views[0], keys)


def build_backbone(
    backbone: str | Backbone,
    image_size: ImageSize,
    channels: int,
    options: BackboneOptions,
) -> Backbone:
    """The backbone by name; one that is already built passes, and must fit the images."""
    if isinstance(backbone, str):
        backbone = Backbone(
            backbone,
            image_size,
            channels,
            patch_size=None if options.patch_size == "auto" else options.patch_size,
            stage=options.stage,
            model_args=options.model_args,
            initialisation=options.initialisation,
        )
    elif backbone.channels != channels or (
        backbone.fixed_size and backbone.image_size != height_and_width(image_size)
    ):
        raise UserError(
            f"backbone ({backbone.name}: {backbone.channels} channels, {backbone.image_size} pixels) must "
            f"fit channels ({channels}) and image_size ({image_size}); give the same to both"
        )
    if options.gradient_checkpointing:
        backbone.set_gradient_checkpointing()
    return backbone


def recorded(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A constructor's arguments as plain values: objects become what they are built from.

    Args:
        arguments: name to value.
    """
    given = dict(arguments)
    if isinstance(given.get("backbone"), Backbone):
        built: Backbone = given["backbone"]
        given |= {**built.settings, "backbone": built.name}
    if isinstance(given.get("filter"), Filter):
        given["filter"] = given["filter"].describe()
    return {name: _plain(value) for name, value in given.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple | list) else value
