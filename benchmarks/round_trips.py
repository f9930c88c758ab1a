"""Figures 1 to 3: what is left of a backbone after an export, to the last bit.

    python benchmarks/round_trips.py              # figure 1: every format and backbone
    python benchmarks/round_trips.py --keys       # figure 2: the names and shapes of a ViT-B/16's mfm-checkpoint
    python benchmarks/round_trips.py --foreign    # figure 3: a checkpoint with pickled foreign objects

Claim of figure 1: after a round trip features differ by at most 1e-5 of the largest feature in float32.
Method: a small backbone with random weights (moved away from their initial values) is written in each format,
loaded by the other software on the CPU, and its features of three random images are compared with those of the
module in memory: the largest difference, and the largest feature it is to be seen beside.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor

from freqmask.errors import UserError
from freqmask.heads import ReconstructionHead
from freqmask.interop.exporters import Exported
from freqmask.interop.foreign_weights import convert_file, read_weights
from freqmask.interop.formats import export_model
from freqmask.interop.models import OpenedModel, open_model
from freqmask.interop.weight_files import write_timm_folder

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from reference import mfm_vit_shapes

RESULTS = Path(__file__).parent / "results" / "round_trips.csv"
SIZE = 64
BACKBONES = {
    "vit_small_patch16_224": {"depth": 4},
    "vit_small_patch16_dinov3": {"depth": 4},
    "swin_tiny_patch4_window7_224": {"window_size": 2, "depths": [1, 1, 2, 1]},
    "convnext_atto": {},
    "resnet50": {},
    "efficientnet_b0": {},
}


@torch.no_grad()
def make(name: str, folder: Path, image_size: int = SIZE, **arguments: object) -> OpenedModel:
    """A backbone with a decoder in an exported folder, opened again."""
    from freqmask.backbones import Backbone

    torch.manual_seed(0)
    backbone = Backbone(name, image_size, model_args=arguments).eval()
    for parameter in backbone.parameters():
        scale = 0.05 if parameter.dim() == 1 else 0.02 * float(parameter.std())  # biases begin at zero
        parameter.add_(scale * torch.randn_like(parameter))
    head = ReconstructionHead(backbone.feature_dim, 3, backbone.stride)
    write_timm_folder(
        backbone.timm_model,
        folder,
        input_size=(3, image_size, image_size),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        metadata={"method": "mfm"},
        pooled="mean",
        decoder=head.state_dict(),
    )
    return open_model(folder)


@torch.no_grad()
def trips(
    name: str, folder: Path
) -> list[tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """For every format what it loads to, and what that is to equal, both from images in [0, 1]."""
    opened = make(name, folder / "first", **BACKBONES[name])
    module = Exported(opened).eval()
    found = []
    export_model(opened, folder / "timm")
    model = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True).eval()
    found.append(("timm", lambda x: model(opened.normalise(x)), lambda x: opened.module(opened.normalise(x))))
    again = Exported(open_model(folder / "timm")).eval()
    found.append(("freqmask", lambda x: again(x)[1], lambda x: module(x)[1]))
    from transformers import AutoModel

    hugging = AutoModel.from_pretrained(folder / "timm").eval()
    found.append(
        (
            "transformers",
            lambda x: hugging(opened.normalise(x)).pooler_output.flatten(1),
            lambda x: opened.module(opened.normalise(x)),
        )
    )
    import onnxruntime

    export_model(opened, folder / "x.onnx", "onnx")
    session = onnxruntime.InferenceSession(str(folder / "x.onnx"))
    found.append(
        (
            "onnx",
            lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[1]),
            lambda x: module(x)[1],
        )
    )
    export_model(opened, folder / "x.pt2", "torch-export")
    program = torch.export.load(folder / "x.pt2").module()
    found.append(("torch-export", lambda x: program(x)[1], lambda x: module(x)[1]))
    try:
        export_model(opened, folder / "x.pth", "mfm-checkpoint")
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return found
    back = convert_file(
        folder / "x.pth", model_args={"num_heads": 6} if name.startswith("vit") else None
    ).model
    found.append(
        (
            "mfm-checkpoint",
            lambda x: back.forward_features(opened.normalise(x)),
            lambda x: opened.module.forward_features(opened.normalise(x)),
        )
    )
    return found


def figure_1() -> None:
    images = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    rows = [["backbone", "format", "largest difference", "largest feature", "their ratio"]]
    for name in BACKBONES:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            for format, got, expected in trips(name, Path(folder)):
                want = expected(images)
                difference, largest = float((got(images) - want).abs().max()), float(want.abs().max())
                rows.append(
                    [name, format, f"{difference:.1e}", f"{largest:.2f}", f"{difference / largest:.1e}"]
                )
                print("  ".join(f"{cell:>28}" for cell in rows[-1]), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        csv.writer(file).writerows([*rows, [f"torch {torch.__version__}", f"timm {timm.__version__}"]])


def figure_2() -> None:
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        folder = Path(scratch)
        opened = make("vit_base_patch16_224", folder / "vit", 224)
        export_model(opened, folder / "x.pth", "mfm-checkpoint")
        content = torch.load(folder / "x.pth", weights_only=True)
        found = {name: tuple(tensor.shape) for name, tensor in content["model"].items()}
        expected = {f"encoder.{n}": shape for n, shape in mfm_vit_shapes(768, 12, 3072, 16, 3, 197).items()}
        expected |= {"decoder.0.weight": (768, 768, 1, 1), "decoder.0.bias": (768,)}
        print(f"entries of the file: {sorted(content)}; encoder tensors: {sum(n[0] == 'e' for n in found)}")
        print(
            f"names too many: {sorted(set(found) - set(expected))}; missing: {sorted(set(expected) - set(found))}"
        )
        print(f"other shapes: {[name for name in expected if found.get(name) != expected[name]]}")
        back = convert_file(folder / "x.pth").model
        images = opened.normalise(torch.rand(1, 3, 224, 224))
        one = opened.module.forward_intermediates(images, intermediates_only=True, return_prefix_tokens=True)
        two = back.forward_intermediates(images, intermediates_only=True, return_prefix_tokens=True)
        for number, (before, after) in enumerate(zip(one, two, strict=True), start=1):
            worst = max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))
            print(f"converted back, layer {number:2}: largest difference {worst:.1e}")
        state = opened.module.state_dict()
        changed = [name for name, tensor in back.state_dict().items() if not torch.equal(tensor, state[name])]
        print(
            f"tensors that changed: {len(changed)}, all of them biases of keys: "
            f"{all(name.endswith('attn.qkv.bias') for name in changed)}"
        )


class Bomb:
    """Makes a folder when a file is unpickled as it asks."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.path,)


