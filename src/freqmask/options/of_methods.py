"""The options of the methods. Adding one to a method is a line here, and its use in the method's file.

A method takes them as keyword arguments (``MFM(radius=8)``), ``freqmask pretrain`` as its own options; those of a
method of yours are found by the ``Options`` of its class, or by its constructor's signature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from freqmask.errors import UserError, nearest
from freqmask.options import REQUIRED, Auto, Option, as_typed, option, options_of

COM_FRACTIONS = (0.005, 0.01, 0.05)


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Images."""

    mean: list[float] | Auto | None = option(
        "auto", "means that normalize the channels; auto is ImageNet's for 8-bit color, else measured"
    )
    std: list[float] | Auto | None = option(
        "auto", "standard deviations that normalize the channels; auto as for mean"
    )


@dataclass(frozen=True, kw_only=True)
class BackboneOptions(ImageOptions):
    """Backbone."""

    JUDGED_FROM: ClassVar[int] = 5_000  # steps before which little shows (docs/methods.md, small pictures)

    patch_size: int | Auto | None = option(
        "auto", "patch of a ViT in pixels; auto is the model's own, smaller for small images", least=1
    )
    stage: int = option(-1, "which stage's feature map is decoded; -1 is the last")
    model_args: dict[str, Any] | None = option(
        None, "further arguments of the timm model, e.g. '{output_stride: 8}'"
    )
    initialisation: Literal["mfm", "timm"] = option(
        "mfm", "mfm (the paper's, for a ViT) or timm (the library's)"
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, more time"
    )


@dataclass(frozen=True, kw_only=True)
class DistanceOptions:
    """Loss."""

    gamma: float = option(1.0, "power of the spectral distance in the loss")
    focal: float | None = option(None, "strength of the focal weight; null is off")


@dataclass(frozen=True, kw_only=True)
class LossOptions(DistanceOptions):
    """Loss."""

    masked_weight: float = option(1.0, "weight of the hidden frequencies in the loss")
    kept_weight: float = option(0.0, "weight of the kept frequencies in the loss")
    reduce: Literal["batch", "image"] = option(
        "batch", "normalize the loss over the batch (as released) or image by image"
    )


@dataclass(frozen=True, kw_only=True)
class MaskingOptions:
    """What is hidden."""

    filter: str | Any = option(
        "fixed",
        "fixed (low- and high-pass), com (Com and RCom), a filter with arguments such as 'bandstop(low=8, high=24)', "
        "or an import path (in Python also the object)",
    )
    radius: float | Auto = option(
        "auto",
        "of the fixed filters, in frequency bins; auto is 16 at 224 pixels, scaled with the side. Two radii are not an "
        "option here: name a bandpass or bandstop filter",
        filter="fixed",
    )
    low_pass_share: float | Auto = option(
        "auto",
        "share of images that are low-passed; auto is 0.5 for a ViT, 0.3 for a CNN",
        least=0,
        most=1,
        filter="fixed",
    )
    softness: float = option(0.0, "width of a soft filter edge in frequency bins; 0 is hard", filter="fixed")
    com_fractions: list[float] = option(
        COM_FRACTIONS, "shares of the frequencies that Com keeps, one drawn per image", filter="com"
    )
    com_share: float = option(
        0.5, "share of images under Com, the others under RCom", least=0, most=1, filter="com"
    )
    magnitude: Literal["luma", "mean", "each"] = option(
        "luma",
        "which magnitudes Com ranks: of the luma (with other than three channels it is the mean), the channels' mean, "
        "or each channel apart",
        filter="com",
    )
    clamp: bool = option(True, "cut the filtered image to [0, 1], as the papers do")


@dataclass(frozen=True, kw_only=True)
class MFMOptions(BackboneOptions, LossOptions, MaskingOptions):
    """MFM."""


@dataclass(frozen=True, kw_only=True)
class FOLKOptions(BackboneOptions, LossOptions, MaskingOptions):
    """FOLK."""

    filter: str | Any = option("com", "")
    views: Literal["two", "one"] = option("two", "two filtered views, or one (half the passes)")
    outputs: int | Auto = option(
        65_536, "prototypes; 65,536 as published, or 4,096 below 100,000 images", least=1
    )
    hidden_size: int = option(2_048, "width of the projection head", least=1)
    bottleneck_size: int = option(256, "width of that head's bottleneck", least=1)
    student_temperature: float = option(0.1, "of the softmax of the student", above=0)
    teacher_temperature: float = option(0.07, "of the teacher's softmax after its warm-up", above=0)
    teacher_temperature_start: float = option(0.04, "of the teacher's softmax before its warm-up", above=0)
    teacher_temperature_warmup: float = option(
        0.1, "share of the training over which it rises", least=0, most=1
    )
    center_momentum: float = option(0.9, "how much of the teacher's center a step keeps")
    ema_momentum: float = option(
        0.996, "of the teacher at the start; a cosine leads it to 1", least=0, most=1
    )
    distillation_weight: float = option(1.0, "weight of the distillation in the loss", least=0)
    reconstruction_weight: float = option(1.0, "weight of the reconstruction in the loss", least=0)
    freeze_last_layer_steps: int | Auto = option(
        "auto", "in which the head's last layer stands still", least=0, epochs=1.0
    )
    distil: Literal["auto", "class_token", "pooled"] = option(
        "auto", "what is distilled; auto is the class token where there is one, else the pooled feature"
    )


