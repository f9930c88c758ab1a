"""What writes a backbone in each format: a timm folder, here or on the hub, MFM's checkpoint, ONNX, torch.export.

Their names (FORMATS) stand in :mod:`.formats`, which commands read before torch is imported.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from freqmask import __version__
from freqmask.backbones import Features
from freqmask.console import silenced
from freqmask.errors import UserError, brief
from freqmask.interop.feature_space import FILE, KEY, load_space
from freqmask.interop.foreign_weights import mfm_encoder
from freqmask.interop.formats import run_behind
from freqmask.interop.models import OpenedClassifier, OpenedModel, decoder_of
from freqmask.interop.weight_files import README, Pooled, write_timm_folder
from freqmask.spectrum import Images, Normalization
from freqmask.training.auto import is_out_of_memory
from freqmask.training.files import new_folder, read_rows, replace_atomically
from freqmask.training.run_folder import RESULTS, RunFolder, names_in, save_atomically

Compute = Callable[[Tensor], tuple[Tensor, ...]]  # images (B, C, H, W) in [0, 1] to outputs
TOLERANCE = 1e-4  # of the largest feature; float32 sums in another order differ by about 1e-6 of it
_LARGEST_ONE_FILE = 1_900_000_000  # bytes; a protobuf message ends at 2 GiB
_EXPORTERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")  # loggers


class Exported(nn.Module):
    """What graphs compute: normalization, then a network, which gives one tensor or several.

    Of a backbone these are ``pooled``, what stands for an image, and the map.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Any],
        mean: Sequence[float],
        std: Sequence[float],
        pooled: Pooled = "mean",
    ) -> None:
        super().__init__()
        self.network, self.normalise, self.pooled = network, Normalization(len(mean), mean, std), pooled

    def forward(self, images: Images) -> tuple[Tensor, ...]:
        """The network's outputs for images in [0, 1]."""
        outputs = self.network(self.normalise(images))
        if isinstance(outputs, Features):
            token = outputs.class_token if self.pooled == "class_token" else None
            return outputs.pooled if token is None else token, outputs.feature_map
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


@dataclass(frozen=True)
class Graph:
    """What ONNX and torch.export are given."""

    module: nn.Module  # of images in [0, 1]
    outputs: dict[str, str]  # name of each output to what it holds
    input_size: tuple[int, int, int]  # channels, height and width of an image
    metadata: dict[str, Any]  # plain values that go into the file
    multiple: int | None = None  # what height and width may be any multiple of; None where the size is fixed


def graph_of(opened: OpenedModel | OpenedClassifier) -> Graph:
    """A backbone with what stands for an image and its map, or a classifier with its logits."""
    notes = {"mean": opened.mean, "std": opened.std, "normalised_inside": True, **exported_metadata(opened)}
    if isinstance(opened, OpenedClassifier):
        multiple = None if opened.module.pretrained_cfg.get("fixed_input_size") else 32
        outputs = {"logits": f"(B, {len(opened.class_names)} classes, named in the metadata)"}
        exported = Exported(opened.module, opened.mean, opened.std)
        notes["class_names"] = opened.class_names
    else:
        multiple = None if opened.backbone.fixed_size else max(32, opened.backbone.stride)
        notes["pooled"] = pooled_of(opened)
        meaning = "the class token" if notes["pooled"] == "class_token" else "the mean of the map"
        meaning += "" if load_space(opened) is None else ", not as --features save kept them"
        outputs = {"features": f"(B, D: {meaning})", "feature_map": "(B, D, h, w)"}
        exported = Exported(opened.backbone, opened.mean, opened.std, notes["pooled"])
    return Graph(exported, outputs, opened.input_size, notes, multiple)


def pooled_of(opened: OpenedModel) -> Pooled:
    """What a loaded backbone shall give when it is called: FOLK trains the class token, the others the map."""
    pinned = opened.metadata.get("pooled")
    if pinned in ("mean", "class_token"):
        return pinned
    is_token = opened.metadata.get("method") == "folk" and opened.backbone.has_class_token
    return "class_token" if is_token else "mean"


def _holds(format: str, what: str) -> UserError:
    return UserError(f"format ({format}) holds {what} only; --format onnx or torch-export holds this network")


