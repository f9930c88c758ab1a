"""A backbone as a folder that timm loads, ``timm.create_model("local-dir:FOLDER")``: written, found and read."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import timm
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from freqmask.errors import UserError, brief, nearest
from freqmask.training.files import check_encoding, replace_atomically
from freqmask.training.run_folder import RunFolder

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
DECODER = "decoder.safetensors"  # ours: timm and transformers pass it over
README = "README.md"  # only where a plain call needs words
OURS = "freqmask"  # the key of config.json under which our own metadata stand; timm passes it over

CLASSIFIER = "classifier"  # the folder of a fine-tuning's run that timm loads
PUBLIC, RANDOM = "timm:", "random:"  # how MODEL names public and fresh weights
LOCAL = "local-dir:"  # how timm writes a folder where a model's name is asked
_LARGEST_CONFIG = 10_000_000  # bytes; a real one has a few thousand

Pooled = Literal["mean", "class_token"]


def write_timm_folder(
    model: nn.Module,
    folder: Path,
    *,
    input_size: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    metadata: Mapping[str, Any],
    pooled: Pooled | None = None,
    decoder: Mapping[str, Tensor] | None = None,
    crop_pct: float = 1.0,
    label_names: Sequence[str] | None = None,
) -> None:
    """Write config.json and model.safetensors, each replaced whole.

    Args:
        model: a timm module.
        folder: made where it is missing.
        input_size: channels, height and width that the model was trained for.
        mean: of the channels in [0, 1], taken off before the model.
        std: of the channels, divided by after that.
        metadata: plain values that trace the weights back (run, step, value range); they stand in config.json
            under ``freqmask`` and in the weights' metadata.
        pooled: what calling the loaded model gives: the mean of the map (what MFM trains) or the class
            token; None leaves what the model gives now.
        decoder: tensors of the reconstruction head, written beside the backbone.
        crop_pct: share of an image's side that the centered test window keeps.
        label_names: of a classifier's classes, in the order of its outputs.
    """
    with tempfile.TemporaryDirectory() as scratch:
        data_config = {"input_size": input_size, "mean": tuple(mean), "std": tuple(std), "crop_pct": crop_pct}
        # neither kind of weights: they follow below, with our metadata and replaced whole
        save_for_hf(model, scratch, safe_serialization=None, data_config=data_config)  # type: ignore[arg-type]
        config = json.loads((Path(scratch) / CONFIG).read_text())
    metadata = {**metadata, **_pin_pooling(config, model, pooled)}
    notes = [] if label_names is not None else plain_call_notes(model, input_size)
    if notes:
        metadata["notes"] = notes
    config[OURS] = metadata
    if label_names is not None:
        config["label_names"] = list(label_names)
    metadata = {"format": "pt", **{f"freqmask_{name}": json.dumps(value) for name, value in metadata.items()}}
    write_tensors(folder / WEIGHTS, model.state_dict(), metadata)
    if decoder is not None:
        write_tensors(folder / DECODER, decoder, metadata)
    text = json.dumps(config, indent=2) + "\n"
    replace_atomically(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
    if notes:
        readme = "\n\n".join(["# How this backbone is called", *notes]) + "\n"
        replace_atomically(folder / README, lambda path: path.write_text(readme, encoding="utf-8"))


def plain_call_notes(model: Any, input_size: tuple[int, int, int]) -> list[str]:
    """Where timm's plain ``model(x)`` is not what ``freqmask embed`` gives, and what to call instead.

    MobileNetV3 and its kin keep an untrained layer behind the pooling whatever ``num_classes`` is; a size that the
    strides do not divide is padded by us and cut off by some families.
    """
    notes = []
    width = getattr(model, "num_features", None)
    if getattr(model, "head_hidden_size", width) != width:
        notes.append(
            f"`model(x)` answers through a layer of {model.head_hidden_size} channels that was never trained. The "
            "features are `model.forward_features(x).mean((2, 3))`, as `freqmask embed` and ONNX give them."
        )
    strides = [
        int(stage["reduction"]) for stage in getattr(model, "feature_info", None) or [{"reduction": 1}]
    ]
    step, (_, height, width_) = max(strides), input_size
    if height % step or width_ % step:
        below, right = -height % step, -width_ % step
        notes.append(
            f"Images of {height}x{width_} pixels are padded to multiples of {step} before the model: "
            f"`x = torch.nn.functional.pad(x, (0, {right}, 0, {below}), mode='replicate')`. Without it some "
            "families cut the edge off."
        )
    return notes


def trained_feature(method: nn.Module, backbone: Any) -> Pooled:
    """What of a backbone its method trains: FOLK's class token, where it distils that, else the mean of the map."""
    distils_token = getattr(method, "distil", "pooled") in ("auto", "class_token")
    return "class_token" if distils_token and backbone.has_class_token else "mean"


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file, replaced atomically."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    replace_atomically(path, lambda temporary: save_file(plain, temporary, metadata=dict(metadata or {})))