@dataclass(frozen=True, kw_only=True)
class PartlySeenOptions(BackboneOptions):
    """What is hidden."""

    # words and distill are far above fresh weights after 420 (docs/results.md)
    JUDGED_FROM: ClassVar[int] = 500

    filter: str | Any = option(
        "lowpass", "lowpass, or another filter as for mfm; what hides frequencies from the network"
    )
    radius: float | Auto = option(
        "auto",
        "of the low-pass of words and distill; auto is a quarter of the shorter side (56 at 224)",
        above=0,
    )
    filter_share: float = option(0.5, "share of the images whose frequencies are hidden", least=0, most=1)
    token_share: float | Auto = option(
        "auto", "share of its patches that a ViT is given; auto is 0.5, and 1 where patches cannot be left out",
        above=0, most=1,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WordsOptions(PartlySeenOptions):
    """Visual words."""

    words: int = option(256, "visual words to tell apart", least=2)
    word_grid: int = option(2, "rows and columns of cells in which words are counted", least=1)
    word_side: int | Auto = option(
        "auto", "shorter side in pixels that an image is reduced to before its words are read; auto is at most 32",
        least=8,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DistillOptions(PartlySeenOptions):
    """A public teacher."""

    teacher: str | Any | None = option(
        None,
        "a frozen network whose features are learned: timm:NAME (public weights), a run folder, or an exported folder; "
        "chooses the method distill",
    )
    teacher_size: int | Auto = option(
        "auto",
        "shorter side in pixels at which the teacher sees images; auto is what it was trained at, but at most three "
        "times the student's",
        least=1,
    )
    token_weight: float = option(0.0, "weight of the teacher's features place by place in the loss", least=0)
    reconstruction_weight: float = option(0.0, "weight of the reconstruction in the loss", least=0)
    filter_share: float = option(0.25, "share of the images whose frequencies are hidden", least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class RestorationOptions(BackboneOptions, DistanceOptions):
    """Restoration."""


@dataclass(frozen=True, kw_only=True)
class SuperResolutionOptions(RestorationOptions):
    """Restoration."""

    factor: float | Auto = option("auto", "of super-resolution; auto is 8 at 224 pixels")


@dataclass(frozen=True, kw_only=True)
class DeblurOptions(RestorationOptions):
    """Restoration."""

    sigma: float | Auto = option("auto", "of deblurring in pixels (auto: 5 at 224)")
    kernel_sizes: list[int] | Auto = option("auto", "of deblurring, odd; auto is 7 to 21 at 224 pixels")


@dataclass(frozen=True, kw_only=True)
class DenoiseOptions(RestorationOptions):
    """Restoration."""

    sigma: float | Auto = option("auto", "of the noise in [0, 1] units (auto: 75/255)")


METHOD_OPTIONS: dict[str, type] = {
    "mfm": MFMOptions,
    "folk": FOLKOptions,
    "words": WordsOptions,
    "distill": DistillOptions,
    "sr": SuperResolutionOptions,
    "deblur": DeblurOptions,
    "denoise": DenoiseOptions,
}
BUILT_FROM = ("backbone", "image_size", "channels")  # what every method takes first
FROM_DATA = ("mean", "std", "patch_size")  # resolved by what the images are, for every method alike


def informative_from(method: Any) -> int:
    """Optimizer steps before which little can be said of a run of this method."""
    return int(METHOD_OPTIONS.get(str(method), BackboneOptions).JUDGED_FROM)  # type: ignore[attr-defined]


def check_method(name: str) -> None:
    """Refuse what is neither a method of ours nor an import path; nothing is imported."""
    if ":" not in name and name not in METHOD_OPTIONS:
        raise UserError(
            f"method ({name}) must be a known method or an import path; {nearest(name, METHOD_OPTIONS)}"
        )


def options_of_class(method: type) -> dict[str, Option]:
    """What a method takes beside ``BUILT_FROM``: the ``Options`` of its class, else its constructor's arguments."""
    known = options_of(getattr(method, "Options", None) or method)
    return {name: known[name] for name in known if name not in BUILT_FROM}


def typed_options(known: Mapping[str, Option]) -> dict[str, Option]:
    """Options of a method as ``freqmask pretrain`` takes them: not given is the method's default, steps are epochs."""
    options = {}
    for own in known.values():
        if own.epochs is not None:
            own = replace(own, name=own.typed, kind=float, default=own.epochs, help=f"epochs {own.help}")
        if own.name not in FROM_DATA:
            kind = own.kind | None if own.kind is not Any else Any
            shown = None if own.default in (None, REQUIRED) else as_typed(own.default)
            own = replace(own, kind=kind, default=None, shown=shown, positional=False)
        options[own.name] = own
    return options


def method_settings(
    known: Mapping[str, Option], options: Mapping[str, Any], steps_an_epoch: float | None = None
) -> dict[str, Any]:
    """A method's own options among those of a run, by the names of its constructor; what is None keeps its default.

    Args:
        known: of the method, from :func:`options_of_class`.
        options: of the run.
        steps_an_epoch: turns those in epochs into steps; None leaves them out, where it is not known yet.
    """
    settings = {}
    for name, own in known.items():
        value = options.get(own.typed)
        if own.epochs is not None:
            if steps_an_epoch is not None:
                settings[name] = round((own.epochs if value is None else value) * steps_an_epoch)
        elif value is not None:
            settings[name] = value
    return settings


def built_in_options() -> dict[str, Option]:
    """The options of all methods together, each with the defaults in which they differ."""
    options: dict[str, Option] = {}
    for method, group in METHOD_OPTIONS.items():
        for name, own in typed_options(options_of(group)).items():
            known = options.setdefault(name, own)
            if own.help not in known.help:
                known = replace(known, help=f"{known.help}; {own.help}")
            if own.shown != (known.shown or "").partition(";")[0] and own.shown is not None:
                known = replace(known, shown=f"{known.shown}; {method}: {own.shown}")
            options[name] = known
    return options
