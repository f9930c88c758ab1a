"""What must hold on a GPU: the CPU's numbers, no waiting, exact resume, sentences (``pytest -m gpu``)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation.segmentation_images import make_data
from methods.tiny import tiny_teacher
from PIL import Image
from torch import Tensor

import freqmask
from freqmask.errors import UserError
from freqmask.filters import build_filter
from freqmask.methods import build_method
from freqmask.pretraining.task import PretrainingModule
from freqmask.training.files import read_rows

HAS_GPU = torch.cuda.is_available()
PRETENDED = not HAS_GPU and "FREQMASK_PRETEND_GPU" in os.environ  # to try these tests where there is none
GPU = "cuda" if HAS_GPU else "cpu"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not (HAS_GPU or PRETENDED), reason="needs a CUDA device")]
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")

FIXED = ["fixed", "lowpass(radius=3, softness=1)", "bandstop(low=2, high=4)", "rings(edges=[1, 2, 4])"]
RANKED = ["com", "rcom(magnitude='each')", "com(fractions=[0.1], magnitude='mean')", "energy(share=0.9)"]
SIZES = [(224, 224), (33, 47), (32, 32)]
VIT: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224",
    "image_size": 32,
    "patch_size": 8,
    "model_args": {"embed_dim": 64, "depth": 2, "num_heads": 1},
}
CNN: dict[str, Any] = {"backbone": "resnet18", "image_size": 32}
HEADS: dict[str, Any] = {"outputs": 16, "hidden_size": 32, "bottleneck_size": 8}
METHODS: dict[str, dict[str, Any]] = {
    "mfm": {"name": "mfm", **VIT},
    "mfm, Com": {"name": "mfm", "filter": "com", **VIT},
    "mfm, CNN": {"name": "mfm", **CNN},
    "folk": {"name": "folk", **VIT, **HEADS},
    "folk, CNN": {"name": "folk", **CNN, **HEADS},
    "sr": {"name": "sr", **VIT},
    "deblur": {"name": "deblur", **VIT},
    "denoise": {"name": "denoise", **VIT},
    "words": {"name": "words", **VIT},
    "words, CNN": {"name": "words", **CNN},
    "distill": {"name": "distill", **CNN},
}
RUN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "backbone": "vit_tiny_patch16_224",
    "model_args": {"depth": 2, "embed_dim": 64, "num_heads": 1},
    "batch_size": 32,
    "steps": 8,
    "workers": 2,
    "checkpoint_every_steps": 4,
    "keep_checkpoints": 9,
    "preview_every_steps": 4,
    "log_every_steps": 1,
    "precision": "32-true",
}
FOLK: dict[str, Any] = {"method": "folk", "outputs": 32, "hidden_size": 32, "bottleneck_size": 16}


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Convolutions in float32 as on the CPU; afterwards torch's default again."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def smooth(count: int, size: tuple[int, int], seed: int = 1) -> Tensor:
    """Images in [0, 1] with the falling spectrum of photographs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 7, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return (images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def pair_of(options: dict[str, Any]) -> tuple[Any, Any, list[Tensor], Tensor]:
    """The same method here and on the GPU, views and keys."""
    options = dict(options)
    torch.manual_seed(0)
    name = options.pop("name")
    methods: list[Any] = []
    for _ in range(2):
        if name == "distill":
            options["teacher"] = tiny_teacher()  # one each: it moves with its method
        methods.append(build_method(name, **options))
    here, there = methods
    views = [smooth(8, (32, 32), seed) for seed in range(here.n_views)]
    if name == "words":
        here.words(views[0])  # k-means may end elsewhere on another device
    there.load_state_dict(here.state_dict())
    return here, there.to(GPU), views, torch.arange(8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("text", FIXED)
def test_fixed_masks_are_those_of_the_cpu(text: str, size: tuple[int, int]) -> None:
    images, keys, filter = smooth(16, size), torch.arange(16) - 3, build_filter(text)
    here, there = filter(images, keys), filter(images.to(GPU), keys.to(GPU))
    torch.testing.assert_close(there.keep.cpu(), here.keep, atol=1e-6, rtol=0)
    torch.testing.assert_close(there.images.cpu(), here.images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("text", RANKED)
def test_ranked_masks_differ_at_most_where_two_bins_are_equally_strong(
    text: str, size: tuple[int, int]
) -> None:
    images, keys, filter = smooth(16, size), torch.arange(16) - 3, build_filter(text)
    here, there = filter(images, keys), filter(images.to(GPU), keys.to(GPU))
    assert (there.keep.cpu() != here.keep).float().mean() < 1e-3
    torch.testing.assert_close(there.keep.sum((-1, -2)).cpu(), here.keep.sum((-1, -2)), atol=2, rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_are_those_of_the_cpu(name: str) -> None:
    here, there, views, keys = pair_of(METHODS[name])
    one = here(views, keys, details=True)
    other = there([view.to(GPU) for view in views], keys.to(GPU), details=True)
    for part, value in one.items():
        torch.testing.assert_close(other[part].cpu(), value, atol=1e-3, rtol=2e-3, equal_nan=True)
    one["loss"].backward()
    other["loss"].backward()
    for (parameter, first), second in zip(here.named_parameters(), there.parameters(), strict=True):
        if first.grad is not None and first.grad.norm() > 1e-6:
            assert second.grad is not None
            off = (second.grad.cpu() - first.grad).norm() / first.grad.norm()
            assert off < 0.05, (parameter, float(off))


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_moves_the_loss_little(name: str) -> None:
    _, there, views, keys = pair_of(METHODS[name])
    views, keys = [view.to(GPU) for view in views], keys.to(GPU)
    exact = there(views, keys)["loss"]
    with torch.autocast(GPU, torch.bfloat16):
        half = there(views, keys)["loss"]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, atol=0, rtol=0.08)  # of tiny networks on few images
    half.backward()
    assert all(p.grad.isfinite().all() for p in there.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["mfm, Com", "mfm, CNN", "folk"])
def test_compiled_backbones_give_the_same_loss_and_gradient(name: str) -> None:
    plain, compiled, views, keys = pair_of(METHODS[name])
    plain.to(GPU)
    compiled.compile_parts()
    views, keys = [view.to(GPU) for view in views], keys.to(GPU)
    for method in (plain, compiled):
        method(views, keys)["loss"].backward()
    torch.testing.assert_close(compiled(views, keys)["loss"], plain(views, keys)["loss"], atol=0, rtol=3e-3)
    for first, second in zip(plain.parameters(), compiled.parameters(), strict=True):
        if first.grad is not None and first.grad.norm() > 1e-6:
            assert (second.grad - first.grad).norm() / first.grad.norm() < 0.1


def trained(folder: Path, **options: Any) -> Path:
    given = {**RUN, "accelerator": GPU, **options}
    given = {name: value for name, value in given.items() if value is not None}
    return Path(freqmask.pretrain("builtin:digits", out=str(folder), **given))


def losses(run: Path) -> dict[int, float]:
    rows = read_rows(run / "metrics.csv")
    return {int(row["step"]): float(row["loss"]) for row in rows if row.get("loss")}


def cut_at_step_4(run: Path, copy: Path) -> Path:
    """The run as if it had been killed after its checkpoint of step 4."""
    shutil.copytree(run, copy)
    for path in [
        copy / "summary.json",
        copy / "checkpoints" / "last.ckpt",
        copy / "checkpoints" / "step-00000008.ckpt",
    ]:
        path.unlink()
    return copy


@pytest.mark.parametrize(
    "options",
    [
        {"images_from": "loader"},
        {"images_from": "device", **FOLK},
        {
            "images_from": "device",
            "precision": "bf16-mixed",
            "model_args": {**RUN["model_args"], "drop_path_rate": 0.5},
        },
        {"images_from": "loader", "backbone": "resnet18", "patch_size": None, "model_args": None},
    ],
    ids=["loader", "folk, resident", "bf16, drop path", "cnn"],
)
def test_a_run_that_was_cut_goes_on_with_the_same_loss(options: dict[str, Any], tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", **options)
    copy = cut_at_step_4(whole, tmp_path / "cut")
    again = losses(trained(copy, **options))
    expected = losses(whole)
    assert sorted(again) == sorted(expected) == list(range(1, 9))
    for step, loss in expected.items():
        assert again[step] == pytest.approx(loss, rel=2e-3), step


@pytest.mark.parametrize("options", [{}, FOLK], ids=["mfm", "folk"])
@pytest.mark.parametrize("first, second", [("cpu", GPU), (GPU, "cpu")])
def test_a_checkpoint_moves_between_cpu_and_gpu(
    first: str, second: str, options: dict[str, Any], tmp_path: Path
) -> None:
    whole = trained(tmp_path / "whole", **options, accelerator=first)
    copy = cut_at_step_4(whole, tmp_path / "moved")
    again = losses(trained(copy, **options, accelerator=second))
    for step, loss in losses(whole).items():
        assert again[step] == pytest.approx(loss, rel=1e-2), step


@needs_gpu
@pytest.mark.parametrize("images_from", ["device", "loader"])
@pytest.mark.parametrize("options", [{}, {**FOLK, "compile": True}], ids=["mfm", "folk, compiled"])
def test_the_steps_of_a_whole_training_wait_for_nothing(
    images_from: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the end of one step to the end of the next, fetching the batch included; no row is written there."""
    watched = []
    start, mode = PretrainingModule.on_train_batch_start, torch.cuda.set_sync_debug_mode

    def watching(self: Any, batch: Any, batch_index: int) -> None:
        start(self, batch, batch_index)
        if batch_index == 9:
            mode("error")
        if batch_index == 15:
            mode("default")
        if 9 <= batch_index < 15:
            watched.append(batch_index)

    monkeypatch.setattr(PretrainingModule, "on_train_batch_start", watching)
    try:
        trained(
            tmp_path / "run",
            **{**options, "images_from": images_from, "steps": 20, "log_every_steps": 100},
            checkpoint_every_steps=20,
            preview_every_steps=0,
            probe_every_epochs=10_000,
            precision="bf16-mixed",
        )
    finally:
        mode("default")
    assert len(watched) == 6


@needs_gpu
@pytest.mark.parametrize("options", [{}, FOLK], ids=["words", "folk"])
def test_scaled_gradients_teach_what_float32_teaches(options: dict[str, Any], tmp_path: Path) -> None:
    long = {**options, "steps": 40, "checkpoint_every_steps": 40}
    exact, scaled = (
        losses(trained(tmp_path / precision, **long, precision=precision))
        for precision in ("32-true", "16-mixed")
    )
    learnt = [sum(found[step] for step in range(31, 41)) / 10 for found in (exact, scaled)]
    assert learnt[1] == pytest.approx(learnt[0], rel=0.03)
    assert scaled[1] == pytest.approx(exact[1], rel=0.02)


EVALUATED: dict[str, dict[str, Any]] = {
    "knn": {},
    "linear": {"seeds": [0]},
    "fewshot": {"shots": [5]},
    "bands": {"head": "linear", "radii": [4.0, 8.0]},
    "robustness": {"head": "linear", "test_images": 60, "severities": [3], "corruptions": ["contrast"]},
}


@pytest.mark.parametrize("protocol", EVALUATED)
def test_an_evaluation_gives_the_cpus_scores(protocol: str, tmp_path: Path) -> None:
    run = trained(tmp_path / "run", accelerator="cpu", steps=2)
    scores = {}
    for device in ("cpu", GPU):
        out = tmp_path / f"on-{device}"
        evaluate = getattr(freqmask.evaluate, protocol)
        evaluate([str(run)], data="builtin:digits", out=str(out), accelerator=device, **EVALUATED[protocol])
        scores[device] = [float(row["accuracy"]) for row in read_rows(out / "results.csv") if row["accuracy"]]
    assert scores["cpu"] and len(scores["cpu"]) == len(scores[GPU])
    assert scores[GPU] == pytest.approx(scores["cpu"], abs=0.03)


def test_fine_tuning_learns_as_on_the_cpu(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", accelerator="cpu", steps=2)
    options: dict[str, Any] = {"workers": 0, "precision": "32-true", "log_every_steps": 1, "drop_path": 0.0}
    options |= {"steps": 60, "lr": 3e-3, "batch_size": 64, "mixup": 0.0, "cutmix": 0.0}
    found = {}
    for device in ("cpu", GPU):
        out = tmp_path / f"on-{device}"
        freqmask.evaluate.finetune(
            [str(run)], data="builtin:digits", out=str(out), accelerator=device, **options
        )
        found[device] = losses(out / "run-seed0")
    assert found["cpu"][60] < 0.9 * found["cpu"][1]
    assert found[GPU][1] == pytest.approx(found["cpu"][1], rel=2e-3)
    assert found[GPU] == pytest.approx(found["cpu"], rel=0.1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_segmentation_learns_two_colours(precision: str, tmp_path: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    run, street = trained(tmp_path / "run", steps=2), str(make_data(tmp_path / "street"))
    options: dict[str, Any] = {"steps": 60, "lr": 0.005, "scale": [1.0, 1.0], "crop": 32, "batch_size": 4}
    options |= {"decoder_channels": 8, "workers": 0, "precision": precision, "accelerator": GPU}
    (summary,) = freqmask.evaluate.segment([str(run)], data=street, out=str(tmp_path / "out"), **options)
    assert summary.scores.mean_iou > 0.8


@needs_gpu
def test_out_of_memory_ends_in_the_promised_sentence(tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.5e9 / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(UserError, match=r"out of memory with 1024 images at once.*--accumulate 2"):
            trained(
                tmp_path / "run",
                backbone="vit_small_patch16_224",
                model_args=None,
                image_size=224,
                patch_size=16,
                batch_size=1024,
                accumulate=1,
                workers=8,
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_run_of_the_gpu_is_evaluated_embedded_and_looked_at(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", probe_data=["builtin:digits"])
    freqmask.evaluate.knn([str(run)], data="builtin:digits", out=str(tmp_path / "knn"))
    freqmask.embed(str(run), "builtin:digits", out=str(tmp_path / "features.npy"))
    picture = tmp_path / "picture.png"
    Image.fromarray((255 * smooth(1, (32, 32))[0]).byte().permute(1, 2, 0).numpy()).save(picture)
    freqmask.reconstruct(str(run), str(picture), out=str(tmp_path / "reconstructed.png"))
    assert read_rows(tmp_path / "knn" / "results.csv") and list((run / "previews").glob("*.png"))
