"""Files of weights: timm folders and safetensors, written and read; files of ``torch.save``, read and not run.

A pickle is a program: it names functions and has them called. Here a name is either on a short list (the functions
that rebuild tensors) or becomes an :class:`Inert` stub that takes whatever it is given and does nothing. torch's own
``weights_only=True`` refuses a file for one foreign object beside the weights, which nearly all released
checkpoints hold (a yacs node, a numpy number, the arguments of a command).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import pickle
import tarfile
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file, save
from timm.models import save_for_hf
from torch import Tensor, nn

from freqmask.backbones import Backbone, eval_no_grad
from freqmask.errors import UserError, brief
from freqmask.interop.formats import CONFIG, DECODER, OURS, WEIGHTS, check_file, readable
from freqmask.training.files import replace_atomically
from freqmask.training.run_folder import write_text

PLAIN_CALL = "model(x)"
README = "README.md"  # only where a plain call needs words
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
    backbone: Backbone | None = None,
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
        backbone: the same model as we read it, by which it is found out whether a plain call answers the same.
        decoder: tensors of the reconstruction head, written beside the backbone.
        crop_pct: share of an image's side that the centered test window keeps.
        label_names: of a classifier's classes, in the order of its outputs.
    """
    with tempfile.TemporaryDirectory() as scratch:
        data_config: dict[str, Any] = {"mean": tuple(mean), "std": tuple(std), "crop_pct": crop_pct}
        # what a ViT of images that are padded was built for: timm takes no other size of it, and ours follows below
        built_for = input_size[1:] if backbone is None else backbone.padded_size
        data_config["input_size"] = (input_size[0], *built_for)
        # as all our images come; an architecture's own weights may be of bilinear or squeezed ones
        data_config |= {"interpolation": "bicubic", "crop_mode": "center"}
        # neither kind of weights: they follow below, with our metadata and replaced whole
        save_for_hf(model, scratch, safe_serialization=None, data_config=data_config)  # type: ignore[arg-type]
        config = json.loads((Path(scratch) / CONFIG).read_text())
    config["pretrained_cfg"]["input_size"] = list(input_size)
    pinned = _pin_pooling(config, model, pooled)
    metadata = {**metadata, **pinned}
    notes = []
    if label_names is None:
        read = None if pinned else backbone
        notes = plain_call_notes(model, input_size, read, pooled or "mean", metadata.get("stage", -1))
    if notes:
        metadata["notes"] = notes
    config[OURS] = metadata
    if label_names is not None:
        config["label_names"] = list(label_names)
    metadata = {"format": "pt", **{f"freqmask_{name}": json.dumps(value) for name, value in metadata.items()}}
    write_tensors(folder / WEIGHTS, model.state_dict(), metadata)
    if decoder is not None:
        write_tensors(folder / DECODER, decoder, metadata)
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    if notes:
        write_text(folder / README, "\n\n".join(["# How this backbone is called", *notes]) + "\n")


def plain_call_notes(
    model: Any, input_size: tuple[int, int, int], backbone: Backbone | None, pooled: Pooled, stage: int = -1
) -> list[str]:
    """Where timm's plain ``model(x)`` is not what ``freqmask embed`` gives, and what to call instead.

    Many families keep an untrained layer behind the pooling whatever ``num_classes`` is; behind an inner ``stage``
    nothing was trained; a size that the strides do not divide is padded by us and cut off by some families.
    """
    notes = []
    stages = getattr(model, "feature_info", None) or [{"reduction": 1}]
    step, count = max(int(one["reduction"]) for one in stages), len(stages)
    height, width = input_size[1:]
    is_last = stage in (-1, count - 1)
    call = _call_of_features(backbone, pooled) if backbone is not None and is_last else PLAIN_CALL
    if call != PLAIN_CALL:
        way = f"The features are `{call}`, as `freqmask embed` and ONNX give them."
        none = "No call of timm's gives the features; `freqmask embed` and ONNX do."
        notes.append(
            f"`{PLAIN_CALL}` has an end of its own in this family, which freqmask neither trains nor reads. "
            f"{way if call else none}"
        )
    if not is_last:
        call = f"model.forward_intermediates(x, indices=[{stage}], norm=True, intermediates_only=True)[0]"
        notes.append(
            f"It was trained at stage {stage % count} of 0 to {count - 1}, and `model(x)` answers through later ones, "
            f"which were not. The features are `{call}.mean((2, 3))`, as `freqmask embed` and ONNX give them."
        )
    below, right = -height % step, -width % step
    if below or right:
        notes.append(
            f"Images of {height}x{width} pixels are padded to multiples of {step} before the model: "
            f"`x = torch.nn.functional.pad(x, (0, {right}, 0, {below}), mode='replicate')`. Without it some "
            "families cut the edge off."
        )
    return notes


