"""What MODEL means: a run, an exported folder, public or fresh weights, opened alike; the method behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn

from freqmask.backbones import Backbone, Features, ImageSize, cells, few_tokens_attention
from freqmask.data.decode import open_file
from freqmask.data.image_folder import named_image
from freqmask.data.loader import TrainDataset
from freqmask.data.pixels import Box, convert_channels, fill_missing, missing_pixels
from freqmask.data.source import Source
from freqmask.data.transforms import Geometry, decode_windows
from freqmask.data.values import ValueRange
from freqmask.errors import UserError, brief
from freqmask.filters import build_filter
from freqmask.interop.formats import (
    BACKBONE,
    CLASSIFIER,
    DECODER,
    LOCAL,
    OURS,
    PUBLIC,
    RANDOM,
    architecture_in,
    find_backbone,
    fitted,
    is_architecture,
    read_config,
    run_behind,
)
from freqmask.interop.weight_files import check_weights, hash_weights, load_fitting, read_tensors
from freqmask.interop.weights import check_public, load_method, run_state, under, with_weights
from freqmask.methods import MFM
from freqmask.methods.mfm import band_edges
from freqmask.rng import torch_seeded
from freqmask.spectrum import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Images,
    as_float,
    decibel,
    inside,
    pair_weights,
    rfft2,
)
from freqmask.timm_models import check_name
from freqmask.training.run_folder import RunFolder

Kind = Literal["run", "folder", "timm", "random"]


@dataclass
class OpenedModel:
    """A backbone with all that is needed to feed it."""

    name: str  # what tables call it: the run's or folder's name, or MODEL as it was typed
    kind: Kind  # which form of MODEL it was
    # in evaluation mode and float32; of normalized images it gives the last (or the trained) stage's map, its mean and
    # the class token
    backbone: Backbone
    input_size: tuple[int, int, int]  # channels, height and width that it was trained for or asked at
    mean: tuple[float, ...]  # of each channel in [0, 1]
    std: tuple[float, ...]  # of each channel
    value_range: str = "dtype"  # what became [0, 1] in training, as ``--value_range`` takes it
    # plain values on where the weights come from: method, run, step, data
    metadata: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None  # of the weights, None for ``timm:`` and ``random:``
    trained_crop: str = ""  # ``--crop`` of its training; empty where nobody knows
    # what becomes of its features, from :func:`freqmask.interop.feature_space.load_space`; None leaves them
    space: Any = None

    @property
    def module(self) -> Any:
        """The plain timm module."""
        return self.backbone.timm_model

    @property
    def run(self) -> RunFolder | None:
        """The run that it was exported by, where it lies beside it."""
        return run_behind(self.folder) if self.folder is not None else None

    @property
    def weights_hash(self) -> str:
        """Tells weights (and running statistics) apart: 32 hexadecimal digits over every tensor."""
        return hash_weights(self.module)

    def normalise(self, images: Images) -> Images:
        """Images in [0, 1] become what the backbone takes."""
        mean, std = images.new_tensor(self.mean), images.new_tensor(self.std)
        return (images - mean[:, None, None]) / std[:, None, None]

    def stages(self, normalized: Images, indices: Sequence[int] | None = None) -> list[Features]:
        """What :func:`stage_features` says of its backbone."""
        return stage_features(self.backbone, normalized, indices)


@dataclass
class OpenedClassifier:
    """A timm model with its own classifier, on the CPU, in evaluation mode."""

    name: str  # what tables call it
    module: Any  # the timm module with its head
    class_names: tuple[str, ...]  # of its outputs, in order
    input_size: tuple[int, int, int]  # channels, height and width
    mean: tuple[float, ...]  # of each channel in [0, 1]
    std: tuple[float, ...]  # of each channel
    value_range: str = "dtype"  # what became [0, 1] in training
    crop_share: float = 1.0  # share of an image's side that the centered test window keeps
    metadata: dict[str, Any] = field(default_factory=dict)  # where the weights come from
    folder: Path | None = None  # of the weights, None for ``timm:``


class MiddleWindow(Geometry):
    """The middle of an image at its own resolution, for models that were trained with ``--crop native``."""

    def box(self, picture_size: tuple[int, int], key: int, attempt: int = 0) -> Box:
        """The window of the view's size in the middle."""
        _, _, height, width = super().box(picture_size, key, attempt)
        return ((picture_size[0] - height) // 2, (picture_size[1] - width) // 2, height, width)


def still_geometry(model: Any, crop: str = "auto") -> Geometry:
    """One window of the model's size, neither random nor flipped.

    ``crop`` is ``center``, ``whole`` (distorted to the size), ``native`` (the middle at its own resolution), or
    ``auto``: native where the model was trained so, else center.
    """
    if crop == "auto":
        crop = "native" if getattr(model, "trained_crop", "") == "native" else "center"
    kind = MiddleWindow if crop == "native" else Geometry
    share = getattr(model, "crop_share", 1.0)
    return kind(image_size=model.input_size[1:], crop=crop, horizontal_flip=0.0, center_share=share)


def still_images(model: Any, source: Source, crop: str = "auto") -> TrainDataset:
    """The images as an evaluation shows them to a model, see :func:`still_geometry`."""
    values, channels = ValueRange.parse(model.value_range) or ValueRange(), model.input_size[0]
    return TrainDataset(source, [still_geometry(model, crop)], values, channels, convert_channels=True)


def open_model(
    text: str | Path,
    *,
    image_size: ImageSize | None = None,
    channels: int | None = None,
    weights: str | None = None,
    seed: int = 0,
    optional_model_args: Mapping[str, Any] | None = None,
) -> OpenedModel:
    """Open MODEL.

    Args:
        text: a run folder, an exported folder, ``timm:NAME`` (public weights), ``random:NAME`` or
            ``random:FOLDER`` (the same architecture with fresh weights).
        image_size: side in pixels or (height, width); None is the size that it was trained for. Positions of
            a model of fixed size are interpolated.
        channels: of the images, for ``timm:`` and ``random:NAME``; None is the model's own.
        weights: ``"teacher"`` or ``"student"`` of a FOLK run; None is what the run exports.
        seed: of fresh weights.
        optional_model_args: arguments of timm's for a training, such as ``drop_path_rate``; left out where the family
            does not know them.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        UserError: there is no such model, or its files are broken; without a network for public weights.
    """
    text = str(text)
    if weights is not None and text.startswith((PUBLIC, RANDOM)):
        raise UserError(f"weights ({weights}) can be chosen for a run folder only; leave it out for {text}")
    with torch_seeded(seed):
        if is_architecture(text):
            return _open_named(text, channels, image_size=image_size, optional_model_args=optional_model_args)
        return _open_folder(text, weights, image_size=image_size, optional_model_args=optional_model_args)


def load_backbone(
    model: str | Path, *, image_size: ImageSize | None = None, weights: str | None = None
) -> nn.Module:
    """A plain timm module, in evaluation mode; arguments and errors are those of :func:`open_model`.

    Returns:
        timm's module on the CPU, its weights ready to be trained on; it takes normalized images (B, C, H, W).
    """
    return open_model(model, image_size=image_size, weights=weights).module.requires_grad_(True)


def open_classifier(text: str | Path) -> OpenedClassifier | None:
    """The classifier behind MODEL, or None where it has none.

    Args:
        text: the run of a fine-tuning, an exported folder, or ``timm:NAME``.

    Raises:
        UserError: there is no such model, or its files are broken.
    """
    text, metadata, folder = str(text), {}, None
    if text.startswith(RANDOM):
        return None
    if text.startswith(PUBLIC):
        name = text.removeprefix(PUBLIC)
        check_name(name)
        check_public(name, f"model ({text})")
        module: Any = timm.create_model(name, pretrained=True)
    else:
        folder = find_backbone(text)
        config = read_config(folder)
        if not config.get("num_classes"):
            return None
        name, metadata = _name(Path(text), folder), dict(config.get(OURS, {}))
        try:
            module = timm.create_model(LOCAL + str(folder), pretrained=True)
        except Exception as error:  # timm raises whatever it pleases
            raise UserError(f"model ({text}) cannot be opened: {brief(error, 200)}") from error
    if module.num_classes < 1:
        return None
    check_weights(module.state_dict(), f"model ({text})")
    config = module.pretrained_cfg
    channels, height, width = (int(side) for side in config["input_size"])
    names = config.get("label_names")
    if not names and module.num_classes == 1000:
        from timm.data.imagenet_info import ImageNetInfo

        names = ImageNetInfo("imagenet-1k").label_names()
    return OpenedClassifier(
        name,
        module.eval().requires_grad_(False),
        tuple(map(str, names or range(module.num_classes))),
        (channels, height, width),
        tuple(config["mean"]),
        tuple(config["std"]),
        str(metadata.get("value_range", "dtype")),
        float(config.get("crop_pct") or 1.0),
        metadata,
        folder,
    )


def stage_features(
    backbone: Backbone, normalized: Images, indices: Sequence[int] | None = None
) -> list[Features]:
    """The features of several stages in one pass, see :meth:`OpenedModel.stages`.

    Raises:
        UserError: the model has no such stage.
    """
    count = len(backbone.timm_model.feature_info)
    for index in indices or ():
        if not -count <= index < count:
            raise UserError(f"stage ({index}) must be between {-count} and {count - 1} for {backbone.name}")
    tokens = {"return_prefix_tokens": True} if backbone.has_class_token else {}
    padded = backbone.padded(normalized)
    with few_tokens_attention(backbone.timm_model, cells(padded, backbone.stride)):
        stages = backbone.timm_model.forward_intermediates(
            padded, indices=None if indices is None else list(indices), intermediates_only=True, **tokens
        )
    pairs = [(stage[0], stage[1][:, 0]) if tokens else (stage, None) for stage in stages]
    return [Features(stage_map, stage_map.mean(dim=(2, 3)), token) for stage_map, token in pairs]


def _open_named(text: str, channels: int | None, **asked: Any) -> OpenedModel:
    """``timm:NAME`` and ``random:NAME``."""
    is_public = text.startswith(PUBLIC)
    name = text.removeprefix(PUBLIC if is_public else RANDOM)
    check_name(name)
    if is_public:
        check_public(name, f"model ({text})")
    config = timm.models.get_pretrained_cfg(name)
    own_channels, *own_size = config.input_size if config is not None else (3, 224, 224)
    channels = own_channels if channels is None else channels
    asked["image_size"] = tuple(own_size) if asked["image_size"] is None else asked["image_size"]
    try:
        backbone = Backbone(name, channels=channels, pretrained=is_public, **asked)
    except UserError as error:
        raise UserError(f"model ({text}): {error}") from error
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if config is None else (config.mean, config.std)
    kind: Kind = "timm" if is_public else "random"
    return _opened(text, kind, backbone, fitted(mean, channels), fitted(std, channels))


def _open_folder(text: str, weights: str | None, **asked: Any) -> OpenedModel:
    """A run, an exported folder, and ``random:`` before either."""
    folder = find_backbone(text.removeprefix(RANDOM))
    config, run = read_config(folder), run_behind(folder)
    options = run.config() if run is not None else {}
    size, mean, std = (tuple(config["pretrained_cfg"][name]) for name in ("input_size", "mean", "std"))
    metadata = dict(config.get(OURS, {}))
    stage = metadata.get("stage", -1) if options.get("stage") is None else options["stage"]
    asked |= {"channels": size[0], "stage": int(stage)}
    asked["image_size"] = size[1:] if asked["image_size"] is None else asked["image_size"]
    value_range = str(metadata.get("value_range", "dtype"))
    if text.startswith(RANDOM):
        name, model_args, patch = architecture_in(config)
        start: Any = options.get("initialisation") or "mfm"
        backbone = Backbone(name, patch_size=patch, model_args=model_args, initialisation=start, **asked)
        return _opened(text, "random", backbone, mean, std, value_range=value_range)
    is_exported = weights in (None, metadata.get("weights"))
    with nullcontext(folder) if is_exported else with_weights(text, folder, str(weights)) as read:
        try:
            backbone = Backbone(LOCAL + str(read), pretrained=True, **asked)
        except UserError as error:
            raise UserError(f"model ({text}) cannot be opened: {error}") from error
    return _opened(
        _name(Path(text), folder),
        "folder" if folder == Path(text).expanduser() else "run",
        backbone,
        mean,
        std,
        value_range=value_range,
        metadata=metadata if is_exported else {**metadata, "weights": weights},
        folder=folder,
        trained_crop=str(metadata.get("crop") or options.get("crop") or ""),
    )


def _opened(name: str, kind: Kind, backbone: Backbone, mean: Any, std: Any, **more: Any) -> OpenedModel:
    check_weights(backbone.timm_model.state_dict(), f"model ({name})")
    backbone.eval().float().requires_grad_(False)
    return OpenedModel(name, kind, backbone, (backbone.channels, *backbone.image_size), mean, std, **more)


def _name(path: Path, folder: Path) -> str:
    inside = folder.name in (BACKBONE, CLASSIFIER)
    return folder.resolve().parent.name if inside else path.resolve().name


def decoder_of(opened: OpenedModel) -> dict[str, Tensor]:
    """The reconstruction head that was trained with a backbone; empty where none came along."""
    if opened.folder is not None and (opened.folder / DECODER).is_file():
        return read_tensors(opened.folder / DECODER, "decoder")
    return under(run_state(opened.run.path), "method.decoder.") if opened.run is not None else {}


@dataclass(frozen=True)
class Band:
    """How well one ring of frequencies is filled in."""

    low: int  # radius in bins where it begins
    high: int  # radius where it ends
    hidden: float  # share of its bins that the filter hides
    filtered: float  # PSNR in dB of the filtered input
    predicted: float  # of what it predicted
    filled: float  # of the visible bins with the predicted hidden ones


def open_method(model: str, filter: str | None = None) -> tuple[Any, OpenedModel]:
    """The method of a run, or of an exported folder with its decoder, under another ``filter`` where one is named.

    Raises:
        UserError: there is no decoder, or the method hides no frequencies that a filter could choose.
    """
    opened = open_model(model)
    backbone, path = opened.backbone, Path(model).expanduser()
    if RunFolder(path).exists():
        method: Any = load_method(path)
    else:
        decoder = decoder_of(opened)
        if not decoder:
            raise UserError(
                f"model ({opened.name}) has no decoder to reconstruct with; name a run, or convert a pre-trained "
                "(not fine-tuned) MFM checkpoint"
            )
        settings: Any = {"filter": filter or "fixed", "mean": opened.mean, "std": opened.std}
        method = MFM(backbone, backbone.image_size, opened.input_size[0], **settings)
        load_fitting(method.decoder, decoder, f"model ({opened.name}): its decoder does not fit its backbone")
    if filter is not None:
        if not hasattr(method, "filter"):
            raise UserError(
                f"filter ({filter}) has no say in method {method.name}, which degrades images otherwise"
            )
        method.filter = build_filter(filter, backbone.image_size)
    return method.eval(), opened


def read_image(file: str | Path, opened: OpenedModel) -> Float[Tensor, "1 channel height width"]:
    """The center of an image as the model takes it, in [0, 1]; a UserError where it cannot be read."""
    geometry = still_geometry(opened)
    with named_image(file) as path:
        picture = open_file(path)
        box = geometry.box(picture.size, key=0)
        (window,) = decode_windows(picture, [box], [geometry.at_least()])
        filled = fill_missing(window, missing_pixels(window, picture.nodata))
        scaled = (ValueRange.parse(opened.value_range) or ValueRange()).apply(
            convert_channels(filled, opened.input_size[0])
        )
    view = geometry.finish(torch.from_numpy(np.array(scaled)), key=0)  # a copy: a file's map is not writable
    return as_float(view)[None]


@torch.no_grad()
def psnr_by_band(images: dict[str, Tensor]) -> list[Band]:
    """PSNR of the filtered input, the prediction and what is filled in, ring by ring.

    The PSNR of a band is -10 log10 of the mean squared error of its bins (ortho-normal FFT, a mean over bins and
    channels), so that the bands' errors, weighted by their bins, add up to the image's.

    Args:
        images: from a method's ``reconstruct``.

    Returns:
        The bands of the training's health table from the center outwards.
    """
    target = images["target"].cpu().double()
    height, width = target.shape[-2:]
    weights = pair_weights(height, width).double()
    whole = rfft2(target)
    errors = [
        (rfft2(images[name].cpu().double()) - whole).abs().square().mean(dim=(0, 1))
        for name in ("filtered", "prediction", "filled")
    ]
    maps = [1 - images["keep"].cpu().double().mean(dim=(0, 1)), *errors]
    bands = []
    for low, high in pairwise(band_edges(height, width)):
        ring = inside(height, width, Fraction(high)) & ~inside(height, width, Fraction(low))
        mass = weights * ring
        if mass.any():
            hidden, *squares = (float((mass * values).sum() / mass.sum()) for values in maps)
            bands.append(Band(low, high, hidden, *map(decibel, squares)))
    return bands
