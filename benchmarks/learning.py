"""What methods learn in equal time: ours and rivals, one harness, one table, accuracy against minutes.

    python benchmarks/learning.py --data PATH/cifar10 --methods mfm mae dino --seeds 0 1 2 --out learning
    python benchmarks/learning.py --data PATH/cifar10 --backbones cnn --methods teacher --teacher timm:resnet18
    python benchmarks/learning.py --data PATH/cifar10 PATH/tiny-imagenet32 --device cuda --jobs 8 --out learning

The time is that of one CPU core, or with ``--device cuda`` of one GPU: each method's images/s are measured there first,
alone, then it gets as many steps as fit ``--minutes``. ``--speeds`` of a core make a GPU's trainings as long as the
core's would be. Same images, crops, optimizer and batch for all; methods of two views get color changes (DINO's). A row
a finished training goes to ``learning.csv``; the same command goes on with what is missing, from the last checkpoint of
each training.
``--sweep`` trains every method with its own small grid and judges on held-out training images, never on test images.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import hashlib
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.rivals import RIVALS
from freqmask.backbones import Backbone, recalibrate_batch_norm
from freqmask.data.augment import NO_CHANGE, PhotometricAugmentation, PhotometricSettings
from freqmask.evaluation.corruptions import COMMON, Corruption, Strengths
from freqmask.evaluation.knn import predict
from freqmask.evaluation.linear import choose_and_fit
from freqmask.methods import METHODS
from freqmask.pretraining.resolve import open_teacher
from freqmask.spectrum import Normalization
from freqmask.training.auto import choose_precision
from freqmask.training.optim import parameter_groups

BACKBONES: dict[str, dict[str, Any]] = {
    "vit": {
        "backbone": "vit_tiny_patch16_224",
        "patch_size": 4,
        "model_args": {"embed_dim": 96, "depth": 4, "num_heads": 3},
    },
    "vit-4x192": {
        "backbone": "vit_tiny_patch16_224",
        "patch_size": 4,
        "model_args": {"embed_dim": 192, "depth": 4, "num_heads": 3},
    },
    "vit-ti": {"backbone": "vit_tiny_patch16_224", "patch_size": 4},
    "cnn": {"backbone": "resnet10t", "model_args": {"output_stride": 8, "channels": [32, 64, 128, 256]}},
    "vit-s": {"backbone": "vit_small_patch16_224", "patch_size": 4},
}
OURS = {"gamma": 1.5, "low_pass_share": 0.3}
LOW = {"gamma": 1.5, "low_pass_share": 1.0, "radius": 5.0}  # of 32 pixels; larger ones were not tried
SMALL_HEAD = {
    "outputs": 1024,
    "hidden_size": 512,
    "teacher_temperature": 0.04,
    "ema_momentum": 0.99,
    "filter": "fixed",
}
BATCH = 128
CORRUPTED = 500  # test images, each under 15 corruptions of three severities
HELD_OUT = 2500  # training images that a sweep is judged on
TWO_VIEWS = PhotometricSettings(blur=0.0, solarise=0.0)  # below 96 pixels blur and solarise leave too little
# Settings found on held-out training images with equal numbers of trials (benchmarks/results/learning_trials.csv).
SETTINGS: dict[str, dict[str, Any]] = {
    "mfm": LOW,
    "mfm-com": {"filter": "com", "gamma": 1.5},
    "folk": {**LOW, **SMALL_HEAD, "ema_momentum": 0.97, "views": "one", "reconstruction_weight": 10.0},
    "words": {"lr": 2e-3},
    "words-unfiltered": {"lr": 2e-3, "filter_share": 0.0},
    "teacher": {"lr": 2e-3},
    "simmim": {"lr": 4e-3, "mask": 0.4},
    "mae": {"lr": 2e-3},
    "spark": {"lr": 3e-3},
    "dino": {"ema": 0.97},
    "lejepa": {"lr": 4e-3, "weight": 0.02},
}
FOR_A_CNN = {
    "mfm": OURS,
    "folk": {**OURS, **SMALL_HEAD},
    "words": {"lr": 3e-3},
    "teacher": {"lr": 3e-3},
    "simmim": {"lr": 3e-3},
    "dino": {"lr": 3e-3},
    "lejepa": {"lr": 3e-3, "weight": 0.02},
}


# ------------------------------------------------------------------------------------------------- data and views


def load(path: str, size: int) -> dict[str, Tensor]:
    """Images (N, 3, size, size) uint8 and labels of ``train`` and ``test``, decoded once."""
    if path == "toy":
        draw = torch.Generator().manual_seed(0)
        labels = torch.arange(640) % 4
        images = torch.randint(0, 120, (640, 3, size, size), generator=draw, dtype=torch.uint8)
        images[:, 0] += (40 * labels).to(torch.uint8)[:, None, None]
        return {
            "train": images[:512],
            "train_labels": labels[:512],
            "test": images[512:],
            "test_labels": labels[512:],
        }
    from PIL import Image

    loaded = {}
    for split in ("train", "test"):
        pictures, labels = (folder if (Path(path) / "train").is_dir() else table)(Path(path), split)
        small = [
            np.asarray(Image.open(one).convert("RGB").resize((size, size), Image.Resampling.LANCZOS))
            for one in pictures
        ]
        loaded[split] = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).contiguous()
        loaded[f"{split}_labels"] = torch.tensor(labels)
    return loaded


def table(path: Path, split: str) -> tuple[list[Any], list[int]]:
    """Image files and labels of ``train.parquet`` or ``test.parquet``."""
    import io

    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(path / f"{split}.parquet").to_pydict()
    return [io.BytesIO(one["bytes"]) for one in rows.get("img") or rows["image"]], rows["label"]


def folder(path: Path, split: str) -> tuple[list[Any], list[int]]:
    """Image files and labels of ``train/CLASS/`` or ``val/CLASS/``, in an order that mixes the classes."""
    files = sorted((path / {"train": "train", "test": "val"}[split]).glob("*/*.jpg"))
    classes = sorted({file.parent.name for file in files})
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    return [files[at] for at in order], [classes.index(files[at].parent.name) for at in order]


def loaded_once(path: str, size: int) -> dict[str, Tensor]:
    """As :func:`load`, kept decoded in the temporary folder for the other processes."""
    key = hashlib.sha1(f"{Path(path).resolve()} {size}".encode()).hexdigest()[:12]
    kept = Path(tempfile.gettempdir()) / f"learning-{key}.pt"
    if not kept.exists():
        torch.save(load(path, size), kept.with_suffix(f".{os.getpid()}"))
        kept.with_suffix(f".{os.getpid()}").rename(kept)
    return torch.load(kept, weights_only=True, mmap=True)


def crop(images: Tensor, scale: tuple[float, float]) -> Tensor:
    """Random windows of a share of the area, brought back to the images' size, mirrored half of the time.

    Windows are enlarged here, never reduced, so no antialiasing is needed; the same code on every device.
    """
    count, device = len(images), images.device
    area = torch.empty(count, device=device).uniform_(*scale)
    aspect = torch.exp(torch.empty(count, device=device).uniform_(math.log(3 / 4), math.log(4 / 3)))
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    left = (2 * torch.rand(count, device=device) - 1) * (1 - width)
    top = (2 * torch.rand(count, device=device) - 1) * (1 - height)
    mirrored = torch.where(torch.rand(count, device=device) < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(left)
    window = torch.stack([width * mirrored, zero, left, zero, height, top], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(window, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, "bicubic", "reflection", align_corners=False).clamp(0, 1)


# ------------------------------------------------------------------------------------------------- one training


def build(job: dict[str, Any]) -> nn.Module:
    """The method of a job, freshly initialised from its seed."""
    torch.manual_seed(1000 + job["seed"])
    name, options = job["method"], dict(job["options"])
    for own in ("lr", "crop", "weight_decay"):
        options.pop(own, None)
    name = name.partition("-")[0]  # mfm-com and words-unfiltered are mfm and words with options
    size = job["size"]
    if name == "teacher":
        name = "distill"
        options["teacher"] = open_teacher({**job, **options, "image_size": size, "channels": 3})
    kind = RIVALS[name] if name in RIVALS else METHODS[name]
    return kind(**network(job["backbone"], size), image_size=size, **options)


def network(name: str, size: int) -> dict[str, Any]:
    """A backbone's arguments; its patches grow with the images, so that there are 8 x 8 at every size."""
    arguments = dict(BACKBONES[name])
    if "patch_size" in arguments:
        arguments["patch_size"] = size // 8
    return arguments


