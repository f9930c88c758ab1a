"""k-NN against scikit-learn, and its chunks against each other."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from freqmask.errors import UserError
from freqmask.evaluation import knn, linear


def features(count: int, dim: int = 12) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(count).standard_normal((count, dim)).astype(np.float32))


@pytest.mark.parametrize("k", [1, 5, 20])
def test_answers_are_scikit_learn_s(k: int) -> None:
    bank, queries = features(150), features(60)
    labels = torch.arange(150) % 4
    ours = knn.predict(queries, bank, labels, 4, [k])[k]
    theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp(-d / 0.07), algorithm="brute")
    assert (theirs.fit(bank.numpy(), labels.numpy()).predict(queries.numpy()) == ours.numpy()).all()


def test_chunks_change_nothing() -> None:
    bank, queries, labels = features(97), features(23), torch.arange(97) % 5
    whole = knn.predict(queries, bank, labels, 5, [3, 10])
    for chunk in [(7, 13), (1, 97), (23, 4)]:
        parts = knn.predict(queries, bank, labels, 5, [3, 10], chunk=chunk)
        assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_the_length_of_features_does_not_matter() -> None:
    bank, queries, labels = features(40), features(9), torch.arange(40) % 3
    plain = knn.predict(queries, bank, labels, 3, [5])[5]
    assert torch.equal(plain, knn.predict(1000 * queries, 0.01 * bank, labels, 3, [5])[5])


def test_k_above_the_bank_is_refused_and_left_out() -> None:
    with pytest.raises(UserError, match="must be from 1 to the 4 images"):
        knn.predict(features(2), features(4), torch.zeros(4, dtype=torch.int64), 1, [5])
    assert knn.usable([10, 20, 100], 30) == [10, 20]
    assert knn.usable([10], 4) == [4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_answer_of_knn_nor_of_a_linear_head(dtype: torch.dtype) -> None:
    bank, queries = (
        features(150) + 5,
        features(60) + 5,
    )  # a common mean: similarities differ in the third digit
    labels = torch.arange(150) % 4
    heads = [linear.Head(("x",), 0.3)]

    def answers() -> list[torch.Tensor]:
        sweep = linear.Sweep({"x": bank}, labels, 4, heads, epochs=1)
        judged, losses = sweep.evaluate({"x": queries}, labels[:60])
        similarity, places = knn.nearest(queries, bank, 5)
        found = [knn.predict(queries, bank, labels, 4, [20])[20], sweep.predict({"x": queries})]
        return [
            *found,
            sweep.logits({"x": queries}),
            torch.from_numpy(judged),
            torch.tensor(losses),
            similarity,
            places,
        ]

    plain = answers()
    with torch.autocast("cpu", dtype):
        assert (queries @ bank.T).dtype == dtype
        inside = answers()
    assert all(torch.equal(one, other) for one, other in zip(plain, inside, strict=True))
