"""How the files beside this one were made: by freqmask 0.1.0 (commit 81063ce), once. They are not made again.

``python tests/golden/make.py`` in a checkout of that commit. Paths are relative, so that a copy of the folder can be
worked on anywhere.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from freqmask.cli import main

HERE = Path(__file__).parent
VIT = "{depth: 1, embed_dim: 16, num_heads: 1, mlp_ratio: 2}"
CNN = "{layers: [1, 1, 1, 1], channels: [8, 8, 8, 8], output_stride: 16}"
# everything is named that `auto` could choose, so that a better `auto` changes nothing here
PLAIN = (
    "--image_size 32 --channels 3 --value_range dtype --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 --batch_size 8 "
    "--steps 20 --lr 1e-3 --min_lr 1e-5 --warmup_epochs 1 --crop_scale 0.3 1 --seed 3 --workers 0 "
    "--accelerator cpu --devices 1 --precision 32-true --accumulate 1 --log_every_steps 1 --preview_every_steps 0 "
    "--checkpoint_every_steps 10 --keep_checkpoints 1 --probe_every_epochs 100"
)
SMALL_VIT = ["--backbone", "vit_tiny_patch16_224", "--patch_size", "8", "--model_args", VIT]
SMALL_CNN = ["--backbone", "resnet18", "--model_args", CNN]
FOLK = (
    "--outputs 64 --hidden_size 32 --bottleneck_size 16 --colour_jitter 0.4 0.4 0.2 0.1 0.8 "
    "--grey 0.2 --blur 1.0 0.1 --solarise 0 0.2 --freeze_last_layer_epochs 1"
)
FIXED = ["--radius", "4", "--low_pass_share", "0.5"]
LOADER, DEVICE = "--images_from loader", "--images_from device"
TRAININGS: dict[str, list[str]] = {
    "mfm": [*SMALL_VIT, "--method", "mfm", *FIXED, *LOADER.split()],
    "mfm-com": [*SMALL_VIT, "--method", "mfm", "--filter", "com", *DEVICE.split()],
    "mfm-cnn": [*SMALL_CNN, "--method", "mfm", *FIXED, *LOADER.split()],
    "folk": [*SMALL_VIT, "--method", "folk", *FOLK.split(), *LOADER.split()],
    "sr": [*SMALL_CNN, "--method", "sr", "--factor", "4", *LOADER.split()],
    "deblur": [
        *SMALL_VIT,
        "--method",
        "deblur",
        "--sigma",
        "1.5",
        "--kernel_sizes",
        "3",
        "5",
        *DEVICE.split(),
    ],
    "denoise": [*SMALL_VIT, "--method", "denoise", "--sigma", "0.3", *LOADER.split()],
}
KEPT = ("mfm", "folk")  # whole run folders
TUNING = (
    "--seeds 0 --batch_size 8 --steps 12 --image_size 32 --recipe vit --lr 2e-3 --min_lr 1e-6 --warmup_epochs 1 "
    "--weight_decay 0.05 --layer_decay 0.8 --drop_path 0.1 --mixup 0.8 --cutmix 1 --smoothing 0.1 --augment none "
    "--erasing 0.25 --crop_scale 0.3 1 --train_size 32 --workers 0 --accelerator cpu --devices 1 --precision 32-true "
    "--accumulate 1 --log_every_steps 1 --keep_checkpoints 1 --crop whole"
)
SEGMENTING = (
    "--seeds 0 --batch_size 4 --steps 6 --crop 32 --scale 0.5 2 --lr 1e-4 --warmup_steps 2 --weight_decay 0.05 "
    "--layer_decay 0.9 --drop_path 0.1 --decoder_channels 16 --stride 20 --overlays 0 --workers 0 --accelerator cpu "
    "--devices 1 --precision 32-true --accumulate 1 --keep_checkpoints 1"
)
FROZEN = "--batch_size 8 --workers 0 --accelerator cpu --devices 1 --precision 32 --cache false --crop whole"
PROTOCOLS: dict[str, str] = {
    "knn": f"trained/mfm trained/folk pixels --k 1 5 --seeds 0 1 {FROZEN}",
    "linear": f"trained/mfm pixels --rates 0.1 1 --epochs 20 --seeds 0 {FROZEN}",
    "fewshot": f"trained/mfm pixels --seeds 0 {FROZEN}",
    "bands": f"trained/mfm --head knn --radii 4 8 --seeds 0 {FROZEN}",
    "robustness": (
        "tuned/CLASSIFIER --head own --corruptions gaussian_noise contrast --severities 1 3 --attacks fgsm --seeds 0 "
        f"{FROZEN}"
    ),
}


def smooth(generator: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """A smooth random image."""
    small = torch.from_numpy(generator.random((1, 3, cells, cells), dtype=np.float32))
    large = torch.nn.functional.interpolate(small, size=(height, width), mode="bicubic")[0]
    return (255 * large.clamp(0, 1)).byte().permute(1, 2, 0).numpy()


def make_images() -> None:
    """Photographs, images with classes, images with masks."""
    generator = np.random.default_rng(0)
    Path("photos").mkdir()
    for number in range(24):
        size = (36 + number % 3 * 4, 44 - number % 5)
        Image.fromarray(smooth(generator, *size, 3 + number % 4)).save(
            f"photos/{number:02d}.png", optimize=True
        )
    parts: dict[str, Any] = {}
    for part, each in (("train", 8), ("test", 5)):
        classes = np.repeat(np.arange(3), each)
        noisy = [smooth(generator, 32, 32, int(generator.integers(2, 5)) + 3 * c) for c in classes]
        parts |= {f"{part}_images": np.stack(noisy), f"{part}_labels": classes}
    np.savez_compressed("labelled.npz", **parts)
    for part, count in (("train", 6), ("test", 3)):
        for kind in ("images", "masks"):
            Path("scenes", kind, part).mkdir(parents=True)
        for number in range(count):
            image = smooth(generator, 40, 48, 4)
            mask = (image.mean(-1) > 127).astype(np.uint8) + (image[..., 0] > 180)
            Image.fromarray(image).save(f"scenes/images/{part}/{number}.png", optimize=True)
            Image.fromarray(mask.astype(np.uint8)).save(f"scenes/masks/{part}/{number}.png", optimize=True)


def call(command: str, *more: str) -> None:
    """A command as it is typed."""
    main([*command.split(), *more])


def column(path: Path, name: str) -> list[float]:
    """The numbers of a column, where there are any."""
    with path.open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def keys(path: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors of a training state or of a finished network."""
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    return {name: list(tensor.shape) for name, tensor in state.items()}


