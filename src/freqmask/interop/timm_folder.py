"""A backbone as a folder that timm loads: ``timm.create_model("local-dir:FOLDER")``."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from freqmask.training.checkpoint import replace_atomically

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
DECODER = "decoder.safetensors"  # ours: timm and transformers pass it over
README = "README.md"  # only where a plain call needs words
OURS = "freqmask"  # the key of config.json under which our own facts stand; timm passes it over

Pooled = Literal["mean", "class_token"]


def write_timm_folder(
    model: nn.Module,
    folder: Path,
    *,
    input_size: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    facts: Mapping[str, Any],
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
        facts: plain values that trace the weights back (run, step, value range); they stand in config.json
            under ``freqmask`` and in the weights' metadata.
        pooled: what calling the loaded model gives: the mean of the map (what MFM trains) or the class
            token; None leaves what the model gives now.
        decoder: tensors of the reconstruction head, written beside the backbone.
        crop_pct: share of an image's side that the centred test window keeps.
        label_names: of a classifier's classes, in the order of its outputs.
    """
    with tempfile.TemporaryDirectory() as scratch:
        data_config = {"input_size": input_size, "mean": tuple(mean), "std": tuple(std), "crop_pct": crop_pct}
        # neither kind of weights: they follow below, with our metadata and replaced whole
        save_for_hf(model, scratch, safe_serialization=None, data_config=data_config)  # type: ignore[arg-type]
        config = json.loads((Path(scratch) / CONFIG).read_text())
    facts = {**facts, **_pin_pooling(config, model, pooled)}
    notes = [] if label_names is not None else plain_call_notes(model, input_size)
    if notes:
        facts["notes"] = notes
    config[OURS] = facts
    if label_names is not None:
        config["label_names"] = list(label_names)
    metadata = {"format": "pt", **{f"freqmask_{name}": json.dumps(value) for name, value in facts.items()}}
    write_tensors(folder / WEIGHTS, model.state_dict(), metadata)
    if decoder is not None:
        write_tensors(folder / DECODER, decoder, metadata)
    text = json.dumps(config, indent=2) + "\n"
    replace_atomically(folder / CONFIG, lambda path: _write(path, text))
    if notes:
        readme = "\n\n".join(["# How this backbone is called", *notes]) + "\n"
        replace_atomically(folder / README, lambda path: _write(path, readme))


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
    """A safetensors file, replaced whole."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    replace_atomically(path, lambda temporary: save_file(plain, temporary, metadata=dict(metadata or {})))


def _pin_pooling(config: dict[str, Any], model: nn.Module, pooled: Pooled | None) -> dict[str, str]:
    """Write into the config how features are pooled, so that no default of timm's changes them.

    timm moves the final normalisation behind the pooling where a ViT averages its tokens, which would leave
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


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
