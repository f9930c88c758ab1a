"""The backbone for other software: a format is a function that writes one file or folder."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from freqmask import __version__
from freqmask.backbones import Backbone
from freqmask.errors import UserError, nearest
from freqmask.interop.mfm_layout import mfm_encoder, mfm_state
from freqmask.interop.models import OpenedModel
from freqmask.interop.outputs import check_out, new_folder
from freqmask.interop.runs import run_state
from freqmask.interop.timm_folder import DECODER, Pooled, write_timm_folder
from freqmask.training.checkpoint import replace_atomically, save_atomically
from freqmask.training.run_folder import RunFolder

TOLERANCE = 1e-4  # of the largest feature; float32 sums in another order differ by about 1e-6 of it
_LARGEST_ONE_FILE = 1_900_000_000  # bytes; a protobuf message ends at 2 GiB


@dataclass(frozen=True)
class Format:
    """One way to hand a backbone on.

    Attributes:
        write: writes the model to the path.
        suffix: of the file; empty for a folder.
        summary: for the help.
    """

    write: Callable[[OpenedModel, Path], list[str]]
    suffix: str
    summary: str


class Exported(nn.Module):
    """What graphs compute: normalisation, backbone, both features.

    Args:
        opened: the model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, opened: OpenedModel) -> None:
        super().__init__()
        self.backbone: Backbone = opened.backbone
        self.register_buffer("mean", torch.tensor(opened.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(opened.std)[:, None, None])

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> tuple[Tensor, Tensor]:
        """Pooled feature (B, D) and feature map (B, D, h, w) of images in [0, 1]."""
        features = self.backbone((images - self.mean) / self.std)
        return features.pooled, features.feature_map


def export_model(
    opened: OpenedModel, out: str | Path, format: str = "timm", overwrite: bool = False
) -> list[str]:
    """Write a model in a format.

    Args:
        opened: the model.
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
    chosen = FORMATS[format]
    path = check_out(out, overwrite, folder=not chosen.suffix)
    return chosen.write(opened, path)


def pooled_of(method: str | None, opened: OpenedModel) -> Pooled:
    """What a loaded backbone shall give when it is called: FOLK trains the class token, the others the map."""
    pinned = opened.facts.get("pooled")
    if pinned in ("mean", "class_token"):
        return pinned
    return "class_token" if method == "folk" and opened.backbone.has_class_token else "mean"


def decoder_of(opened: OpenedModel) -> dict[str, Tensor]:
    """The reconstruction head that was trained with a backbone; empty where none came along.

    Raises:
        UserError: the run has gone on since its backbone was written, or the file is broken.
    """
    folder = opened.folder
    if folder is None:
        return {}
    if (folder / DECODER).is_file():
        try:
            return dict(load_file(folder / DECODER))
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"decoder ({folder / DECODER}) cannot be read, it may be cut short ({error})"
            ) from error
    run = RunFolder(folder.resolve().parent)
    if not run.exists():
        return {}
    prefix = "method.decoder."
    state = run_state(run.path)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _write_timm(opened: OpenedModel, path: Path) -> list[str]:
    with new_folder(path) as scratch:
        write_timm_folder(
            opened.module,
            scratch,
            input_size=opened.input_size,
            mean=opened.mean,
            std=opened.std,
            facts=exported_facts(opened),
            pooled=pooled_of(opened.facts.get("method"), opened),
            decoder=decoder_of(opened) or None,
        )
    return [f'timm.create_model("local-dir:{path}", pretrained=True)', f'AutoModel.from_pretrained("{path}")']


def exported_facts(opened: OpenedModel) -> dict[str, Any]:
    """What traces weights back, for config.json and the metadata of files."""
    return {
        "version": __version__,
        "from": opened.name,
        **opened.facts,
        "value_range": opened.value_range,
        "stage": opened.backbone.stage,
    }


def _write_mfm(opened: OpenedModel, path: Path) -> list[str]:
    encoder = mfm_encoder(opened.module)
    decoder = decoder_of(opened)
    if not decoder:
        raise UserError(
            f"format (mfm-checkpoint) holds encoder and decoder, and {opened.name} has no decoder; "
            "export a run, or --format timm"
        )
    state = mfm_state(encoder, decoder)
    save_atomically({"model": state, "epoch": _epoch(opened)}, path)
    return [f"{len(state)} tensors, plain: torch.load(..., weights_only=True) reads it"]


def _epoch(opened: OpenedModel) -> int:
    if "epoch" in opened.facts or opened.folder is None:
        return int(opened.facts.get("epoch", 0))
    run = RunFolder(opened.folder.resolve().parent)
    images = run.state().get("images") if run.exists() else None
    return int(opened.facts.get("step", 0) * run.config()["batch_size"] / images) if images else 0


def _write_onnx(opened: OpenedModel, path: Path) -> list[str]:
    _require("onnx", "onnxscript", "onnxruntime")
    import onnx

    module = Exported(opened).eval()
    large = sum(tensor.nbytes for tensor in module.state_dict().values()) > _LARGEST_ONE_FILE
    if large:
        raise UserError("format (onnx) ends at 2 GB in one file; --format torch-export has no such end")
    with _silence():
        program = torch.onnx.export(
            module,
            (_example(opened, 2),),
            dynamo=True,
            input_names=["images"],
            output_names=["features", "feature_map"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            external_data=False,
            verbose=False,
        )
    assert program is not None  # only the older exporter gives none
    proto = program.model_proto
    for name, value in _graph_metadata(opened).items():
        proto.metadata_props.add(key=name, value=value)

    worst = 0.0

    def write(temporary: Path) -> None:
        nonlocal worst
        onnx.save(proto, str(temporary))
        worst = _compare_onnx(temporary, module, opened)

    replace_atomically(path, write)
    return [
        "images in [0, 1], normalisation inside; outputs features (B, D) and feature_map (B, D, h, w)",
        f"checked in onnxruntime with batches of 1 and 3: largest difference to torch {worst:.1e}",
    ]


def _compare_onnx(path: Path, module: nn.Module, opened: OpenedModel) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def compute(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()}))

    return compare(compute, module, opened)


def _write_torch_export(opened: OpenedModel, path: Path) -> list[str]:
    module = Exported(opened).eval()
    with _silence(), torch.no_grad():
        program = torch.export.export(
            module, (_example(opened, 2),), dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}}
        )
    worst = 0.0

    def write(temporary: Path) -> None:
        nonlocal worst
        content = io.BytesIO()
        with _silence():
            torch.export.save(
                program, content, extra_files={"freqmask.json": json.dumps(_graph_metadata(opened))}
            )
            temporary.write_bytes(content.getvalue())
            content.seek(0)
            loaded = torch.export.load(content).module()
        worst = compare(loaded, module, opened)

    replace_atomically(path, write)
    return [
        f'torch.export.load("{path}").module()(images in [0, 1]) gives features and feature_map',
        f"checked with batches of 1 and 3: largest difference {worst:.1e}",
    ]


@torch.no_grad()
def compare(compute: Callable[[Tensor], tuple[Tensor, ...]], module: nn.Module, opened: OpenedModel) -> float:
    """The largest difference between an exported graph and the module it was made from.

    Raises:
        UserError: it is larger than float32 explains.
    """
    worst = 0.0
    for batch in (1, 3):
        images = _example(opened, batch)
        for got, expected in zip(compute(images), module(images), strict=True):
            difference = float((got - expected).abs().max())
            if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
                raise UserError(
                    f"the exported graph computes otherwise than torch (by {difference:.1e}); not written"
                )
            worst = max(worst, difference)
    return worst


def _example(opened: OpenedModel, batch: int) -> Tensor:
    return torch.rand(batch, *opened.input_size, generator=torch.Generator().manual_seed(batch))


def _graph_metadata(opened: OpenedModel) -> dict[str, str]:
    facts = {"mean": opened.mean, "std": opened.std, "normalised_inside": True, **exported_facts(opened)}
    return {f"freqmask_{name}": json.dumps(value) for name, value in facts.items()}


def _require(*names: str) -> None:
    missing = []
    for name in names:
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise UserError(f"format (onnx) needs {', '.join(missing)}; pip install 'freqmask[export]'")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Exporters log and warn of their own future; the user is told what matters."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


FORMATS = {
    "timm": Format(_write_timm, "", "a folder for timm and transformers"),
    "onnx": Format(_write_onnx, ".onnx", "a graph for ONNX runtimes"),
    "torch-export": Format(_write_torch_export, ".pt2", "a graph for torch.export.load"),
    "mfm-checkpoint": Format(_write_mfm, ".pth", "the file that users of MFM's checkpoints load"),
}