def strip(run: Path) -> None:
    """Leave what is read again."""
    for path in run.rglob("*"):
        if path.suffix in (".png", ".html") or path.suffix == ".lock":
            path.unlink()
    for folder in sorted(run.rglob("*"), reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def pretrain() -> dict[str, Any]:
    """Losses and checkpoint keys of a tiny run of every method; some run folders stay."""
    frozen: dict[str, Any] = {}
    for name, options in TRAININGS.items():
        run = Path("trained", name)
        main(["pretrain", "shards", "--out", str(run), *PLAIN.split(), *options])
        frozen[name] = {
            "arguments": ["shards", *PLAIN.split(), *options],
            "loss": column(run / "metrics.csv", "loss"),
            "keys": keys(run / "checkpoints" / "last.ckpt"),
        }
        if name in KEPT:
            strip(run)
        elif name != "mfm-cnn":
            shutil.rmtree(run)
    return frozen


def stop_half_way() -> None:
    """A run that was interrupted at its twelfth step."""
    from freqmask.training.monitor import Monitor

    whole = Monitor.on_train_batch_end

    def stopping(self: Any, trainer: Any, *rest: Any) -> None:
        whole(self, trainer, *rest)
        if trainer.global_step == 12:
            raise KeyboardInterrupt

    Monitor.on_train_batch_end = stopping  # type: ignore[method-assign]
    try:
        main(["pretrain", "shards", "--out", "trained/unfinished", *PLAIN.split(), *TRAININGS["mfm"]])
    except SystemExit as stopped:
        print("stopped with", stopped.code)
    finally:
        Monitor.on_train_batch_end = whole  # type: ignore[method-assign]
    strip(Path("trained/unfinished"))


def evaluate(frozen: dict[str, Any]) -> None:
    """Trainings with labels, and the rows of every protocol."""
    data = ["--data", "labelled.npz"]
    call(f"evaluate finetune trained/mfm --out tuned {TUNING}", *data)
    (classifier,) = {path.parent for path in Path("tuned").rglob("metrics.csv")}
    frozen["finetune"] = {
        "arguments": ["trained/mfm", *TUNING.split(), *data],
        "loss": column(classifier / "metrics.csv", "loss"),
        "keys": keys(classifier / "checkpoints" / "last.ckpt"),
    }
    scenes = ["--data", "scenes"]
    call(f"evaluate segment trained/mfm --out segmented {SEGMENTING}", *scenes)
    (network,) = {path.parent for path in Path("segmented").rglob("metrics.csv")}
    frozen["segment"] = {
        "arguments": ["trained/mfm", *SEGMENTING.split(), *scenes],
        "loss": column(network / "metrics.csv", "loss"),
        "keys": keys(network / "network.safetensors"),
    }
    Path("results").mkdir()
    for name, options in PROTOCOLS.items():
        words = options.replace("tuned/CLASSIFIER", str(classifier)).split()
        main(["evaluate", name, *words, *data, "--out", f"results/{name}"])
        shutil.copy(f"results/{name}/results.csv", f"results/{name}.csv")
        frozen[name] = {"arguments": [*words, *data]}
        shutil.rmtree(f"results/{name}")
    for name, folder in (("finetune", "tuned"), ("segment", "segmented")):
        shutil.copy(f"{folder}/results.csv", f"results/{name}.csv")
    shutil.rmtree(classifier / "checkpoints")
    for folder in ("tuned", "segmented", "trained"):
        strip(Path(folder))


def hand_on() -> None:
    """What `export` and `embed` write."""
    call("export trained/mfm-cnn --out exported")
    # MFM's readers take width / 64 for the heads
    wide = ["vit_tiny_patch16_224", "--patch_size", "4", "--model_args"]
    call(
        f"pretrain shards --out wide {PLAIN} {LOADER} --radius 4 --backbone",
        *wide,
        "{depth: 1, embed_dim: 64, num_heads: 1, mlp_ratio: 1}",
    )
    call("export wide --format mfm-checkpoint --out mfm.pth")
    shutil.rmtree("wide")
    call(
        "embed trained/mfm shards --out features.npy --batch_size 8 --workers 0 --accelerator cpu --precision 32"
    )
    shutil.rmtree("trained/mfm-cnn")


if __name__ == "__main__":
    os.chdir(HERE)
    torch.set_num_threads(1)
    make_images()
    call("prepare photos --out shards --resize none --workers 1")
    shutil.rmtree("photos")
    frozen = pretrain()
    stop_half_way()
    evaluate(frozen)
    hand_on()
    frozen["made_with"] = {
        "freqmask": "0.1.0 at 81063ce",
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    Path("frozen.json").write_text(
        "{\n"
        + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in frozen.items())
        + "\n}\n"
    )
