"""Fine-tuning: what becomes of a backbone, that it learns, goes on exactly, and never sees a test image."""

import copy
import csv
import dataclasses
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tiny_runs import fused_in_training, make_run, steps_made

import freqmask
from freqmask.cli import main
from freqmask.data.augment import AugmentedGeometry, Mixer, _randaugment
from freqmask.data.loader import OrderedSampler, TrainDataset, make_loader
from freqmask.data.sources import open_source
from freqmask.data.values import ValueRange
from freqmask.errors import UserError
from freqmask.evaluation.eval_model import LOGITS, ClassifierModel, seen_in_training
from freqmask.evaluation.finetune import FinetuneModule, begin_by_frozen_features, frozen_features
from freqmask.evaluation.finetune_plan import (
    Tuning,
    make_classifier,
    standardize_features,
    without_head_norm,
)
from freqmask.evaluation.linear import RIDGE, begin_head, right_out_of_fold
from freqmask.evaluation.trainings import layer_groups
from freqmask.interop.models import open_model
from freqmask.training.run_folder import RunFolder, load_safely

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 1}
QUICK: dict[str, Any] = {
    "steps": 6,
    "batch_size": 8,
    "workers": 0,
    "accelerator": "cpu",
    "precision": "32-true",
}


def write_data(path: Path, test_seed: int = 1, dtype: Any = np.uint8) -> str:
    """Bright and dark images: anything that sees tells them apart."""
    arrays: dict[str, np.ndarray] = {}
    for split, count, seed in (("train", 40, 0), ("test", 20, test_seed)):
        labels = np.arange(count) % 2
        noise = np.random.default_rng(seed).integers(0, 60, (count, 16, 16, 3))
        images = (noise + 120 * labels[:, None, None, None]).astype(dtype)
        arrays |= {f"{split}_images": images * (1 if dtype == np.uint8 else 200), f"{split}_labels": labels}
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny run and data."""
    folder = tmp_path_factory.mktemp("there")
    make_run(folder / "mine", image_size=16, model_args=TINY)
    write_data(folder / "two.npz")
    return folder


@pytest.fixture(scope="module")
def tuned(there: Path) -> Path:
    """The run folder of a fine-tuning whose held-out accuracy is watched."""
    out = there / "tuned"
    finetune(there, out, held_out=0.2, validate_every_epochs=0.5)
    return out / "mine-seed0"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


def finetune(there: Path, out: Path, **options: Any) -> list[Any]:
    data = options.pop("data", str(there / "two.npz"))
    model = options.pop("model", str(there / "mine"))
    return freqmask.evaluate.finetune(model, data=data, out=str(out), **{**QUICK, **options})


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "classifier" / "model.safetensors")


def assert_equal(first: Path, second: Path) -> None:
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_set_that_can_be_separated_is_learnt_in_a_few_steps(there: Path, tmp_path: Path) -> None:
    (summary,) = finetune(there, tmp_path / "out", steps=40, lr=2e-3, seeds=[0, 1])
    assert len(summary.accuracies) == 2
    assert min(summary.accuracies) > 0.9
    assert (tmp_path / "out" / "finetune.png").is_file()
    assert (tmp_path / "out" / "finetune-classes.csv").is_file()


def test_a_row_holds_the_command_that_finds_the_same_number(
    there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(there, tmp_path / "out", steps=2)
    (row,) = rows(tmp_path / "out" / "results.csv")
    assert (row["protocol"], row["variant"], row["train_images"], row["steps"]) == (
        "finetune", "all labels", "40", "2",
    )  # fmt: skip
    words = row["command"].split()
    assert words[:3] == ["freqmask", "evaluate", "finetune"]
    main([*words[1:], "--out", str(tmp_path / "out")])
    assert "is finished; its classifier is taken" in capsys.readouterr().out
    (again,) = rows(tmp_path / "out" / "results.csv")  # in the place of the first
    assert again["accuracy"] == row["accuracy"]


def test_a_vit_is_read_by_the_mean_of_its_patches_through_a_fresh_norm(there: Path) -> None:
    opened = open_model(there / "mine")
    network = make_classifier(opened, 3, drop_path=0.1, seed=0)
    model, before = network.model, opened.module.state_dict()
    assert isinstance(model.norm, torch.nn.Identity)
    assert not torch.equal(
        before["norm.weight"], torch.ones(32)
    )  # the trained one is told apart from a fresh one
    assert torch.equal(model.fc_norm.weight, torch.ones(32))
    assert torch.equal(model.blocks[1].mlp.fc1.weight, before["blocks.1.mlp.fc1.weight"])
    assert 0 < float(model.head.weight.detach().abs().max()) < 4 * 0.02 * 0.001
    images = torch.rand(2, 3, 16, 16)
    tokens = model.eval().forward_features(images)[:, 1:]
    assert torch.allclose(model(images), model.head(model.fc_norm(tokens.mean(dim=1))), atol=1e-7)
    assert network.dropped == ["norm.weight", "norm.bias"]


def test_layers_learn_more_slowly_the_lower_they_are(there: Path) -> None:
    model = make_classifier(open_model(there / "mine"), 3, 0.0, 0).model
    found = {
        id(parameter): (group["lr_scale"], group["weight_decay"])
        for group in layer_groups(model, 0.05, 0.8)
        for parameter in group["params"]
    }
    assert len(found) == len(list(model.parameters()))
    expected = {
        "head.weight": (1.0, 0.05),
        "head.bias": (1.0, 0.0),
        "fc_norm.weight": (1.0, 0.0),
        "blocks.1.attn.qkv.weight": (0.8, 0.05),
        "blocks.0.attn.qkv.weight": (0.8**2, 0.05),
        "patch_embed.proj.weight": (0.8**3, 0.05),
        "pos_embed": (0.8**3, 0.0),
        "cls_token": (0.8**3, 0.0),
    }
    for name, values in expected.items():
        assert found[id(model.get_parameter(name))] == pytest.approx(values), name


def test_the_schedule_keeps_the_layers_apart(tuned: Path, there: Path) -> None:
    tuning = Tuning.read(RunFolder(tuned).config())
    model = make_classifier(open_model(there / "mine"), 2, 0.0, 0).model
    module = FinetuneModule(model, dataclasses.replace(tuning, warmup_steps=0, steps=100), 2)
    optimizer = module.configure_optimizers()
    assert module.schedule is not None
    module.schedule.apply(0)
    rates = {group["lr_scale"]: group["lr"] for group in optimizer.param_groups}
    assert all(rate == pytest.approx(scale * tuning.lr) for scale, rate in rates.items())
    assert len(rates) == 4


@pytest.mark.parametrize(("precision", "fused"), [("bf16-mixed", 0), ("32-true", 2)])
def test_few_tokens_are_attended_to_by_the_kernel_with_the_quick_backward_pass(
    precision: str, fused: int, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = fused_in_training(monkeypatch)
    finetune(there, tmp_path / "out", steps=2, precision=precision)
    assert found == [fused] * 2


def test_a_run_killed_on_its_way_ends_bit_for_bit_as_one_that_was_not(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "checkpoint_every_steps": 2,
        "log_every_steps": 1,
        "ema": 0.9,
        "drop_path": 0.5,
        "mixup": 0.8,
        "cutmix": 1.0,
    }
    finetune(there, tmp_path / "whole", **options)
    with pytest.raises(RuntimeError, match="killed here"):
        finetune_until(3, there, tmp_path / "parts", **options)
    run = tmp_path / "parts" / "mine-seed0"
    assert not RunFolder(run).finished()
    steps = steps_made(monkeypatch)
    finetune(there, tmp_path / "parts", **options)
    assert steps == list(range(3, QUICK["steps"] + 1))  # it went on from step 2
    assert_equal(tmp_path / "whole" / "mine-seed0", run)
    losses = [
        [row["loss"] for row in rows(out / "metrics.csv")] for out in (tmp_path / "whole" / "mine-seed0", run)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == QUICK["steps"]


def finetune_until(step: int, there: Path, out: Path, **options: Any) -> None:
    """Break off after a step as a kill would: nothing is saved any more."""
    from freqmask.training.callbacks import Monitor

    whole = Monitor.on_train_batch_end

    def broken(self: Any, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == step:
            raise RuntimeError("killed here")
        whole(self, trainer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "on_train_batch_end", broken)
        finetune(there, out, **options)


def test_devices_that_leave_an_odd_number_of_images_do_not_resume(there: Path, tmp_path: Path) -> None:
    options = {"batch_size": 6, "mixup": 0.8}
    with pytest.raises(RuntimeError, match="killed here"):
        finetune_until(2, there, tmp_path / "out", **options)
    with pytest.raises(UserError, match=r"same even number of images.*\(devices 2, accumulate 1\)"):
        finetune(there, tmp_path / "out", devices=2, **options)


def test_the_classifier_s_folder_is_one_that_timm_loads(tuned: Path) -> None:
    model = timm.create_model(f"local-dir:{tuned / 'classifier'}", pretrained=True).eval()
    assert model.num_classes == 2
    assert list(model.pretrained_cfg["label_names"]) == ["0", "1"]
    images = torch.rand(4, 3, 16, 16)
    normalised = (images - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.25, 0.3])[
        :, None, None
    ]
    for folder in (tuned, tuned / "classifier"):
        subject = ClassifierModel(str(folder), ["1", "0"])
        assert torch.allclose(
            subject.features(images, "end")[LOGITS], model(normalised)[:, [1, 0]], atol=1e-6
        )
        assert subject.name == "mine-seed0"
    checkpoint = torch.load(tuned / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    trained = {name.removeprefix("model."): value for name, value in checkpoint.items()}
    assert all(torch.equal(value, trained[name]) for name, value in weights(tuned).items())
    assert open_model(tuned).metadata["method"] == "finetune"


def test_bands_ask_the_classifier_itself(tuned: Path, there: Path, tmp_path: Path) -> None:
    found = freqmask.evaluate.bands(
        str(tuned), data=str(there / "two.npz"), head="own", radii=[4], out=str(tmp_path / "out"), workers=0
    )
    own = freqmask.evaluate.finetune(
        str(there / "mine"), data=str(there / "two.npz"), out=str(tuned.parent), held_out=0.2, **QUICK
    )
    accuracies = {summary.variant: summary.accuracies for summary in found}
    assert set(accuracies) == {"whole", "low 4", "high 4"}
    assert accuracies["whole"] == own[0].accuracies
    assert (tmp_path / "out" / "bands.png").is_file()


def test_no_test_image_has_a_part_in_the_training(there: Path, tmp_path: Path, tuned: Path) -> None:
    other = write_data(tmp_path / "other.npz", test_seed=7)
    finetune(there, tmp_path / "out", data=other, held_out=0.2, validate_every_epochs=0.5)
    assert_equal(tuned, tmp_path / "out" / "mine-seed0")
    watched = [[row["held_out_accuracy"] for row in rows(run / "metrics.csv") if row["held_out_accuracy"]]
               for run in (tuned, tmp_path / "out" / "mine-seed0")]  # fmt: skip
    assert watched[0] == watched[1]
    assert len(watched[0]) == 3


def test_what_is_watched_is_not_learnt_from(tuned: Path) -> None:
    assert RunFolder(tuned).state()["images"] == 32
    assert RunFolder(tuned).summary()["held_out_accuracy"] in {count / 8 for count in range(9)}


def test_other_settings_are_refused_each_named(tuned: Path, there: Path) -> None:
    with pytest.raises(
        UserError, match=r"lr was auto and is 0.1 now; .*erasing was auto and is 0.5 now"
    ) as caught:
        finetune(there, tuned.parent, held_out=0.2, lr=0.1, erasing=0.5)
    assert "another --out" in str(caught.value)


def test_a_classifier_of_other_labels_is_not_taken(there: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number, pixels in enumerate(np.load(there / "two.npz")["train_images"][:16]):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")

    def label(names: str) -> None:
        lines = [f"{k}.png,{names[k % 2]},{'test' if k > 11 else 'train'}" for k in range(16)]
        (tmp_path / "labels.csv").write_text("\n".join(["path,label,split", *lines]) + "\n")

    options = {"data": str(tmp_path / "images"), "labels": str(tmp_path / "labels.csv"), "steps": 1}
    label("ab")
    (first,) = finetune(there, tmp_path / "out", **options)
    (again,) = finetune(there, tmp_path / "out", **options)
    assert again.accuracies == first.accuracies
    label("ba")
    with pytest.raises(
        UserError, match=r"begun with other settings: labels of the images was \w+ and is \w+ now"
    ):
        finetune(there, tmp_path / "out", **options)
    run = RunFolder(tmp_path / "out" / "mine-seed0")
    state = run.state()
    del state["deciding"]["labels of the images"]  # as 0.1.0 wrote it
    run.write_state(state)
    finetune(there, tmp_path / "out", **options)


def test_a_signal_in_the_last_step_of_one_training_begins_no_other(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = FinetuneModule.training_step

    def interrupted(self: FinetuneModule, batch: Any, number: int) -> Any:
        if self.step == 1:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FinetuneModule, "training_step", interrupted)
        finetune(there, tmp_path / "out", seeds=[0, 1], steps=2)
    assert RunFolder(tmp_path / "out" / "mine-seed0").finished()
    assert not (tmp_path / "out" / "mine-seed1").exists()
    (summary,) = finetune(there, tmp_path / "out", seeds=[0, 1], steps=2)
    assert len(summary.accuracies) == 2


def test_few_labels_are_the_draw_of_fewshot(there: Path, tmp_path: Path) -> None:
    (summary,) = finetune(there, tmp_path / "out", shots="3")
    assert summary.variant == "3 a class"
    assert RunFolder(tmp_path / "out" / "mine-seed0").state()["images"] == 6


@pytest.mark.parametrize(
    ("few", "options", "expected"),
    [
        (
            False,
            {"image_size": 96},
            {
                "recipe": "a3",
                "optimizer": "lamb",
                "loss": "binary",
                "layer_decay": 1.0,
                "mixup": 0.1,
                "erasing": 0.0,
            },
        ),
        *(
            (
                True,
                {"image_size": size},
                {"recipe": "vit", "optimizer": "adamw", "layer_decay": 0.8, "mixup": 0.0, "head_norm": False},
            )
            for size in (32, 96)
        ),
        (True, {"image_size": 32, "recipe": "a3"}, {"optimizer": "lamb", "mixup": 0.1, "cutmix": 1.0}),
        (
            False,
            {"image_size": 96, "recipe": "vit", "ema": 0.9},
            {"optimizer": "adamw", "loss": "cross_entropy", "layer_decay": 0.8, "mixup": 0.8},
        ),
    ],
)
def test_a_cnn_has_its_own_recipe_unless_images_are_few(
    there: Path,
    tmp_path: Path,
    few: bool,
    options: dict[str, Any],
    expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not few:
        monkeypatch.setattr("freqmask.evaluation.finetune_plan.FEW_IMAGES", 40)
    finetune(there, tmp_path / "out", model="random:test_resnet", steps=2, **options)
    config = RunFolder(tmp_path / "out" / "random-test_resnet-seed0").config()
    assert {name: config[name] for name in expected} == expected
    moved = weights(tmp_path / "out" / "random-test_resnet-seed0")
    assert all(torch.isfinite(tensor).all() for tensor in moved.values())


def test_randaugment_is_for_eight_bit_colour_only(there: Path, tmp_path: Path) -> None:
    deep = write_data(tmp_path / "deep.npz", dtype=np.uint16)
    finetune(there, tmp_path / "out", data=deep, steps=1, value_range="0,65535")
    assert RunFolder(tmp_path / "out" / "mine-seed0").config()["augment"] == "none"
    with pytest.raises(
        UserError, match="RandAugment is for 8-bit color images, and these have 3 channels of uint16"
    ):
        finetune(there, tmp_path / "other", data=deep, augment="rand-m9", value_range="0,65535")
    assert not (tmp_path / "other").exists()


def test_augmented_views_follow_from_their_keys_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8))
    images = open_source(str(tmp_path / "a.npy"))
    geometry = AugmentedGeometry(image_size=16, augment="rand-m9-mstd0.5-inc1")
    views = []
    for workers, batch in ((0, 12), (1, 4)):
        np.random.seed(workers)
        state = np.random.get_state()[1].copy()  # type: ignore[union-attr]
        dataset = TrainDataset(images, [geometry])
        loader = make_loader(dataset, OrderedSampler(12), batch, workers)
        views.append(torch.cat([one["views"][0] for one in loader]))
        assert np.array_equal(np.random.get_state()[1], state)
    assert torch.equal(views[0], views[1])
    plain = TrainDataset(images, [AugmentedGeometry(image_size=16)])
    (unchanged,) = make_loader(plain, OrderedSampler(12), 12)
    assert not torch.equal(unchanged["views"][0], views[0])


def test_a_deep_image_among_others_is_augmented_as_the_same_one_of_eight_bits(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    (tmp_path / "eight.png").write_bytes(imagecodecs.png_encode(pixels))
    (tmp_path / "sixteen.png").write_bytes(imagecodecs.png_encode(pixels.astype(np.uint16) * 257))
    source, geometry = open_source(tmp_path), AugmentedGeometry(image_size=16, augment="rand-m9-mstd0.5-inc1")
    eight, sixteen = (
        geometry.finish(torch.from_numpy(ValueRange().apply(picture.decode())), 3)
        for picture in map(source.open, range(2))
    )
    assert sixteen.dtype == torch.uint8
    assert torch.equal(eight, sixteen)
    batch = next(iter(make_loader(TrainDataset(source, [geometry]), OrderedSampler(2), 2)))
    assert len(batch["views"][0]) == 2 and not batch["skipped"]


def test_mixing_follows_from_the_key_of_the_batch() -> None:
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 4
    mixer = Mixer(4, 0.8, 1.0, 0.1, 0.5)
    before = torch.get_rng_state()
    first, second, other = (mixer(images.clone(), labels, key) for key in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], other[0])
    assert torch.allclose(first[1].sum(dim=1), torch.ones(8))
    plain, targets = Mixer(4, 0, 0, 0.0, 0)(images.clone(), labels, 1)
    assert torch.equal(plain, images)
    assert torch.equal(targets.argmax(dim=1), labels)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["pixels"], "model (pixels) must have weights"),
        (["nowhere"], "model (nowhere) must be"),
        (["MINE", "--epochs", "2", "--steps", "3"], "--epochs and --steps exclude each other"),
        (["MINE", "--augment", "strong"], "augment (strong) must be auto, none, or as timm writes it"),
        (["MINE", "--lr", "fast"], "lr (fast) must be a number above 0"),
        (["MINE", "--drop_path", "1"], "drop_path (1) must be a number from 0 to below 1"),
        (
            ["MINE", "--batch_size", "7", "--mixup", "0.8"],
            "batch_size (7) must give every device and part the same even number",
        ),
        (["MINE", "--train_size", "32"], "train_size (32) must be the 16x16 pixels"),
        (["MINE", "--shots", "some"], "shots (some) must be"),
        (["MINE", "--crop_scale", "1", "0.5"], "crop_scale ([1.0, 0.5]) must be two shares of the area"),
        (["MINE", "--lr", "0.001", "--min_lr", "0.01"], "min_lr (0.01) must be at most lr (0.001)"),
        (
            ["random:dla46x_c", "--image_size", "32", "--drop_path", "0.1"],
            "drop_path (0.1) must be left out: drop path is off: dla46x_c does not take it",
        ),
        (
            [
                "random:resnet10t",
                "--image_size",
                "32",
                *["--batch_size", "1", "--mixup", "0", "--cutmix", "0"],
            ],
            "batch_size, devices and accumulate leave one image at once",
        ),
        (["MINE", "--precision", "half"], "precision (half) must be one of 'auto', '32-true'"),
        (["MINE", "--recipe", "a1"], "recipe (a1) must be one of"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    words = [str(there / "mine") if word == "MINE" else word for word in words]
    with pytest.raises(SystemExit) as leaving:
        main(["evaluate", "finetune", *words, "--data", str(there / "two.npz"), "--workers", "0"])
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_is_told(there: Path, tmp_path: Path) -> None:
    place = tmp_path / "out" / "mine-seed0"
    place.mkdir(parents=True)
    (place / "model.safetensors").touch()
    with pytest.raises(UserError, match="holds a model and no training; give another --out"):
        finetune(there, tmp_path / "out")
    (place / "model.safetensors").unlink()
    place.rmdir()
    place.touch()
    with pytest.raises(UserError, match="is a file; give the path of a folder"):
        finetune(there, tmp_path / "out")


def test_a_dry_run_tells_the_plan_and_writes_nothing(
    there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(there, tmp_path / "out", dry_run=True) == []
    shown = capsys.readouterr().out
    assert "fresh: fc_norm, head; left out: norm" in shown
    assert "rand-m5-mstd0.5-inc1 (images below 96 pixels)" in shown
    assert not (tmp_path / "out").exists()


def test_a_model_of_native_crops_is_said_to_be_tuned_on_resized_ones(tmp_path: Path, capsys) -> None:
    """It was said to be shown windows "at their own resolution as in its training", which ``finetune`` never does."""
    make_run(tmp_path / "cells", image_size=16, model_args=TINY, crop="native")
    for number in range(20):
        noise = np.random.default_rng(number).integers(0, 255, (48, 48, 3), dtype=np.uint8)
        (tmp_path / f"data/{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(tmp_path / f"data/{number % 2}/{number}.png")
    words = {"data": str(tmp_path / "data"), "dry_run": True, **QUICK}
    freqmask.evaluate.finetune([str(tmp_path / "cells")], **words)
    said = capsys.readouterr().out
    assert "fine-tuned on crops brought to that size; --image_size 48 keeps" in said
    assert "at their own resolution" not in said
    freqmask.evaluate.finetune([str(tmp_path / "cells")], crop="native", **words)
    assert "at their own resolution" in capsys.readouterr().out


def test_images_that_no_model_can_be_shown_are_refused_before_any_other_is_trained(
    there: Path, tmp_path: Path
) -> None:
    bands = {"channels": 12, "mean": [0.5] * 12, "std": [0.5] * 12}
    make_run(tmp_path / "bands", image_size=16, model_args=TINY, **bands)
    models = [there / "mine", "bands"]
    sentence = r"model \(bands\) takes images of 12 channel\(s\), and those of DATA have 3"
    with pytest.raises(UserError, match=sentence):
        freqmask.evaluate.finetune(
            models, data=there / "two.npz", out=tmp_path / "out", dry_run=True, **QUICK
        )


def test_a_fine_tuned_vit_is_trained_on_with_a_fresh_last_normalization(
    tuned: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """``fc_norm`` behind the pooling has taken its place."""
    still = {"steps": 1, "lr": 1e-12, "min_lr": 0.0, "warmup_epochs": 0, "weight_decay": 0.0}
    options = {**QUICK, **still, "channels": 3, "image_size": 16, "init": str(tuned)}
    run = freqmask.pretrain("builtin:digits", out=tmp_path / "on", **options)
    assert "its last normalization begins anew" in capsys.readouterr().out
    on, before = (load_file(path / "model.safetensors") for path in (run / "backbone", tuned / "classifier"))
    name = "blocks.1.mlp.fc1.weight"
    torch.testing.assert_close(on[name], before[name], atol=1e-6, rtol=0)
    torch.testing.assert_close(on["norm.weight"], torch.ones(32), atol=1e-6, rtol=0)


def test_a_second_process_does_not_wait_for_a_dry_run_that_begins_nothing(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freqmask.training.run_folder.PATIENCE", -1.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert finetune(there, tmp_path / "out", dry_run=True) == []
    with pytest.raises(UserError, match="was not begun by process 0"):
        finetune(there, tmp_path / "out")


@pytest.mark.parametrize(("options", "count"), [({}, 40), ({"shots": "5"}, 10), ({"held_out": 0.2}, 32)])
def test_test_images_that_a_classifier_was_tuned_on_are_counted_from_every_folder(
    there: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    count: int,
) -> None:
    arrays = np.load(write_data(tmp_path / "two.npz"))
    other = {"train": "test", "test": "train"}
    crossed = {
        f"{other[split]}_{kind}": arrays[f"{split}_{kind}"]
        for split in other
        for kind in ("images", "labels")
    }
    np.savez(tmp_path / "crossed.npz", **crossed)
    finetune(there, tmp_path / "out", data="two.npz", seeds=[3], **options)
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    capsys.readouterr()
    shared = {"workers": 0, "accelerator": "cpu"}
    for data, seen in (("../two.npz", "0 of the 20"), ("../crossed.npz", f"{count} of the 40")):
        freqmask.evaluate.knn("../out/mine-seed3", data=data, k=[1], **shared)
        freqmask.evaluate.bands("../out/mine-seed3", data=data, head="own", radii=[4.0], **shared)
        told = f"mine-seed3: fine-tuned on {seen} test images (with their labels)"
        assert capsys.readouterr().out.count(told) == 2
    config = RunFolder("../out/mine-seed3").config()
    assert config["data"] == config["options"]["data"] == [str(tmp_path / "two.npz")]
    arrays = dict(np.load("../two.npz"))
    added = {
        name: np.concatenate([arrays[name], arrays[name][:1]]) for name in ("train_images", "train_labels")
    }
    np.savez("../two.npz", **{**arrays, **added})
    freqmask.evaluate.knn("../out/mine-seed3", data="../two.npz", k=[1], **shared)
    told = "are others now, or parted otherwise, than they were; 0 of the 20 test images are among these"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("config.yaml", "  seeds:\n  - 0\n", "  seeds: 0\n"),
        ("config.yaml", "held_out: 0.2", "held_out: null"),
        ("config.yaml", "options:\n", "options: null\nothers:\n"),
        ("config.yaml", "method:", "]method:"),
        ("run.json", "{", ""),
        ("run.json", '"data":', '"dates":'),
    ],
)
def test_a_record_that_tells_nothing_ends_no_evaluation(
    tuned: Path, tmp_path: Path, file: str, before: str, after: str
) -> None:
    run = tmp_path / "copy"
    shutil.copytree(tuned, run)
    text = (run / file).read_text()
    assert before in text
    (run / file).write_text(text.replace(before, after))
    seen = seen_in_training(run, open_source(tuned.parent.parent / "two.npz"), np.arange(3))
    assert seen == "copy: its record (config.yaml, run.json) does not tell which images it was trained on"


def test_statistics_of_the_features_are_put_into_the_head_at_the_end(there: Path) -> None:
    torch.manual_seed(0)
    model = make_classifier(open_model(there / "mine"), 3, 0.0, 0).model
    torch.nn.init.normal_(model.head.weight)
    head = copy.deepcopy(model.head)
    standardize_features(model)
    images = torch.rand(64, 3, 16, 16)
    for _ in range(200):  # until the running statistics are these images'
        logits = model.train()(images)
    features = model.forward_head(model.forward_features(images), pre_logits=True).detach()
    scaled = torch.from_numpy(StandardScaler().fit_transform(features.double().numpy())).float()
    np.testing.assert_allclose(logits.detach(), head(scaled).detach(), atol=2e-3)
    bare = without_head_norm(model.eval())
    assert isinstance(bare.head, torch.nn.Linear) and isinstance(model.head, torch.nn.Sequential)
    np.testing.assert_allclose(bare(images).detach(), model(images).detach(), atol=1e-4)
    unbiased = (len(images) - 1) / len(images)  # is the running variance, not that of a batch
    np.testing.assert_allclose(bare(images).detach(), head(scaled * unbiased**0.5).detach(), atol=5e-3)


@pytest.mark.parametrize(
    ("options", "standardized"),
    [
        ({"steps": 50, "batch_size": 16}, True),
        ({"steps": 49, "batch_size": 16}, False),
        ({"steps": 50, "batch_size": 14}, False),
        ({"steps": 50, "batch_size": 16, "accumulate": 2}, False),
        ({"steps": 50, "batch_size": 16, "recipe": "a3"}, False),
    ],
)
def test_small_vits_learn_on_standardized_features(
    there: Path,
    tmp_path: Path,
    options: dict[str, Any],
    standardized: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    finetune(there, tmp_path / "out", **options, dry_run=True)
    assert ("features standardized before the head" in capsys.readouterr().out) == standardized


def test_what_was_learned_on_standardized_features_is_a_classifier_of_timm_s_and_goes_on_exactly(
    there: Path, tmp_path: Path
) -> None:
    options = {
        "steps": 50,
        "batch_size": 16,
        "held_out": 0.2,
        "checkpoint_every_steps": 20,
        "keep_checkpoints": 9,
    }
    (summary,) = finetune(there, tmp_path / "whole", **options)
    run = RunFolder(tmp_path / "whole" / "mine-seed0")
    assert run.config()["head_norm"] and min(summary.accuracies) > 0.9
    state = load_safely(run.checkpoints / "last.ckpt")["state_dict"]
    tested = weights(run.path)
    scale = (state["model.head.0.running_var"] + 1e-5).rsqrt()
    assert torch.equal(tested["head.weight"], state["model.head.1.weight"] * scale)
    assert set(tested) == set(make_classifier(open_model(there / "mine"), 2, 0.0, 0).model.state_dict())
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    broken = RunFolder(tmp_path / "broken" / "mine-seed0")
    kept, *later = sorted(broken.checkpoints.glob("step-*.ckpt"))
    assert load_safely(kept)["global_step"] == 20
    for file in (*later, broken.checkpoints / "last.ckpt", broken.path / "summary.json"):
        file.unlink()
    shutil.rmtree(broken.path / "classifier")
    finetune(there, tmp_path / "broken", **options)
    assert_equal(run.path, broken.path)


@pytest.mark.parametrize("levels", ["m0", "m5", "m10", "m30-mmax30"])
@pytest.mark.parametrize("way", ["inc0", "inc1"])
def test_randaugment_changes_images_at_every_level(levels: str, way: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    change = _randaugment(f"rand-{levels}-{way}", 32, (0, 0, 0))
    level = min(int(levels[1:3].strip("-")), 30)
    for one in change.ops:
        one.prob = 1.0
        changed = np.array(one(Image.fromarray(pixels)))
        assert changed.shape == pixels.shape
        if one.name.startswith("Posterize"):
            kept = int(level * 0.4) if way == "inc0" else 4 - int(level * 0.4)  # bits
            assert (changed == pixels & (0xFF << (8 - min(max(kept, 0), 8)) & 0xFF)).all()


@pytest.mark.parametrize(("classes", "standardized"), [(2, False), (2, True), (3, False), (4, True)])
def test_the_head_of_few_images_begins_as_scikit_learn_s_logistic_regression(
    there: Path, tmp_path: Path, classes: int, standardized: bool
) -> None:
    """Three classes have images; of four the last has none."""
    labels = np.arange(60) % min(classes, 3)
    noise = np.random.default_rng(0).integers(0, 120, (60, 16, 16, 3))
    images = (noise + 60 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(tmp_path / "few.npz", images=images, labels=labels)
    finetune(there, tmp_path / "first", steps=1)
    tuning = dataclasses.replace(
        Tuning.read(RunFolder(tmp_path / "first" / "mine-seed0").config()), head_norm=standardized, ema=0.9
    )
    model = make_classifier(open_model(there / "mine"), classes, 0.0, 0).model
    module = FinetuneModule(model, tuning, classes)
    source = open_source(str(tmp_path / "few.npz"), split="all")
    begin_by_frozen_features(module, source)
    assert module.training
    module.eval()
    views = module.normalize(torch.from_numpy(images).permute(0, 3, 1, 2))
    with torch.no_grad():
        features = model.forward_head(model.forward_features(views), pre_logits=True).double().numpy()
        found = module.model(views).softmax(dim=1).numpy()
        average = module.average(views).softmax(dim=1).numpy()
    scaled = StandardScaler().fit_transform(features) / features.shape[1] ** 0.25
    theirs = LogisticRegression(max_iter=500).fit(scaled, labels).predict_proba(scaled)
    among = found[:, :3] / found[:, :3].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(among, theirs, atol=2e-2)
    np.testing.assert_array_equal(found, average)
    assert (found.argmax(axis=1) == labels).mean() > 0.9 and found[:, 3:].max(initial=0) < 0.5


@pytest.mark.parametrize("classes", [2, 3])
def test_a_head_that_says_yes_or_no_begins_as_scikit_learns_one_against_all(classes: int) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, 60)
    features = rng.normal(size=(60, 8)) * np.geomspace(0.1, 10, 8) + 3
    features[:, :3] += np.eye(3)[labels] * features[:, :3].std(axis=0)
    head = torch.nn.Linear(8, classes)
    begin_head(head, torch.from_numpy(features).float(), torch.from_numpy(labels), binary=True)
    with torch.no_grad():
        logits = head(torch.from_numpy(features).float()).numpy()
    scaled = StandardScaler().fit_transform(features) / features.shape[1] ** 0.25
    theirs = OneVsRestClassifier(LogisticRegression(max_iter=500)).fit(
        scaled, np.eye(classes, dtype=int)[labels]
    )
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), theirs.predict_proba(scaled), atol=1e-3)


def test_a_head_that_began_by_frozen_features_goes_on_exactly(there: Path, tmp_path: Path) -> None:
    finetune(there, tmp_path / "out", steps=4, checkpoint_every_steps=2, keep_checkpoints=9)
    run = RunFolder(tmp_path / "out" / "mine-seed0")
    assert run.config()["head_fitted"]
    shutil.copytree(tmp_path / "out", tmp_path / "broken")
    broken = RunFolder(tmp_path / "broken" / "mine-seed0")
    kept, *later = sorted(broken.checkpoints.glob("step-*.ckpt"))
    for file in (*later, broken.checkpoints / "last.ckpt", broken.path / "summary.json"):
        file.unlink()
    assert load_safely(kept)["global_step"] == 2
    finetune(there, tmp_path / "broken", steps=4, checkpoint_every_steps=2, keep_checkpoints=9)
    assert_equal(run.path, broken.path)


@pytest.mark.parametrize("odd", ["one class", "not finite"])
def test_a_head_that_nothing_can_be_fitted_to_stays_as_it_is(odd: str) -> None:
    head = torch.nn.Linear(4, 3)
    before = head.weight.clone()
    features, labels = torch.randn(8, 4), torch.arange(8) % 3
    begin_head(head, features * (np.nan if odd == "not finite" else 1), labels * (odd != "one class"))
    assert torch.equal(head.weight, before)


def test_a_frozen_pass_without_memory_is_a_sentence(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("freqmask.evaluation.finetune.begin_head", full)
    with pytest.raises(UserError, match="out of memory with 8 images at once"):
        finetune(there, tmp_path / "out", steps=1)


def cnn_run(folder: Path) -> Path:
    """A CNN whose batch norm has the statistics of quite other images than ours."""
    small = {"channels": [8, 8, 8, 8]}
    make_run(folder, image_size=32, backbone="resnet10t", patch_size=None, model_args=small)
    weights = folder / "backbone" / "model.safetensors"
    tensors = load_file(weights)
    for name in tensors:
        if name.endswith("running_var"):
            tensors[name] *= 0.01
    save_file(tensors, weights, {"format": "pt"})
    return folder


@pytest.mark.parametrize("way", ["frozen", "learning", "fresh weights"])
def test_the_first_steps_of_few_images_see_the_features_that_the_head_was_fitted_to(
    tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data, frozen = cnn_run(tmp_path / "mine"), stripes(tmp_path / "slanted.npz", True), way == "frozen"
    if way == "learning":
        monkeypatch.setattr("freqmask.evaluation.finetune_plan.NORM_FROZEN_BELOW", 8)
    model, options = (
        f"random:{run}" if way == "fresh weights" else str(run),
        {"steps": 3, "log_every_steps": 1},
    )
    freqmask.evaluate.finetune(model, data=data, out=str(tmp_path / "out"), **{**QUICK, **options})
    (tuned,) = (
        path for path in (tmp_path / "out").iterdir() if path.is_dir() and path.name.endswith("seed0")
    )
    config, before, after = (
        RunFolder(tuned).config(),
        load_file(run / "backbone" / "model.safetensors"),
        weights(tuned),
    )
    assert (config["norm_frozen"], config["head_fitted"]) == (frozen, way != "fresh weights")
    line = "batch norm keeps the statistics of its pre-training (fewer than 64 images at once)"
    assert (line in capsys.readouterr().out) is frozen
    statistics = [name for name in after if name.endswith(("running_mean", "running_var"))]
    assert statistics and all(torch.equal(before[name], after[name]) is frozen for name in statistics)
    assert any(not torch.equal(before[name], after[name]) for name in after if name.endswith("bn1.weight"))
    # 4.1 where its statistics were not those of a step
    assert float(rows(tuned / "metrics.csv")[0]["loss"]) < 2.5


def test_statistics_before_the_head_is_fitted_are_of_all_classes(there: Path, tmp_path: Path) -> None:
    """Folders lie class by class: a batch in their order would be of one."""
    labels = np.arange(128) // 64
    noise = np.random.default_rng(0).integers(0, 60, (128, 16, 16, 3))
    images = (noise + 150 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(tmp_path / "sorted.npz", images=images, labels=labels)
    finetune(there, tmp_path / "first", steps=1)
    tuning = Tuning.read(RunFolder(tmp_path / "first" / "mine-seed0").config())
    model = make_classifier(open_model("random:resnet10t", image_size=32), 2, 0.0, 0).model
    views = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (tuning.mean, tuning.std))
    with torch.no_grad():
        expected = model.conv1[0](torch.cat([(views - mean) / std])).var(dim=(0, 2, 3))
    frozen_features(model, tuning, open_source(str(tmp_path / "sorted.npz"), split="all"))
    torch.testing.assert_close(model.conv1[1].running_var, expected, rtol=0.1, atol=0)


def stripes(path: Path, mirrored: bool) -> str:
    """Slanted stripes: one class to the left and one to the right, or (``mirrored``) wide and narrow, half each way."""
    rng = np.random.default_rng(0)
    labels, (y, x) = np.arange(60) % 2, np.mgrid[:32, :32]
    ways, widths = (1 - 2 * labels, labels * 0 + 8) if mirrored else (rng.choice([1, -1], 60), 6 + 6 * labels)
    lines = zip(ways, widths, rng.integers(0, 12, 60), strict=True)
    images = np.stack([(x + way * y + offset) % width < width / 2 for way, width, offset in lines])
    noisy = (150 * images[..., None] + rng.integers(0, 60, (60, 32, 32, 3))).astype(np.uint8)
    arrays = {"train_images": noisy[:50], "train_labels": labels[:50]}
    np.savez(path, **arrays, test_images=noisy[50:], test_labels=labels[50:])
    return str(path)


def test_images_whose_mirror_image_is_of_another_class_are_not_mirrored(
    there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slanted, alike = stripes(tmp_path / "slanted.npz", True), stripes(tmp_path / "alike.npz", False)

    def views(data: str, **options: Any) -> str:
        options = {"model": "random:resnet10t", "image_size": 32, "dry_run": True, "steps": 42, **options}
        finetune(there, tmp_path / "out", data=data, **options)
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("views"))

    never = "never mirrored (by frozen features 100% of 50 images are right, mirrored 0%)"
    assert views(slanted).endswith(never)
    assert views(alike).endswith("mirrored half of the time")
    assert views(slanted, flip=True).endswith("mirrored half of the time")
    assert views(alike, flip=False).endswith("never mirrored")
    assert views(slanted, steps=2).endswith("mirrored half of the time"), "too little training to try it"
    two_heads = "random:deit_tiny_distilled_patch16_224"
    assert views(slanted, model=two_heads).endswith("mirrored half of the time"), "no one feature to ask"
    assert not (tmp_path / "out").exists()


def test_a_run_begun_when_mirroring_was_the_default_resumes(there: Path, tmp_path: Path) -> None:
    finetune(there, tmp_path / "out", flip=True)
    assert RunFolder(tmp_path / "out" / "mine-seed0").config()["flip"]
    finetune(there, tmp_path / "out")
    with pytest.raises(UserError, match="flip was True and is False now"):
        finetune(there, tmp_path / "out", flip=False)


def test_a_repeated_command_finds_the_folder_of_when_mirroring_was_the_default(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: list[Any] = []

    def folder(out: Path | None, name: str, words: dict[str, Any], *_: Any) -> Path:
        named.append(words["flip"])
        return Path("runs")

    monkeypatch.setattr("freqmask.evaluation.finetune.series_folder", folder)
    for options in ({}, {"flip": False}, {"flip": True}):
        freqmask.evaluate.finetune(
            str(there / "mine"), data=str(there / "two.npz"), **{**QUICK, **options, "dry_run": True}
        )
    assert named[:2] == [True, False] and named[2] not in (True, False)


def test_right_out_of_fold_is_scikit_learns_cross_validation() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 90)
    features = rng.normal(size=(90, 12)) * np.geomspace(0.01, 100, 12) + 2
    features[:, :3] += np.eye(3)[labels] * features[:, :3].std(axis=0) * 1.5
    others = features + rng.normal(size=features.shape) * features.std(axis=0)
    tensors = [torch.from_numpy(values) for values in (features, others, labels)]
    right, others_right = right_out_of_fold(*tensors)
    folds = PredefinedSplit(np.random.default_rng(0).permutation(90) % 5)
    # a mean squared length of 12 instead of the root of 12
    ridge = make_pipeline(StandardScaler(), RidgeClassifier(alpha=RIDGE * 12))
    np.testing.assert_array_equal(right, cross_val_predict(ridge, features, labels, cv=folds) == labels)
    for train, test in folds.split():
        predicted = ridge.fit(features[train], labels[train]).predict(others[test])
        np.testing.assert_array_equal(others_right[test], predicted == labels[test])
    assert 0.5 < right.mean() < 1 and others_right.mean() < right.mean()
    assert not right_out_of_fold(*tensors[:2], torch.zeros(90, dtype=torch.int64))[0].any()