def write_timm(opened: OpenedModel | OpenedClassifier | Graph, path: Path) -> list[str]:
    """A folder that timm and transformers load."""
    if isinstance(opened, Graph):
        raise _holds("timm", "timm models")
    if isinstance(opened, OpenedClassifier):
        more: dict[str, Any] = {"crop_pct": opened.crop_share, "label_names": opened.class_names}
        notes = [f"with its head: {len(opened.class_names)} classes"]
    else:
        more, notes = {"pooled": pooled_of(opened), "backbone": opened.backbone}, []
        more["decoder"] = decoder_of(opened) or None
    with new_folder(path) as scratch:
        write_timm_folder(
            opened.module,
            scratch,
            input_size=opened.input_size,
            mean=opened.mean,
            std=opened.std,
            metadata=exported_metadata(opened),
            **more,
        )
        if isinstance(opened, OpenedModel) and opened.folder is not None and load_space(opened) is not None:
            shutil.copyfile(opened.folder / FILE, scratch / FILE)
    notes.append(f'timm.create_model("local-dir:{path}", pretrained=True)')
    if not more.get("label_names"):
        notes.append(f'AutoModel.from_pretrained("{path}")')
    if (path / README).is_file():
        notes.append(f"its features take another call: {path / README}")
    return notes


def exported_metadata(opened: OpenedModel | OpenedClassifier) -> dict[str, Any]:
    """What traces weights back, for config.json and the metadata of files."""
    plain = {
        "version": __version__,
        "from": opened.name,
        # its folder's notes are on timm's calls at its own size: a timm folder gets its own, a graph pads inside
        **{name: value for name, value in opened.metadata.items() if name != "notes"},
        "value_range": opened.value_range,
    }
    if isinstance(opened, OpenedModel):
        plain |= {"stage": opened.backbone.stage}
        plain |= {"crop": opened.trained_crop} if opened.trained_crop else {}
    return plain


def write_mfm(opened: OpenedModel | OpenedClassifier | Graph, path: Path) -> list[str]:
    """A checkpoint as MFM's authors released them (docs/methods.md, exchange format)."""
    if not isinstance(opened, OpenedModel):
        raise _holds("mfm-checkpoint", "encoders with their decoder")
    state = {f"encoder.{name}": tensor for name, tensor in mfm_encoder(opened.module).items()}
    decoder = decoder_of(opened)
    if not decoder:
        raise UserError(
            f"format (mfm-checkpoint) holds encoder and decoder, and {opened.name} has no decoder; "
            "export a run, or --format timm"
        )
    state |= {f"decoder.{name}": tensor for name, tensor in decoder.items()}
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    epoch, images = opened.metadata.get("epoch", 0), opened.run and opened.run.state().get("images")
    if opened.run is not None and "epoch" not in opened.metadata and images:
        epoch = opened.metadata.get("step", 0) * opened.run.config()["batch_size"] / images
    save_atomically({"model": state, "epoch": int(epoch)}, path)
    notes = [f"{len(state)} tensors, plain: torch.load(..., weights_only=True) reads it"]
    height, width = opened.input_size[1:]
    if height != width and "encoder.pos_embed" in state:
        notes.append(f"freqmask convert needs its size: --model_args '{{img_size: [{height}, {width}]}}'")
    return notes


def write_onnx(opened: OpenedModel | OpenedClassifier | Graph, path: Path) -> list[str]:
    """A file for ONNX runtimes, normalization inside."""
    graph = opened if isinstance(opened, Graph) else graph_of(opened)
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UserError(f"format (onnx) needs {', '.join(missing)}; pip install 'freqmask[export]'")
    import onnx
    import onnxruntime

    if sum(tensor.nbytes for tensor in graph.module.state_dict().values()) > _LARGEST_ONE_FILE:
        raise UserError("format (onnx) ends at 2 GB in one file; --format torch-export has no such end")

    def write(path: Path, example: Tensor, dynamic: dict[int, Any]) -> Compute:
        program = torch.onnx.export(
            graph.module,
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=list(graph.outputs),
            dynamic_shapes={"images": dynamic},
            external_data=False,
            verbose=False,
        )
        assert program is not None  # only the older exporter gives none
        model = program.model_proto  # made anew by every look at it
        for name, value in _metadata(graph).items():
            model.metadata_props.add(key=name, value=value)
        onnx.save(model, str(path))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what it logs as an error is raised, too, and maybe tried otherwise
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda images: tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()})))

    return _write_graph(graph, path, write, "images in [0, 1], normalization inside", "onnxruntime")


def write_torch_export(opened: OpenedModel | OpenedClassifier | Graph, path: Path) -> list[str]:
    """A program of torch.export, normalization inside."""
    graph = opened if isinstance(opened, Graph) else graph_of(opened)

    def write(path: Path, example: Tensor, dynamic: dict[int, Any]) -> Compute:
        with torch.no_grad():
            program = torch.export.export(graph.module, (example,), dynamic_shapes={"images": dynamic})
        content = io.BytesIO()  # torch refuses a path whose name does not end in .pt2
        torch.export.save(program, content, extra_files={"freqmask.json": json.dumps(_metadata(graph))})
        path.write_bytes(content.getvalue())
        content.seek(0)
        return torch.export.load(content).module()

    return _write_graph(
        graph, path, write, f'torch.export.load("{path}").module()(images in [0, 1])', "torch"
    )