class Step:
    """A training step whose inputs lie in fixed places, so that CUDA can record it once and replay it."""

    def __init__(self, method: nn.Module, images: Tensor, job: dict[str, Any], steps: int) -> None:
        device = images.device
        self.method, self.images, self.steps = method, images, steps
        options = job["options"]
        self.scale = tuple(options.get("crop", (0.5, 1.0) if method.n_views == 1 else (0.3, 1.0)))
        two = PhotometricAugmentation(TWO_VIEWS if method.n_views == 2 else NO_CHANGE)
        self.colors = two if method.n_views == 2 else None
        self.lr = options.get("lr", 1e-3)
        self.rate = torch.tensor(0.0, device=device)
        on_gpu = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            parameter_groups(method, options.get("weight_decay", 0.05)),
            lr=self.rate if on_gpu else 0.0,
            betas=(0.9, 0.95),
            capturable=on_gpu,
        )
        self.places = torch.zeros(BATCH, dtype=torch.int64, device=device)
        self.keys = torch.zeros(BATCH, dtype=torch.int64, device=device)
        self.graph: Any = None
        self.collected: Any = None
        self.eager = job.get("eager", False)
        self.loss = torch.zeros((), device=device)

    def views(self) -> list[Tensor]:
        batch = self.images[self.places].float() / 255
        made = [crop(batch, self.scale) for _ in range(self.method.n_views)]
        if self.colors is not None:
            made = [self.colors(view, self.keys + 7919 * (number + 1)) for number, view in enumerate(made)]
        return made

    def work(self, step: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        half = _bf16(self.images.device)
        # The backward pass of the CPU's flash attention takes half of a step of so few tokens in bf16.
        attention = (
            [SDPBackend.MATH]
            if half and self.images.device.type == "cpu"
            else [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        )
        with sdpa_kernel(attention):
            with torch.autocast(self.images.device.type, torch.bfloat16, enabled=half):
                loss = self.method(self.views(), self.keys)["loss"]
            loss.backward()
        if step >= 0:
            self.method.before_optimizer_step(step, self.steps)
        torch.nn.utils.clip_grad_norm_(self.method.parameters(), 3.0, foreach=True)
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def __call__(self, step: int, places: Tensor) -> None:
        warmup = max(1, self.steps // 20)
        rate = self.lr * min((step + 1) / warmup, 1) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        self.rate.fill_(rate)
        if self.images.device.type != "cuda":
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        self.places.copy_(places)
        self.keys.random_(0, 2**62)
        eager = max(11, math.ceil(0.02 * self.steps))
        if self.graph is not None:
            self.graph.replay()
            self._collect()
        elif self.images.device.type == "cuda" and step >= eager and not self.eager:
            self._record()
            self.graph.replay()
        else:
            self.work(step)
        self.method.after_step(step, self.steps)

    def _record(self) -> None:
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.work(-1)
        self.collected = getattr(getattr(self.method, "distillation", None), "collected", None)

    def _collect(self) -> None:
        """What FOLK collects for its center is noted in Python, which a replay passes over."""
        if self.collected is not None:
            self.method.distillation.collected = self.collected


def _bf16(device: torch.device) -> bool:
    return device.type == "cuda" or choose_precision("cpu").value == "bf16-mixed"


def train(job: dict[str, Any], images: Tensor, steps: int, points: list[int], folder: Path) -> Any:
    """Train, yielding the method at each of ``points`` (steps made); resumes from the job's last checkpoint."""
    device = images.device
    method = build(job).to(device).train()
    torch.manual_seed(job["seed"])
    order = torch.Generator().manual_seed(job["seed"])
    step_of = Step(method, images, job, steps)
    saved = folder / f"{job['id']}.pt"
    first = 0
    if saved.exists():
        state = torch.load(saved, map_location=device, weights_only=True)
        method.load_state_dict(state["method"])
        step_of.optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    per_epoch = len(images) // BATCH
    stream = torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else None
    if stream is not None:
        stream.__enter__()
    last_saved = time.monotonic()
    for step in range(steps):
        if step % per_epoch == 0:
            permutation = torch.randperm(len(images), generator=order)
        if step < first:
            continue
        at = step % per_epoch * BATCH
        step_of(step, permutation[at : at + BATCH].to(device))
        if step + 1 in points:
            if not torch.isfinite(step_of.loss):
                raise FloatingPointError(f"loss {float(step_of.loss)} at step {step}")
            yield step + 1, method, float(step_of.loss)
        if device.type == "cpu" and time.monotonic() - last_saved > 120:
            state = {
                "method": method.state_dict(),
                "optimizer": step_of.optimizer.state_dict(),
                "step": step + 1,
            }
            torch.save(state, saved.with_suffix(".tmp"))
            saved.with_suffix(".tmp").rename(saved)
            last_saved = time.monotonic()
    if stream is not None:
        stream.__exit__(None, None, None)
        torch.cuda.synchronize()
    saved.unlink(missing_ok=True)


def images_per_second(job: dict[str, Any], images: Tensor, seconds: float = 3.0) -> float:
    """Of a whole training step, alone: views, method, backward, optimizer. The fastest of the steps."""
    method = build(job).to(images.device).train()
    step_of = Step(method, images[:1024], job, 1000)
    places = torch.arange(BATCH, device=images.device)
    on_gpu = images.device.type == "cuda"
    least = 24 if on_gpu else 4  # a GPU's first steps are not yet recorded
    best, begun, made = math.inf, time.monotonic(), 0
    with torch.cuda.stream(torch.cuda.Stream()) if on_gpu else contextlib.nullcontext():
        while made < least or time.monotonic() - begun < seconds:
            start = time.perf_counter()
            step_of(made + (0 if on_gpu else 20), places)
            if on_gpu:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start) if made else best
            made += 1
    return BATCH / best


# ------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def features(backbone: Backbone, images: Tensor) -> dict[str, Tensor]:
    """Mean of the last map and class token of every image, unaugmented."""
    normalize = Normalization(3).to(images.device)
    backbone.eval()
    found: dict[str, list[Tensor]] = {}
    for part in images.split(1024):
        out = backbone(normalize(part.float() / 255))
        found.setdefault("end/mean", []).append(out.pooled.float())
        if out.class_token is not None:
            found.setdefault("end/token", []).append(out.class_token.float())
    return {name: torch.cat(parts) for name, parts in found.items()}


def whitened(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the training images' principal directions, centred, each of variance 1 (but for the faintest)."""
    mean = train.mean(dim=0)
    variances, directions = torch.linalg.eigh(torch.cov((train - mean).double().T))
    scale = (variances + 1e-3 * variances.mean()).rsqrt()
    basis = (directions * scale).float()
    return (train - mean) @ basis, (test - mean) @ basis


def corrupted(job: dict[str, Any], images: Tensor) -> Tensor:
    """The first test images under each of the 15 common corruptions at severities 1, 3 and 5, kept for later runs."""
    key = hashlib.sha1(f"{job['path']}/{job['sweep']}/{job['size']}".encode()).hexdigest()[:12]
    kept = Path(tempfile.gettempdir()) / f"corrupted-{key}.pt"
    if not kept.exists():
        strengths = Strengths("cifar-10-c", images.shape[-1] / 32)
        parts = [
            Corruption(name, severity, strengths)(image, key)
            for name in COMMON
            for severity in (1, 3, 5)
            for key, image in enumerate(images[:CORRUPTED].cpu())
        ]
        torch.save(torch.stack(parts), kept.with_suffix(f".{os.getpid()}"))
        kept.with_suffix(f".{os.getpid()}").rename(kept)
    return torch.load(kept, weights_only=True).to(images.device)


def effective_rank(values: Tensor) -> float:
    """RankMe's: the exponential of the entropy of the singular values."""
    singular = torch.linalg.svdvals((values[:4096] - values[:4096].mean(0)).double())
    share = singular / singular.sum() + 1e-12
    return float(torch.exp(-(share * share.log()).sum()))


def measured(
    backbone: Backbone, data: dict[str, Tensor], job: dict[str, Any], whole: bool
) -> dict[str, float]:
    """k-NN and linear accuracy in percent; with ``whole`` ten labels a class and fine-tuning on a tenth too."""
    backbone = copy.deepcopy(backbone).requires_grad_(True)
    learnt, labels = data["train"], data["train_labels"]
    tested, truth = data["test"], data["test_labels"]
    classes = int(labels.max()) + 1
    normalize = Normalization(3).to(learnt.device)
    # statistics of training images, for all that follow
    recalibrate_batch_norm(backbone, (normalize(part.float() / 255) for part in learnt[:4096].split(512)))
    bank, queries = features(backbone, learnt), features(backbone, tested)
    scores: dict[str, float] = {"rank": effective_rank(bank["end/mean"])}
    one, other = bank["end/mean"], queries["end/mean"]
    scores["knn"] = _percent(predict(other, one, labels, classes, (20,))[20], truth)
    one, other = whitened(one, other)
    scores["knn_white"] = _percent(predict(other, one, labels, classes, (20,))[20], truth)
    probe = linear(bank, labels, classes, job["seed"])
    scores["linear"] = _percent(probe(queries), truth)
    if whole:
        hard = corrupted(job, tested)
        scores["corrupted"] = _percent(probe(features(backbone, hard)), truth[:CORRUPTED].repeat(45))
        few = [linear(*_few(bank, labels, 10, draw), classes, draw)(queries) for draw in range(3)]
        scores["shots10"] = sum(_percent(found, truth) for found in few) / len(few)
        scores["finetuned10"] = fine_tuned(backbone, data, classes, job["seed"])
    return scores


def linear(bank: dict, labels: Tensor, classes: int, seed: int) -> Callable[[dict], Tensor]:
    """Features -> classes by the package's linear probe, its rate and input chosen on held-out training images."""
    _, sweep = choose_and_fit(bank, labels, classes, seed=seed, weighted=False)["plain"]
    return lambda queries: sweep.predict(queries)[0]


def _few(bank: dict, labels: Tensor, shots: int, draw: int) -> tuple[dict, Tensor]:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(draw)).to(labels.device)
    chosen = torch.cat([order[labels[order] == one][:shots] for one in labels.unique()])
    return {name: values[chosen] for name, values in bank.items()}, labels[chosen]


def fine_tuned(
    backbone: Backbone, data: dict[str, Tensor], classes: int, seed: int, epochs: int = 40
) -> float:
    """Accuracy after training all weights on a tenth of the labels."""
    device = data["train"].device
    draw = torch.Generator().manual_seed(seed)
    tenth = torch.randperm(len(data["train"]), generator=draw)[: len(data["train"]) // 10].to(device)
    images, labels = data["train"][tenth], data["train_labels"][tenth]
    torch.manual_seed(seed)
    head = nn.Sequential(nn.BatchNorm1d(backbone.feature_dim), nn.Linear(backbone.feature_dim, classes)).to(
        device
    )
    normalize = Normalization(3).to(device)
    network = nn.ModuleList([backbone, head]).train()
    optimizer = torch.optim.AdamW(parameter_groups(network, 0.05), lr=1e-3, fused=device.type == "cuda")
    size = min(128, len(images))
    steps = epochs * (len(images) // size)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, step / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        if step % (len(images) // size) == 0:
            order = torch.randperm(len(images), generator=draw).to(device)
        at = step % (len(images) // size) * size
        places = order[at : at + size]
        logits = head(backbone(normalize(crop(images[places].float() / 255, (0.5, 1.0)))).pooled)
        loss = F.cross_entropy(logits.float(), labels[places], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        parts = [
            head(backbone(normalize(part.float() / 255)).pooled).argmax(1)
            for part in data["test"].split(1024)
        ]
    return _percent(torch.cat(parts), data["test_labels"])


def _percent(predicted: Tensor, truth: Tensor) -> float:
    return 100 * float((predicted == truth).float().mean())


# ------------------------------------------------------------------------------------------------- jobs

_LOADED: dict[str, dict[str, Tensor]] = {}
COLUMNS = [
    "id", "data", "backbone", "method", "options", "seed", "sweep", "minutes", "images", "steps", "images_per_second",
    "loss", "knn", "knn_white", "linear", "corrupted", "shots10", "finetuned10", "rank", "device", "seconds",
]  # fmt: skip


def work(job: dict[str, Any]) -> list[dict[str, Any]]:
    """One training with its evaluations, as rows; an error is a row, too."""
    torch.set_num_threads(1)
    begun = time.monotonic()
    device = torch.device(job["device"])
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    key = f"{job['path']}/{job['sweep']}/{job['images']}/{job['size']}"
    if key not in _LOADED:
        data = loaded_once(job["path"], job["size"])
        if job["sweep"]:
            held = min(HELD_OUT, len(data["train"]) // 4)
            data = {
                "test": data["train"][-held:],
                "test_labels": data["train_labels"][-held:],
                "train": data["train"][:-held],
                "train_labels": data["train_labels"][:-held],
            }
        _LOADED[key] = {name: values.to(device) for name, values in data.items()}
    data = _LOADED[key]
    images = data["train"][: job["images"]] if job["images"] else data["train"]
    shared = {
        name: job[name] for name in ("id", "data", "backbone", "method", "seed", "sweep", "device", "images")
    }
    shared |= {"options": json.dumps(job["options"], sort_keys=True)}
    rows = []
    try:
        if job["method"] in ("fresh", "pixels"):
            torch.manual_seed(1000 + job["seed"])
            if job["method"] == "fresh":
                arguments = network(job["backbone"], job["size"])
                fresh = Backbone(arguments.pop("backbone"), image_size=job["size"], **arguments).to(device)
                scores = measured(fresh, data, job, True)
            else:
                scores = pixels(data, job["seed"])
            return [shared | {"minutes": 0, "steps": 0, "seconds": time.monotonic() - begun} | scores]
        steps = job["steps"] or max(20, int(job["minutes"] * 60 * job["images_per_second"] / BATCH))
        points = sorted({max(1, round(steps * share)) for share in job["points"]})
        for made, method, loss in train(job, images, steps, points, Path(job["out"])):
            trained = method.backbones()[method.default_backbone]
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                scores = measured(trained, data, job, made == steps and job["whole"])
            rows.append(shared | scores | {
                "minutes": made * BATCH / job["images_per_second"] / 60, "steps": made, "loss": loss,
                "images_per_second": job["images_per_second"], "seconds": time.monotonic() - begun,
            })  # fmt: skip
    except Exception as error:
        if os.environ.get("LEARNING_RAISE"):
            raise
        print(
            f"FAILED {job['method']} {job['options']}: {type(error).__name__}: {str(error)[:300]}", flush=True
        )
        if device.type == "cuda" and not job.get("eager") and not rows:
            return work(job | {"eager": True})  # a step that CUDA cannot record is carried out as it comes
    return rows


def pixels(data: dict[str, Tensor], seed: int) -> dict[str, float]:
    """Raw pixels as features."""
    bank, queries = ({"end/mean": data[split].flatten(1).float() / 255} for split in ("train", "test"))
    classes = int(data["train_labels"].max()) + 1
    knn = predict(queries["end/mean"], bank["end/mean"], data["train_labels"], classes, (20,))[20]
    one, other = whitened(bank["end/mean"], queries["end/mean"])
    white = predict(other, one, data["train_labels"], classes, (20,))[20]
    return {
        "knn": _percent(knn, data["test_labels"]),
        "knn_white": _percent(white, data["test_labels"]),
        "linear": _percent(linear(bank, data["train_labels"], classes, seed)(queries), data["test_labels"]),
    }


def speed(job: dict[str, Any]) -> tuple[str, float]:
    """Images/s of a job's method on one core."""
    torch.set_num_threads(1)
    try:
        images = torch.randint(0, 255, (1024, 3, job["size"], job["size"]), dtype=torch.uint8)
        images = images.to(job["device"])
        return speed_key(job), images_per_second(job, images)
    except Exception as error:
        if os.environ.get("LEARNING_RAISE"):
            raise
        print(
            f"FAILED speed {job['method']} {job['options']}: {type(error).__name__}: {str(error)[:300]}",
            flush=True,
        )
        return speed_key(job), 0.0


def speed_key(job: dict[str, Any]) -> str:
    """What a method's speed depends on."""
    options = {
        name: value for name, value in job["options"].items() if name not in ("lr", "crop", "weight_decay")
    }
    size = [] if job["size"] == 32 else [job["size"]]
    teacher = [job["teacher"]] if job.get("teacher") else []
    return json.dumps([job["backbone"], job["method"], options, *size, *teacher], sort_keys=True)


def make_jobs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every training that was asked for: a plan file's, or methods by seeds."""
    lines = json.loads(Path(arguments.plan).read_text()) if arguments.plan else [
        {"method": name} for name in arguments.methods
    ]  # fmt: skip
    jobs = []
    for line in lines:
        for path in line.get("data", arguments.data):
            for backbone in line.get("backbones", arguments.backbones):
                for seed in line.get("seeds", arguments.seeds):
                    root = path if path == "toy" else str(Path(arguments.root or "") / path)
                    settings = SETTINGS.get(line["method"], {})
                    if backbone == "cnn":
                        settings = FOR_A_CNN.get(line["method"], settings)
                    job = {
                        "method": line["method"], "options": line.get("options", settings), "seed": seed,
                        "backbone": backbone,
                        "data": Path(path).name, "path": root, "sweep": arguments.sweep,
                        "images": line.get("images", 0), "minutes": line.get("minutes", arguments.minutes),
                        "steps": line.get("steps", 0), "points": arguments.points,
                        "whole": line.get("whole", not arguments.sweep),
                    }  # fmt: skip
                    if job["method"] == "teacher":
                        job["teacher"] = arguments.teacher
                    size = line.get("size", arguments.size)
                    if size != 32:
                        job["data"] += f" at {size}"
                    text = json.dumps(job, sort_keys=True)
                    job["id"] = hashlib.sha1(text.encode()).hexdigest()[:12]
                    jobs.append(job | {"size": size, "device": arguments.device, "out": arguments.out})
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", nargs="+", default=["toy"])
    parser.add_argument("--root", help="folder of the data sets")
    parser.add_argument(
        "--methods", nargs="+", default=["pixels", "fresh", "mfm", "folk", "simmim", "mae", "dino", "lejepa"]
    )
    parser.add_argument(
        "--size", type=int, default=32, help="of the images, in pixels; a ViT has 8 x 8 patches"
    )
    parser.add_argument("--teacher", help="of the method teacher: timm:NAME, or a folder")
    parser.add_argument("--backbones", nargs="+", default=["vit"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--minutes", type=float, default=14.0, help="of one CPU core, for each training")
    parser.add_argument(
        "--points", nargs="+", type=float, default=[1.0], help="shares of the training to evaluate at"
    )
    parser.add_argument(
        "--plan", help="JSON list of {method, options, data, backbones, seeds, images, minutes, size}"
    )
    parser.add_argument("--sweep", action="store_true", help="judge on held-out training images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--speeds", help="JSON of images/s measured before; what is missing is measured and added"
    )
    parser.add_argument(
        "--until", type=float, default=math.inf, help="start no training after this many seconds"
    )
    parser.add_argument("--out", default="learning")
    arguments = parser.parse_args()
    begun = time.monotonic()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    table = out / "learning.csv"
    done = {row["id"] for row in read_rows(table)}
    jobs = [job for job in make_jobs(arguments) if job["id"] not in done]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for path, size in {(job["path"], job["size"]) for job in jobs}:
        loaded_once(path, size)
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        jobs = with_speeds(jobs, pool, Path(arguments.speeds or out / "speeds.json"))
        new = not table.exists() or not table.stat().st_size
        with table.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            if new:
                writer.writeheader()
            tasks = [(job, begun_at(begun, arguments.until)) for job in jobs]
            for rows in pool.imap_unordered(_before, tasks):
                for row in rows:
                    writer.writerow({name: _short(value) for name, value in row.items()})
                    print(told(row), flush=True)
                file.flush()
    draw(read_rows(table), out / "learning.png")


def read_rows(table: Path) -> list[dict[str, str]]:
    """The rows written so far."""
    if not table.exists():
        return []
    with table.open() as file:
        return list(csv.DictReader(file))


def with_speeds(jobs: list[dict[str, Any]], pool: Any, kept: Path) -> list[dict[str, Any]]:
    """The jobs with their images/s, measured where `kept` has none; without those that could not be measured."""
    speeds = json.loads(kept.read_text()) if kept.exists() else {}
    trained = {speed_key(job): job for job in jobs if job["method"] not in ("fresh", "pixels")}
    missing = [job for key, job in trained.items() if key not in speeds]
    # one after the other on a GPU, where those that run at once would slow each other
    on_gpu = any(job["device"] == "cuda" for job in missing)
    found = (pool.apply(speed, (job,)) for job in missing) if on_gpu else pool.imap_unordered(speed, missing)
    speeds.update(found)
    kept.write_text(json.dumps(speeds, indent=1))
    for job in jobs:
        job["images_per_second"] = speeds.get(speed_key(job), 0.0)
    return [job for job in jobs if job["images_per_second"] or job["method"] in ("fresh", "pixels")]


def told(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    numbers = ("minutes", "knn", "knn_white", "linear", "corrupted", "shots10", "finetuned10", "rank")
    shown = " ".join(f"{name} {row[name]:.1f}" for name in numbers if name in row)
    return (
        f"{row['data']:10} {row['backbone']:5} {row['method']:8} seed {row['seed']} {shown}  {row['options']}"
    )


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Accuracy of the linear probe against minutes, a curve a method (the mean over seeds), a panel a data set."""
    from matplotlib.figure import Figure

    panels = sorted({(row["data"], row["backbone"]) for row in rows})
    if not panels:
        return
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(
            1, len(panels), number, title=" / ".join(panel), xlabel="minutes on one core"
        )
        axes.set_ylabel("linear probe, %")
        curves: dict[str, dict[float, list[float]]] = {}
        for row in rows:
            if (row["data"], row["backbone"]) == panel and row["linear"]:
                points = curves.setdefault(row["method"], {})
                points.setdefault(round(float(row["minutes"]), 1), []).append(float(row["linear"]))
        for method, points in curves.items():
            minutes = sorted(points)
            means = [sum(points[at]) / len(points[at]) for at in minutes]
            if method in ("fresh", "pixels"):
                axes.axhline(means[0], linestyle=":", color="grey", label=method)
            else:
                axes.plot(minutes, means, "o-", label=method)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def begun_at(begun: float, until: float) -> float:
    """The clock's end, in the wall clock that all processes share."""
    return time.time() - (time.monotonic() - begun) + until


def _before(task: tuple[dict[str, Any], float]) -> list[dict[str, Any]]:
    job, end = task
    return work(job) if time.time() < end else []


def _short(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