def _call_of_features(backbone: Backbone, pooled: Pooled) -> str:
    """Which of timm's calls gives the features, found out with an image; empty where none does."""
    model: Any = backbone.timm_model
    size, generator = (1, backbone.channels, *backbone.image_size), torch.Generator().manual_seed(0)
    image = torch.rand(size, generator=generator).to(next(model.parameters()))
    padded = backbone.padded(image)
    prefix, last = getattr(model, "num_prefix_tokens", 0), len(model.feature_info) - 1
    inner = f"model.forward_intermediates(x, indices=[{last}], norm=True, intermediates_only=True)[0]"
    of_tokens = "[:, 0]" if pooled == "class_token" else f"[:, {prefix}:].mean(1)"
    token = slice(0, 1) if pooled == "class_token" else slice(prefix, None)
    asked: Any = {"indices": [last], "norm": True, "intermediates_only": True}
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        PLAIN_CALL: model,
        f"model.forward_features(x){of_tokens}": lambda x: model.forward_features(x)[:, token].mean(1),
        "model.forward_features(x).mean((2, 3))": lambda x: model.forward_features(x).mean((2, 3)),
        "model.forward_features(x).mean((1, 2))": lambda x: model.forward_features(x).mean((1, 2)),
        f"{inner}.mean((2, 3))": lambda x: model.forward_intermediates(x, **asked)[0].mean((2, 3)),
    }
    with eval_no_grad(backbone):
        features = backbone(image)
        wanted = features.class_token if pooled == "class_token" else features.pooled
        for call, answer_of in calls.items():
            try:
                answer = answer_of(padded)
            except (AssertionError, IndexError, RuntimeError, TypeError):  # not of this family
                continue
            if answer.shape == wanted.shape and torch.allclose(answer, wanted, rtol=1e-3, atol=1e-3):
                return call
    return ""


def trained_feature(method: nn.Module, backbone: Any) -> Pooled:
    """What of a backbone its method trains: FOLK's class token, where it distils that, else the mean of the map."""
    distils_token = getattr(method, "distil", "pooled") in ("auto", "class_token")
    return "class_token" if distils_token and backbone.has_class_token else "mean"


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file, replaced atomically."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = save(plain, metadata=dict(metadata or {}))  # save_file's files are the user's alone
    replace_atomically(path, lambda temporary: temporary.write_bytes(content))