def _write_graph(
    graph: Graph,
    path: Path,
    write: Callable[[Path, Tensor, dict[int, Any]], Compute],
    call: str,
    checked_in: str,
) -> list[str]:
    """Any image size where the network takes any; what an exporter cannot follow is fixed to its own.

    ``write`` fills a file, given an example and the dynamic axes, and returns how to compute with it. The sentences
    tell how it is called, what it takes, and how well it agrees.
    """
    outputs = " and ".join(f"{name} {what}" for name, what in graph.outputs.items())
    size = graph.input_size[1:]
    batch: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    attempts = [(batch, [size], f"the image size is fixed: {size[0]}x{size[1]}")]
    step = graph.multiple
    if step is not None and all(side % step == 0 for side in size):
        sides = {n: step * torch.export.Dim(name, min=1) for n, name in ((2, "rows"), (3, "columns"))}
        # traced at three by four steps: an exporter takes a size of one for a constant
        sizes = [(3 * step, 4 * step), size]
        attempts.insert(0, (batch | sides, sizes, f"of any image size: multiples of {step}"))
    graph.module.eval()
    largest = ""

    def attempt(temporary: Path, dynamic: dict[int, Any], sizes: Sequence[tuple[int, int]]) -> None:
        nonlocal largest
        # exporters log and warn of their own future; the user is told what matters
        with silenced(*_EXPORTERS), redirect_stdout(io.StringIO()):
            compute = write(temporary, _example(graph, 2, sizes[0]), dynamic)
        largest = compare(compute, graph, sizes)

    for number, (dynamic, sizes, taken) in enumerate(attempts, start=1):
        try:
            replace_atomically(path, partial(attempt, dynamic=dynamic, sizes=sizes))
            checked = f"checked in {checked_in} with batches of 1 and 3: largest difference {largest}"
            return [f"{call}; outputs {outputs}", taken, checked]
        except Exception as error:
            # exporters raise whatever they please where a shape decides what is computed
            if number < len(attempts):
                continue
            if isinstance(error, (UserError, OSError, ImportError)) or is_out_of_memory(error):
                raise
            is_onnx = checked_in == "onnxruntime"  # it goes through torch.export, so the hint has no way back
            raise UserError(
                f"format ({'onnx' if is_onnx else 'torch-export'}) cannot hold this network, its exporter ends in "
                f"{type(error).__name__}: {brief(error)}{'; try --format torch-export' if is_onnx else ''}"
            ) from error
    raise AssertionError


@torch.no_grad()
def compare(compute: Compute, graph: Graph, sizes: Sequence[tuple[int, int]]) -> str:
    """The largest difference between an exported graph and the module it was made from, and that over the values.

    Raises:
        UserError: it is larger than float32 explains.
    """
    worst = share = 0.0
    for batch, size in itertools.product((1, 3), sizes):
        images = _example(graph, batch, size)
        for got, expected in zip(compute(images), graph.module(images), strict=True):
            difference, largest = float((got - expected).abs().max()), float(expected.abs().max())
            if not difference <= TOLERANCE * max(1.0, largest):
                raise UserError(
                    f"the exported graph computes otherwise than torch (by {difference:.1e} where the largest "
                    f"value is {largest:.1e}); not written"
                )
            worst, share = max(worst, difference), max(share, difference / max(largest, 1e-30))
    return f"{worst:.1e}, {share:.1e} of the largest value"


