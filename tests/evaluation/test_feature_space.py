"""Features chosen by held-out training images: better neighbors, kept beside the weights, the same everywhere."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA
from tiny_runs import make_run

import freqmask
from freqmask.errors import UserError
from freqmask.evaluation import knn
from freqmask.interop import feature_space
from freqmask.interop.feature_space import FeatureSpace, load_space, save_space
from freqmask.interop.models import open_model


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def drowned(count: int = 400) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Classes in two faint directions, beside a common mean and three large directions of nuisance."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    faint = 0.1 * torch.nn.functional.one_hot(labels, 4) + 0.02 * torch.randn(count, 4, generator=generator)
    nuisance = torch.randn(count, 3, generator=generator)
    return {"end/mean": torch.cat([faint, nuisance], dim=1) + 50}, labels


def test_whitening_is_scikit_learn_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_space, "SHRINKAGE", 0.0)
    features, _ = drowned()
    rows = features["end/mean"].double().numpy()
    for images in (400, 5):  # by the covariance, and by the products of fewer images than numbers
        few = {"end/mean": features["end/mean"][:images]}
        ours = FeatureSpace.fit(few, ["end/mean"], "whitened").apply(few).double().numpy()
        theirs = PCA(whiten=True).fit(rows[:images]).transform(rows[:images])[:, : ours.shape[1]]
        products = [
            one @ one.T / (images - bias) for one, bias in ((ours, 0), (theirs, 1))
        ]  # free of signs and order
        assert np.allclose(
            products[0] * images / (images - 1), products[1] * images / (images - 1), atol=2e-2
        )


def test_held_out_training_images_choose_what_finds_classes() -> None:
    features, labels = drowned()
    train = {name: values[:300] for name, values in features.items()}
    plain = knn.predict(features["end/mean"][300:], train["end/mean"], labels[:300], 4, [20])[20]
    space, accuracy = knn.choose_space(train, labels[:300], 4)
    test = {name: values[300:] for name, values in features.items()}
    chosen = knn.predict(space.apply(test), space.apply(train), labels[:300], 4, [20])[20]
    assert space.kind == "whitened" and accuracy > 0.9
    assert (plain == labels[300:]).double().mean() < 0.6 < 0.9 < (chosen == labels[300:]).double().mean()


def test_features_that_need_nothing_stay_plain() -> None:
    labels = torch.arange(200) % 4
    features = {
        "end/mean": torch.eye(4)[labels]
        + 0.01 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    }
    assert knn.choose_space(features, labels, 4)[0].describe() == "end/mean, plain"


def test_candidates_are_parts_pairs_and_all_places() -> None:
    names = ["end/mean", "end/token", "block2/mean", "block2/token"]
    found = knn.candidates(names)
    assert found[:4] == [(name,) for name in names]
    assert {("end/mean", "end/token"), ("end/mean", "block2/mean"), ("end/token", "block2/token")} <= set(
        found
    )
    assert knn.candidates(["end/mean"]) == [("end/mean",)]


def data(tmp_path: Path) -> str:
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 60), ("test", 20)):
        labels = np.arange(count) % 2
        images = generator.integers(0, 200, (count, 32, 32, 3))
        images[labels == 1, ..., 0] += 20
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels}
    np.savez(tmp_path / "two.npz", **arrays)
    return str(tmp_path / "two.npz")


def test_a_kept_choice_is_what_embed_export_and_timm_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, images = make_run(tmp_path / "run"), data(tmp_path)
    opened = open_model(run.path)
    values = np.load(images)["train_images"]
    batch = opened.normalise(torch.from_numpy(values).permute(0, 3, 1, 2).float() / 255)
    with torch.inference_mode():
        plain = opened.backbone(batch).pooled
    save_space(FeatureSpace.fit({"end/mean": plain}, ["end/mean"], "whitened"), opened)

    file = freqmask.embed(str(run.path), images, split="train", workers=0)
    assert "features    end/mean, whitened, as kept with run" in capsys.readouterr().out
    table = pq.read_table(file)
    embedded = np.stack(table["features"].to_pylist())[np.argsort(table["index"].to_numpy())]
    freqmask.export(str(run.path), out="exported")
    for folder in (run.backbone, tmp_path / "exported"):
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
        space = load_file(folder / "features.safetensors")
        with torch.inference_mode():
            found = (model(batch) - space["mean"]) @ space["projection"]
        assert np.allclose(found.numpy(), embedded, atol=2e-3)
        assert load_space(open_model(folder)) is not None
    mean = freqmask.embed(str(run.path), images, split="train", workers=0, feature="mean", out="mean.npy")
    assert np.load(mean).shape[1] == plain.shape[1]


def test_a_choice_of_other_weights_is_not_taken_and_a_broken_one_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    opened = open_model(run.path)
    features = {"end/mean": torch.randn(20, 64, generator=torch.Generator().manual_seed(0))}
    save_space(FeatureSpace.fit(features, ["end/mean"], "centered"), opened)
    assert load_space(open_model(run.path)) is not None
    (run.backbone / "features.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"features\.safetensors.* cannot be read"):
        load_space(open_model(run.path))
    file = run.backbone / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert load_space(open_model(run.path)) is None
    with pytest.raises(UserError, match="has no folder"):
        save_space(FeatureSpace.fit(features, ["end/mean"], "plain"), open_model("random:test_vit"))


def test_knn_tells_with_and_without_and_keeps_the_choice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, images = make_run(tmp_path / "run"), data(tmp_path)
    options = {"data": images, "k": [5], "workers": 0, "out": "out"}
    found = freqmask.evaluate.knn(["pixels", str(run.path)], features="save", **options)
    assert [(one.name, one.variant) for one in found] == [
        (name, variant) for name in ("pixels", "run") for variant in ("k=5", "k=5, chosen")
    ]
    assert "freqmask embed gives these" in capsys.readouterr().out
    kept = json.loads((run.backbone / "config.json").read_text())["freqmask"]["features"]
    with (tmp_path / "out" / "results.csv").open() as file:
        row = [row for row in csv.DictReader(file) if row["model"] == "run"][-1]
    assert row["chosen"] == f"{' + '.join(kept['parts'])}, {kept['kind']}"
    plain = freqmask.evaluate.knn(str(run.path), **options)
    assert plain[0].values == found[2].values
    with pytest.raises(UserError, match=r"features \(save\) needs one training part"):
        freqmask.evaluate.knn("pixels", features="save", folds=3, **options)