def read_tensors(path: Path, option: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file; where it cannot be read a UserError that begins with ``option``."""
    with readable(path, option):
        return dict(load_file(path))


def differences(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What is too many, missing or of another shape, a phrase each."""
    shapes, needed = ({name: tuple(one.shape) for name, one in part.items()} for part in (state, expected))
    return [
        *(f"{name} {shapes[name]} is too many" for name in sorted(shapes.keys() - needed.keys())),
        *(f"{name} {needed[name]} is missing" for name in sorted(needed.keys() - shapes.keys())),
        *(
            f"{name} is {shapes[name]} instead of {needed[name]}"
            for name in sorted(needed.keys() & shapes.keys())
            if shapes[name] != needed[name]
        ),
    ]


def load_fitting(module: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Put weights into a module, in place.

    Raises:
        UserError: they do not fit; the sentence begins with ``what`` and names three of the differences.
    """
    if problems := differences(weights, module.state_dict()):
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{what}: {', '.join(problems[:3])}{more}")
    module.load_state_dict(dict(weights))


def _pin_pooling(config: dict[str, Any], model: nn.Module, pooled: Pooled | None) -> dict[str, str]:
    """Write into the config how features are pooled, so that no default of timm's changes them."""
    # timm moves the final normalization behind the pooling where a ViT averages its tokens, which would leave the
    # trained one out; ``fc_norm=False`` keeps it where it was trained
    arguments = config.setdefault("model_args", {})
    arguments.pop("num_classes", None)  # it stands at the top; transformers gives it a second time and fails
    taken = inspect.signature(type(model).__init__).parameters
    norm = next((name for name in ("fc_norm", "use_fc_norm") if name in taken), None)
    is_trained = isinstance(getattr(model, "fc_norm", None), nn.Identity)
    if pooled is None or norm is None or "global_pool" not in taken or not is_trained:
        return {}
    if pooled == "class_token" and getattr(model, "cls_token", None) is None:
        pooled = "mean"
    arguments["global_pool"] = config["global_pool"] = "avg" if pooled == "mean" else "token"
    arguments[norm] = False
    return {"pooled": pooled}


_LARGEST_PICKLE = 256 * 2**20  # bytes; that of a ViT-B with its optimizer has a tenth of a megabyte
_MOST_ENTRIES = 1_000_000


class Inert:
    """What stands where a file names a class or a function that is not ours: it swallows everything."""

    origin = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """Whatever the file wants it made from."""
        return super().__new__(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        """Calling it does nothing."""
        return self

    def append(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is kept."""

    __init__ = __setstate__ = __setitem__ = extend = add = append


@dataclass
class TorchFile:
    """What a file holds."""

    content: Any  # plain containers, numbers, texts and tensors; foreign objects as :class:`Inert`
    # ``module.name`` of every class and function that the file names and we did not touch
    foreign: list[str] = field(default_factory=list)


def read_torch_file(path: str | Path) -> TorchFile:
    """Read a file of ``torch.save``, of today's zip form or that of before PyTorch 1.6.

    Tensors of the zip form are mapped: the optimizer's state beside the weights costs nothing.

    Args:
        path: the file; it must not change while its tensors are in use.

    Raises:
        UserError: it is cut short, no such file, holds a program (TorchScript), or declares more than it has.
    """
    path = Path(path)
    check_file(path)
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        if is_zip:
            sizes = _check_zip(path)
        elif tarfile.is_tarfile(path):
            raise UserError("it is of the tar form of PyTorch before 0.2, which is not read; save it again")
        else:
            sizes = None
        unpickler: Any = type(
            "Unpickler", (_Unpickler,), {"foreign": {}, "sizes": sizes, "left": path.stat().st_size}
        )

        def load(file: Any, **options: Any) -> Any:  # the older form begins with a note on its machine
            read = unpickler(file, **options).load()
            if isinstance(read, dict) and read.get("little_endian") is False:
                raise UserError("it was written on a big-endian machine; save it again on another")
            return read

        module = SimpleNamespace(Unpickler=unpickler, load=load, __name__="freqmask")
        content = torch.load(
            str(path), map_location="cpu", pickle_module=module, weights_only=False, mmap=is_zip
        )
        return TorchFile(content, list(unpickler.foreign))
    except UserError as error:
        raise UserError(f"file ({path}) was refused: {error}") from error
    except zipfile.BadZipFile as error:
        raise UserError(f"file ({path}) cannot be read, it is cut short or damaged ({error})") from error
    except Exception as error:  # a damaged pickle makes torch raise nearly anything
        reason = "" if isinstance(error, KeyError) else f" ({brief(error, 160)})"  # a code that no pickle has
        raise UserError(f"file ({path}) cannot be read, it is no torch file or cut short{reason}") from error


def tensors_in(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, copied out of the file.

    Raises:
        UserError: something among them is no tensor, is larger than what is stored of it, or holds NaN.
    """
    read: dict[str, Tensor] = {}
    for name, value in weights.items():
        if isinstance(value, Inert):
            raise UserError(f"the weights hold a foreign object ({name}: {value.origin}), which is refused")
        if not isinstance(value, Tensor):
            raise UserError(f"the weights hold a {type(value).__name__} ({name}) where a tensor belongs")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"the file is damaged: {name} in it is larger than what is stored of it")
        read[str(name)] = value.detach().clone()
    check_weights(read, "the weights")
    return read


def check_weights(weights: Mapping[str, Tensor], owner: str) -> None:
    """Raises a UserError, which begins with ``owner``, where weights hold NaN or infinity."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(
                f"{owner}: {name} holds NaN or infinity, so that every feature would; take an earlier checkpoint"
            )


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler (its memo is a dictionary: no index in a file makes it allocate) without names."""

    foreign: ClassVar[dict[str, type[Inert]]]
    sizes: ClassVar[dict[str, int] | None]  # bytes of every storage in a zip
    left: ClassVar[int]  # bytes that storages of the older form may still declare
    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        dtype = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        if isinstance(dtype, torch.dtype):
            return dtype
        full = f"{module}.{name}"
        return self.foreign.setdefault(full, type("Inert", (Inert,), {"origin": full}))

    # torch.load sets its own reader of storages on the instance; what it is asked for is checked first
    @property
    def persistent_load(self) -> Callable[[Any], Any]:
        return self._load_storage

    @persistent_load.setter
    def persistent_load(self, load: Callable[[Any], Any]) -> None:
        self._load = load

    def _load_storage(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage":
            dtype = getattr(pid[1], "dtype", None)
            if isinstance(dtype, torch.dtype):
                self._check_size(str(pid[2]), pid[4], dtype)
                return self._load(pid)
        if isinstance(pid, tuple) and len(pid) > 1 and isinstance(pid[1], type) and issubclass(pid[1], Inert):
            return pid[1]  # the old form wraps a module's class in one, to keep its source code with it
        return self.foreign.setdefault("a persistent object", Inert)()

    def _check_size(self, key: str, count: Any, dtype: torch.dtype) -> None:
        size = count * dtype.itemsize if isinstance(count, int) and count >= 0 else -1
        if self.sizes is not None:
            if self.sizes.get(key) != size:
                raise pickle.UnpicklingError(
                    f"the numbers of storage {key[:20]} are missing or of another size"
                )
            return
        seen = self.__dict__.setdefault("_seen", set())
        if key not in seen:
            seen.add(key)
            type(self).left -= size
        if size < 0 or type(self).left < 0:
            raise pickle.UnpicklingError(f"storage {key[:20]} declares more than the file has")

    def refuse_allocation(self) -> None:
        # of all opcodes this one alone takes memory by a number in the file, before reading anything
        raise pickle.UnpicklingError("it holds a byte array, which no checkpoint does")

    def get_extension(self, code: int) -> None:
        # extension codes name things in this process's registry
        raise pickle.UnpicklingError("it uses extension codes, which no checkpoint does")

    dispatch[pickle.BYTEARRAY8[0]] = refuse_allocation


_ALLOWED: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): lambda text, *_: text.encode("latin1") if isinstance(text, str) else b"",
}


def _check_zip(path: Path) -> dict[str, int]:
    """Bytes of every storage, after the checks that torch's reader does not make."""
    # A zip bomb declares more than the file has: by compressing, or by entries that share their bytes. Names are
    # compared without case, as torch's reader finds them.
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if len(entries) > _MOST_ENTRIES:
        raise UserError(f"it declares {len(entries):,} entries, which no checkpoint has")
    names = [entry.filename.lower().replace("\\", "/") for entry in entries]
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise UserError(
            "it is a TorchScript program (torch.jit.save); save the state dict of the model, "
            "torch.save(model.state_dict(), FILE), instead"
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UserError(
            "its entries are compressed, which torch.save never does; it could unpack to any size"
        )
    declared, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if declared > size:
        raise UserError(f"it declares {declared:,} bytes but has {size:,}")
    for entry, name in zip(entries, names, strict=True):
        if ".." in name.split("/") or name.startswith("/"):
            raise UserError(f"one of its entries is named {entry.filename[:60]!r}, outside of the file")
        if name.endswith(".pkl") and entry.file_size > _LARGEST_PICKLE:
            raise UserError(f"its description alone has {entry.file_size:,} bytes, which no checkpoint has")
    if len(set(names)) < len(names):
        raise UserError("two of its entries have one name")
    if sum(name.endswith("data.pkl") and name.count("/") == 1 for name in names) != 1:
        raise UserError("it is a zip file, but none of torch.save")
    return {
        name.split("/data/", 1)[1]: entry.file_size
        for entry, name in zip(entries, names, strict=True)
        if "/data/" in name
    }


def hash_weights(module: nn.Module) -> str:
    """32 hexadecimal digits over the names, shapes, types and values of all parameters and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