def _example(graph: Graph, batch: int, size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.rand(batch, graph.input_size[0], *size, generator=generator)


def _metadata(graph: Graph) -> dict[str, str]:
    return {f"freqmask_{name}": json.dumps(value) for name, value in graph.metadata.items()}


# options of a run that name places on this machine, or say nothing of the backbone
_LOCAL = "data out init config probe_data logger workers devices strategy num_nodes options".split()  # noqa: SIM905
_LOCAL_COLUMNS = re.compile(r"data|path|file|out|folder|model", re.IGNORECASE)


def push_model(
    opened: OpenedModel | OpenedClassifier | Graph,
    repository: str,
    *,
    public: bool = False,
    with_images: bool = False,
    api: Any = None,
) -> str:
    """Send the timm folder and a model card.

    Args:
        opened: the model.
        repository: ``USER/NAME``, made where it is missing.
        public: False makes it private.
        with_images: True adds previews, and the data's names and paths to the card.
        api: a ``huggingface_hub.HfApi``; None makes one.

    Returns:
        The repository's address.

    Raises:
        UserError: the hub refuses or does not answer; the model is none of timm's.
    """
    if isinstance(opened, Graph):
        raise _holds("timm", "timm models")
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi(library_name="freqmask", library_version=__version__)
    run = run_behind(opened.folder) if opened.folder is not None else None
    if not with_images:
        shown = {n: v for n, v in opened.metadata.items() if n == KEY or not _holds_path(v)}
        opened = replace(opened, metadata=shown)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        write_timm(opened, folder)
        previews = sorted(run.previews.glob("step-*.png"))[-1:] if with_images and run is not None else []
        for preview in previews:
            shutil.copy(preview, folder)
        card = model_card(opened, run, repository, [preview.name for preview in previews], with_images)
        (folder / README).write_text(card, encoding="utf-8", errors="backslashreplace")
        try:
            address = api.create_repo(repository, private=not public, exist_ok=True)
            api.upload_folder(
                repo_id=repository,
                folder_path=str(folder),
                commit_message=f"{opened.name}, freqmask {__version__}",
            )
        except Exception as error:  # the hub's library raises its own, httpx's and the system's
            reason = brief(error, 200)
            raise UserError(f"push ({repository}) failed ({type(error).__name__}: {reason})") from error
    return str(address)


def model_card(
    opened: OpenedModel | OpenedClassifier,
    run: RunFolder | None,
    repository: str,
    previews: list[str],
    with_images: bool,
) -> str:
    """The README.md of what is pushed, with the previews in its folder; ``with_images`` names the data, too."""
    from huggingface_hub import ModelCardData

    options = run.config() if run is not None else {}
    task, kind = "image-feature-extraction", "backbone, pre-trained without labels"
    if isinstance(opened, OpenedClassifier):
        task, kind = "image-classification", f"classifier of {len(opened.class_names)} classes, fine-tuned"
    header = ModelCardData(library_name="timm", pipeline_tag=task, tags=["freqmask", "timm"])
    parts = [
        f"---\n{header}\n---",
        f"# {repository.split('/')[1]}",
        f"A {opened.module.pretrained_cfg.get('architecture', 'timm')} {kind} by "
        f"[freqmask](https://pypi.org/project/freqmask/) {__version__}"
        + (f" ({options['method']})." if options else "."),
        f"```python\nimport timm\nmodel = timm.create_model('hf-hub:{repository}', pretrained=True).eval()\n```",
        f"Images of {opened.input_size[0]} channels, {opened.input_size[1]}x{opened.input_size[2]} pixels; values "
        f"`{opened.value_range}` become [0, 1], then mean {list(opened.mean)} and std {list(opened.std)}.",
    ]
    if run is not None:
        public = {
            name: value for name, value in options.items() if name not in _LOCAL and not _holds_path(value)
        }
        state = run.state()
        images = f"{state['images']:,} images" if isinstance(state.get("images"), int) else "Images"
        source = f", from {', '.join(map(str, options.get('data') or []))}" if with_images else ""
        parts += ["## Data", f"{images}, fingerprint `{state.get('data')}`{source}."]
        parts += ["## Recipe", f"```yaml\n{yaml.safe_dump(public, sort_keys=False)}```"]
        parts += ["## Results", _results(run)]
    parts += [f"![preview]({name})" for name in previews]
    return "\n\n".join(parts) + "\n"


def _holds_path(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return any(map(_holds_path, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and ("/" in value or "\\" in value)


def _results(run: RunFolder) -> str:
    summary, rows = run.summary(), read_rows(run.path / RESULTS)
    own = {None, "", *names_in(rows, run.path.resolve())}
    rows = [row for row in rows if row.get("model") in own]  # others were compared with it
    names = ("steps", "loss", "relative_loss", "held_out_loss", "held_out_relative_loss")
    lines = [f"- {name.replace('_', ' ')}: {summary[name]:.4g}" for name in names if name in summary]
    columns = [name for name in (rows[0] if rows else {}) if name and not _LOCAL_COLUMNS.search(name)]
    # a variant tells measurements apart, and a slash in it is none of a path: pgd linf 4/255
    columns = [n for n in columns if n == "variant" or not any(_holds_path(row[n]) for row in rows)]
    if columns:
        lines += ["", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(str(row[name] or '') for name in columns)} |" for row in rows]
    return "\n".join(lines) or "The run has not ended yet."