def read_tensors(path: Path, option: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: it is cut short or not there; the sentence begins with ``option``.
    """
    with _whole(path, option):
        return dict(load_file(path))


@contextmanager
def _whole(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        reason = brief(error, 160)
        raise UserError(f"{option}: {path} cannot be read, it may be cut short ({reason})") from error


def differences(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What is too many, missing or of another shape, a phrase each."""
    found, wanted = ({name: tuple(one.shape) for name, one in part.items()} for part in (state, expected))
    return [
        *(f"{name} {found[name]} is too many" for name in sorted(found.keys() - wanted.keys())),
        *(f"{name} {wanted[name]} is missing" for name in sorted(wanted.keys() - found.keys())),
        *(
            f"{name} is {found[name]} instead of {wanted[name]}"
            for name in sorted(wanted.keys() & found.keys())
            if found[name] != wanted[name]
        ),
    ]


def load_fitting(module: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Put weights into a module, in place.

    Raises:
        UserError: they do not fit; the sentence begins with ``what`` and names three of the differences.
    """
    problems = differences(weights, module.state_dict())
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{what}: {', '.join(problems[:3])}{more}")
    module.load_state_dict(dict(weights))


def _pin_pooling(config: dict[str, Any], model: nn.Module, pooled: Pooled | None) -> dict[str, str]:
    """Write into the config how features are pooled, so that no default of timm's changes them.

    timm moves the final normalization behind the pooling where a ViT averages its tokens, which would leave
    the trained one out; ``fc_norm=False`` keeps it where it was trained.
    """
    arguments = config.setdefault("model_args", {})
    arguments.pop("num_classes", None)  # it stands at the top; transformers gives it a second time and fails
    taken = inspect.signature(type(model).__init__).parameters
    norm = next((name for name in ("fc_norm", "use_fc_norm") if name in taken), None)
    is_trained = isinstance(getattr(model, "fc_norm", None), nn.Identity)
    if pooled is None or norm is None or "global_pool" not in taken or not is_trained:
        return {}
    has_token = getattr(model, "cls_token", None) is not None
    if pooled == "class_token" and not has_token:
        pooled = "mean"
    arguments["global_pool"] = config["global_pool"] = "avg" if pooled == "mean" else "token"
    arguments[norm] = False
    return {"pooled": pooled}


def find_backbone(text: str | Path, option: str = "model") -> Path:
    """The folder with config.json and model.safetensors behind a run or an exported folder.

    Args:
        text: the run (of a pre-training or a fine-tuning), the exported folder, or the run's ``backbone``.
        option: what errors call it.

    Raises:
        UserError: there is none.
    """
    path = Path(text).expanduser()
    check_encoding(path, option)
    for folder in (path, path / "backbone", path / CLASSIFIER):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    if path.is_file():
        raise UserError(
            f"{option} ({text}) is a file; freqmask convert {text} --out FOLDER makes a model of it"
        )
    if RunFolder(path).exists():
        raise UserError(f"{option} ({text}) has no model yet: its run has not reached a checkpoint")
    forms = "a run folder, an exported folder, timm:NAME" + (" or random:NAME" if option == "model" else "")
    raise UserError(f"{option} ({text}) must be {forms}; {_what_is_wrong(path, str(text))}")


def _what_is_wrong(path: Path, text: str) -> str:
    """Why there is nothing of that name: the likely slips."""
    if path.is_dir():
        return f"there is no backbone in it ({CONFIG} with {WEIGHTS})"
    prefix, colon, bare = text.partition(":")
    name = bare.removeprefix("timm/") if colon else text
    if f"{prefix}:" == RANDOM:
        return "leave it out to begin with random weights"
    if timm.is_model(name.split(".")[0]):
        return f"public weights are {PUBLIC}{name}"
    near = nearest(path.name, [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else [])
    return "nothing of that name exists" + (f"; {near}" if near.startswith("did you mean") else "")


def read_config(folder: Path, option: str = "model") -> dict[str, Any]:
    """The config.json of an exported folder, its weights looked at but not loaded.

    Raises:
        UserError: it is no JSON of timm's, or the weights are cut short.
    """
    path = folder / CONFIG
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise UserError(f"{option}: {path} is far larger than any config.json; it is refused")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{option}: {path} is not valid JSON; export the model again") from error
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be read ({error.strerror})") from error
    _check_config(config, path, option)
    with _whole(folder / WEIGHTS, option), safe_open(folder / WEIGHTS, "pt") as weights:
        weights.keys()
    return dict(config)


def architecture_in(config: Mapping[str, Any]) -> tuple[str, dict[str, Any], int | None]:
    """The timm name behind a config.json, its arguments, and the side of its patches where it is not the name's own."""
    ours = {"img_size", "in_chans", "num_classes", "global_pool", "fc_norm", "use_fc_norm"}
    arguments = {name: value for name, value in config.get("model_args", {}).items() if name not in ours}
    return str(config["architecture"]), arguments, arguments.pop("patch_size", None)


def run_behind(folder: Path) -> RunFolder | None:
    """The run that wrote a folder of weights, where it lies in one."""
    run = RunFolder(folder.resolve().parent)
    return run if run.exists() else None


def fitted(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Statistics of color images for another number of channels: their mean for each."""
    if len(values) == channels:
        return tuple(float(value) for value in values)
    return (sum(values) / len(values),) * channels


def _check_config(config: Any, path: Path, option: str) -> None:
    pretrained = config.get("pretrained_cfg") if isinstance(config, dict) else None
    if not isinstance(pretrained, dict) or not isinstance(config.get("architecture"), str):
        raise UserError(f"{option}: {path} must be a timm config with architecture and pretrained_cfg")
    size = pretrained.get("input_size")
    if not (isinstance(size, list) and len(size) == 3 and all(isinstance(n, int) and n > 0 for n in size)):
        raise UserError(f"{option}: {path} must give input_size as channels, height and width")
    for name in ("mean", "std"):
        values = pretrained.get(name)
        if not isinstance(values, list) or len(values) != size[0]:
            raise UserError(f"{option}: {path} must give {name} as {size[0]} numbers, one a channel")
