"""A model's forms on the disk and the hub: formats by name, a folder found, its config read. No torch here.

Commands check what they were given by this, before they import what takes seconds.
"""

from __future__ import annotations

import glob
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from safetensors import SafetensorError, safe_open

from freqmask.errors import UserError, brief, nearest
from freqmask.training.files import check_encoding, check_out, clear_leftovers
from freqmask.training.run_folder import RunFolder, folders_in

# name -> function of freqmask.interop.exporters; a further format of a file is a line here and its function there
FORMATS = {
    "timm": "write_timm",
    "onnx": "write_onnx",
    "torch-export": "write_torch_export",
    "mfm-checkpoint": "write_mfm",
}
FOLDER = "timm"  # the one that is no file
if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[tuple(FORMATS)]
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
DECODER = "decoder.safetensors"  # ours: timm and transformers pass it over
OURS = "freqmask"  # the key of config.json under which our own metadata stand; timm passes it over
# folders of a run that timm loads; the second of a fine-tuning
BACKBONE, CLASSIFIER = "backbone", "classifier"
PUBLIC, RANDOM = "timm:", "random:"  # how MODEL names public and fresh weights
PIXELS = "pixels"  # a MODEL of evaluations alone
LOCAL = "local-dir:"  # how timm writes a folder where a model's name is asked
_LARGEST_CONFIG = 10_000_000  # bytes; a real one has a few thousand
_SECONDS = 5.0
_ENDPOINT = "https://huggingface.co"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def export_model(opened: Any, out: str | Path, format: str = "timm", overwrite: bool = False) -> list[str]:
    """Write a model in a format.

    Args:
        opened: an :class:`~freqmask.interop.models.OpenedModel`, an ``OpenedClassifier``, or any other
            :class:`~freqmask.interop.exporters.Graph`.
        out: a folder for ``timm``, a file for the others.
        format: one of ``FORMATS``.
        overwrite: True replaces what is at ``out``.

    Returns:
        Whole sentences on what was written and checked.

    Raises:
        UserError: the format is unknown, cannot hold the model, or ``out`` cannot be written.
    """
    if format not in FORMATS:
        raise UserError(f"format ({format}) is unknown; {nearest(format, FORMATS)}")
    path = check_out(out, overwrite, folder=format == FOLDER)
    clear_leftovers(path.absolute().parent, pattern=f".{glob.escape(path.name)}.*.tmp")
    return getattr(import_module("freqmask.interop.exporters"), FORMATS[format])(opened, path)


def check_model(text: str) -> None:
    """Refuse a MODEL that is neither on the disk nor a name of timm's; names and files are not looked into."""
    place = text.removeprefix(RANDOM)
    if not is_architecture(text) and not RunFolder(Path(place).expanduser()).exists():
        find_backbone(place)


def is_architecture(text: str) -> bool:
    """Whether MODEL is ``timm:NAME`` or ``random:NAME``, and no folder."""
    is_random = text.startswith(RANDOM) and not Path(text.removeprefix(RANDOM)).expanduser().is_dir()
    return text.startswith(PUBLIC) or is_random


def check_file(path: str | Path) -> None:
    """Refuse what is no file that could hold somebody's weights."""
    if Path(path).is_dir():
        raise UserError(f"file ({path}) is a folder; an exported folder needs no converting")
    if not Path(path).is_file():
        raise UserError(f"file ({path}) does not exist")
    if _is_of_a_folder(Path(path)):
        raise UserError(f"file ({path}) needs no converting; name its folder as MODEL: {Path(path).parent}")


def _is_of_a_folder(file: Path) -> bool:
    """Whether a file is the weights of a folder that opens as it is, with its statistics and its image size."""
    with suppress(UserError):
        return file.name == WEIGHTS and bool(read_config(file.parent))
    return False


def find_backbone(text: str | Path, option: str = "model") -> Path:
    """The folder with config.json and model.safetensors behind a run, its ``backbone``, or an exported folder.

    Raises:
        UserError: there is none; the sentence begins with ``option``.
    """
    path = Path(text).expanduser()
    check_encoding(path, option)
    for folder in (path, path / BACKBONE, path / CLASSIFIER):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    if path.is_file():
        way = f"name its folder: {path.parent}"
        if not _is_of_a_folder(path):
            way = f"freqmask convert {text} --out FOLDER makes a model of it"
        raise UserError(f"{option} ({text}) is a file; {way}")
    if RunFolder(path).exists():
        if RunFolder(path).config().get("method") == "segment":
            raise UserError(
                f"{option} ({text}) is a segmentation network, which predict and export take; name a backbone"
            )
        raise UserError(f"{option} ({text}) has no model yet: its run has not reached a checkpoint")
    forms = "a run folder, an exported folder, timm:NAME" + (" or random:NAME" if option == "model" else "")
    raise UserError(f"{option} ({text}) must be {forms}; {_what_is_wrong(path, str(text))}")