def figure_3() -> None:
    config = types.ModuleType("yacs.config")
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    config.CfgNode = node
    for new in (True, False):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            sys.modules |= {"yacs": types.ModuleType("yacs"), "yacs.config": config}
            content = {
                "model": {"w": torch.ones(2)},
                "config": node(A=node(B=1)),
                "bomb": Bomb(folder / "ran"),
            }
            torch.save(content, folder / "beside.pth", _use_new_zipfile_serialization=new)
            inside = {"model": {"w": Bomb(folder / "ran")}}
            torch.save(inside, folder / "inside.pth", _use_new_zipfile_serialization=new)
            del sys.modules["yacs"], sys.modules["yacs.config"]
            print(f"-- {'zip' if new else 'legacy'} file, written with yacs, read without")
            print("beside the weights:", *read_weights(folder / "beside.pth").notes, sep="\n   ")
            try:
                read_weights(folder / "inside.pth")
            except UserError as error:
                print(f"inside the weights:\n   {str(error).replace(scratch, '...')}")
            print(
                f"   yacs imported: {'yacs' in sys.modules}; the file's code ran: {(folder / 'ran').exists()}"
            )
            torch.load(folder / "inside.pth", weights_only=False)
            print(
                f"   the same file through torch.load(weights_only=False): ran: {(folder / 'ran').exists()}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", action="store_true", help="figure 2")
    parser.add_argument("--foreign", action="store_true", help="figure 3")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    figure = figure_2 if arguments.keys else figure_3 if arguments.foreign else figure_1
    figure()


if __name__ == "__main__":
    main()
