"""The linear probe: as good as scikit-learn's, heads that do not see each other, and a test part never seen."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from freqmask.data.splits import split_indices
from freqmask.evaluation import linear


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))  # they come writer by writer
    images, labels = images[order], labels[order]
    return torch.from_numpy(images.astype(np.float32)), torch.from_numpy(labels)


def test_accuracy_is_scikit_learn_s_within_half_a_point() -> None:
    images, labels = digits()
    train, test = slice(0, 900), slice(900, None)
    scaled = ((images - images[train].mean(0)) / images[train].std(0).clamp_min(1e-6)).numpy()
    answers = labels.numpy()
    differences, share = [], linear.held_out_share(900)
    for seed in (0, 1, 2):  # a few hundred images choose by luck as well
        _, sweep = linear.choose_and_fit(
            {"end/mean": images[train]}, labels[train], 10, weighted=False, seed=seed
        )["plain"]
        ours = float((sweep.predict({"end/mean": images[test]})[0] == labels[test]).double().mean())
        learnt, held = split_indices(answers[train], None, (1 - share, share), seed)
        models = [LogisticRegression(C=c).fit(scaled[learnt], answers[learnt]) for c in (0.01, 0.1, 1, 10)]
        best = max(models, key=lambda model: model.score(scaled[held], answers[held]))
        theirs = LogisticRegression(C=best.C).fit(scaled[train], answers[train])
        differences.append(ours - theirs.score(scaled[test], answers[test]))
    assert abs(np.mean(differences)) < 0.005, differences


def test_heads_do_not_influence_each_other() -> None:
    images, labels = digits()
    images, labels = {"end/mean": images[:200]}, labels[:200]
    heads = linear.sweep_of(list(images), weighted=True, rates=(0.01, 1.0))
    together = linear.Sweep(images, labels, 10, heads, epochs=1)
    for number, head in enumerate(heads):
        alone = linear.Sweep(images, labels, 10, [head], epochs=1)
        assert torch.allclose(together.weights.view(-1, 4, 10)[:, number], alone.weights, atol=1e-4)


def test_chunks_of_images_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = digits()
    sweep = linear.Sweep({"x": images}, labels, 10, linear.sweep_of(["x"], weighted=True), epochs=0.1)
    (whole, losses), firsts = sweep.evaluate({"x": images}, labels), sweep.logits({"x": images}).argmax(dim=1)
    assert (whole[0] == firsts.numpy()).all()
    monkeypatch.setattr(linear, "_CHUNK", 100 * 180)  # of 100 images, of each 18 heads of 10 classes
    parts, again = sweep.evaluate({"x": images}, labels)
    assert (parts == whole).all() and np.allclose(again, losses, rtol=1e-5)
    assert (sweep.predict({"x": images}).numpy() == whole).all()


def test_fewer_images_than_columns_end_at_the_same_heads_as_each_of_them_twice() -> None:
    images, labels = digits()
    few, twice = images[:50], images[:50].repeat(2, 1)  # of 64 columns: the latter go by their covariance
    assert len(twice) <= linear.BATCH  # so every step sees all images, and twice as many are the same mean
    heads = linear.sweep_of(["end/mean"], weighted=False, rates=(0.01, 1.0, 10.0))
    ours = linear.Sweep({"end/mean": few}, labels[:50], 10, heads, epochs=1)
    theirs = linear.Sweep({"end/mean": twice}, labels[:50].repeat(2), 10, heads, epochs=1)
    other = {"end/mean": images[100:300]}
    rows = ours.columns.like([other["end/mean"]]).rows(torch.arange(200))
    difference = rows @ (ours.weights - theirs.weights)
    assert difference.abs().max() < 1e-3 * (rows @ theirs.weights).abs().max()
    assert (ours.predict(other) == theirs.predict(other)).double().mean() > 0.99


def test_a_few_images_of_many_pixels_are_a_matter_of_a_moment() -> None:
    wide = torch.rand(40, 30_000, generator=torch.Generator().manual_seed(0))
    directions, _ = linear.Columns.of([wide]).principal()  # a covariance of them would take 7 GB
    assert directions.shape == (30_001, 40)  # 39 between 40 images, and that of the bias


def test_the_sweep_crosses_rates_features_and_places() -> None:
    names = ["end/mean", "end/token", "block2/mean", "block2/token"]
    heads = linear.sweep_of(names, weighted=True, rates=(0.1, 1.0))
    assert len(heads) == len(set(heads)) == 2 * 6 * 2
    assert {head.inputs for head in heads} >= {("end/mean", "end/token"), ("block2/token",)}


def test_class_weights_raise_the_recall_of_the_rare_class() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(600) % 20 == 0).long()
    images = torch.randn(600, 4, generator=generator) + 0.9 * labels[:, None]
    heads = [linear.Head(("x",), 1.0), linear.Head(("x",), 1.0, weighted=True)]
    answers = linear.Sweep({"x": images}, labels, 2, heads).predict({"x": images})
    plain, weighted = (float((answer[labels == 1] == 1).double().mean()) for answer in answers)
    assert weighted > plain + 0.1


def test_a_constant_feature_and_huge_units_do_no_harm() -> None:
    images, labels = digits()
    images, labels = images[:300], labels[:300]
    spoilt = torch.cat([images * 1e6, torch.full((300, 1), 7.0)], dim=1)
    heads = [linear.Head(("x",), 0.1)]
    plain = linear.Sweep({"x": images}, labels, 10, heads).predict({"x": images})
    assert (
        plain == linear.Sweep({"x": spoilt}, labels, 10, heads).predict({"x": spoilt})
    ).double().mean() > 0.99