def _what_is_wrong(path: Path, text: str) -> str:
    """Why there is nothing of that name: the likely slips."""
    if path.is_dir():
        runs = sorted(entry.name for entry in folders_in(path) if RunFolder(entry).exists())
        inside = f"; it holds the run {path / runs[0]}" if runs else ""
        return f"there is no backbone in it ({CONFIG} with {WEIGHTS}){inside}"
    prefix, colon, bare = text.partition(":")
    name = bare.removeprefix("timm/") if colon else text
    if f"{prefix}:" == RANDOM:
        return "leave it out to begin with random weights"
    if _is_of_timm(name.split(".")[0]):
        return f"public weights are {PUBLIC}{name}"
    near = nearest(path.name, [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else [])
    return "nothing of that name exists" + (f"; {near}" if near.startswith("did you mean") else "")


def _is_of_timm(name: str) -> bool:
    """Whether timm registers a model of that name, by its source: importing it takes seconds."""
    registered = f"@register_model\ndef {name}("
    sources = Path(str(distribution("timm").locate_file("timm/models"))).glob("*.py")
    return any(registered in path.read_text(encoding="utf-8") for path in sources)


def read_config(folder: Path, option: str = "model") -> dict[str, Any]:
    """The config.json of an exported folder; a UserError where it is none of timm's, or the weights are cut short."""
    path = folder / CONFIG
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise UserError(f"{option}: {path} is far larger than any config.json; it is refused")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{option}: {path} is not valid JSON; export the model again") from error
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be read ({error.strerror})") from error
    pretrained = config.get("pretrained_cfg") if isinstance(config, dict) else None
    if not isinstance(pretrained, dict) or not isinstance(config.get("architecture"), str):
        raise UserError(f"{option}: {path} must be a timm config with architecture and pretrained_cfg")
    size = pretrained.get("input_size")
    if not (isinstance(size, list) and len(size) == 3 and all(isinstance(n, int) and n > 0 for n in size)):
        raise UserError(f"{option}: {path} must give input_size as channels, height and width")
    for name in ("mean", "std"):
        if not isinstance(pretrained.get(name), list) or len(pretrained[name]) != size[0]:
            raise UserError(f"{option}: {path} must give {name} as {size[0]} numbers, one a channel")
    with readable(folder / WEIGHTS, option), safe_open(folder / WEIGHTS, "np") as weights:
        weights.keys()
    return dict(config)


@contextmanager
def readable(path: Path, option: str) -> Iterator[None]:
    """Within, a file of safetensors that is cut short or not there is a UserError, which begins with ``option``."""
    try:
        path.open("rb").close()  # safetensors says of a file that may not be read that it is not there
        yield
    except PermissionError as error:
        raise UserError(f"{option}: {path} may not be read; check its access rights") from error
    except (SafetensorError, OSError) as error:
        reason = brief(error, 160)
        raise UserError(f"{option}: {path} cannot be read, it may be cut short ({reason})") from error


def architecture_in(config: Mapping[str, Any]) -> tuple[str, dict[str, Any], int | None]:
    """The timm name behind a config.json, its arguments, and the side of its patches where it is not the name's own."""
    ours = {"img_size", "in_chans", "num_classes", "global_pool", "fc_norm", "use_fc_norm"}
    arguments = {name: value for name, value in config.get("model_args", {}).items() if name not in ours}
    return str(config["architecture"]), arguments, arguments.pop("patch_size", None)


def run_behind(folder: Path) -> RunFolder | None:
    """The run that wrote a folder of weights, where it is one of a run's own; others may lie in a run, too."""
    folder = folder.resolve()
    run = RunFolder(folder.parent)
    return run if folder.name in (BACKBONE, CLASSIFIER) and run.exists() else None


def fitted(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Statistics of color images for another number of channels: their mean for each."""
    return tuple(map(float, values)) if len(values) == channels else (sum(values) / len(values),) * channels


def check_reachable(what: str) -> None:
    """Raises a UserError, which begins with ``what``, where the hub does not answer or may not be asked."""
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        raise UserError(f"{what} cannot be reached: HF_HUB_OFFLINE is set; unset it or use a local folder")
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return  # only the proxy knows
    address = urlsplit(os.environ.get("HF_ENDPOINT", _ENDPOINT))
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"{what} cannot be reached: no connection to {address.hostname} ({error.strerror or error}); "
            "check the network, or use a local folder"
        ) from error


def check_hub(repository: str) -> None:
    """Raises a UserError where the name is none of the hub's, nobody is logged in, or the hub does not answer."""
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(f"push ({repository}) must be USER/NAME, a repository of the Hugging Face hub")
    from huggingface_hub import get_token

    if not get_token():
        raise UserError("push needs a token of the Hugging Face hub; run `hf auth login`, or set HF_TOKEN")
    check_reachable(f"push ({repository})")
