"""Claim: on the same features our k-NN answers as scikit-learn's does but for ties in similarity below 1e-6, and
our linear head is within 0.5 points of its logistic regression.

Method: features of one model (random weights will do) on one data set. scikit-learn's k-NN gets cosine distance and
the same votes; images whose k-th and (k+1)-th neighbours, or whose two best classes, are closer than 1e-6 count as
ties. Its logistic regression gets the same standardised features, C chosen on the same held-out images, and is
fitted again on all training images, as our head is.

    python benchmarks/frozen_reference.py [MODEL] [DATA] [IMAGE_SIZE]
"""

from __future__ import annotations

import csv
import platform
import sys
import time
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from freqmask.data.splits import split_indices
from freqmask.data.values import survey
from freqmask.evaluation import knn, linear
from freqmask.evaluation.eval_model import open_eval_model
from freqmask.evaluation.features import ComputeConfig
from freqmask.evaluation.labelled import open_labelled
from freqmask.evaluation.protocol import prepare_context

RESULTS = Path(__file__).parent / "results" / "frozen_reference.csv"
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
TIE = 1e-6


def main(model: str = "random:vit_tiny_patch16_224", data: str = "builtin:digits", size: str = "32") -> None:
    labelled = open_labelled(data)
    subject = open_eval_model(model, survey(labelled.source), image_size=int(size))
    bench = prepare_context(subject, labelled, ComputeConfig())
    one, values = bench.data.rounds[0], bench.end("mean")
    train, test = values[one.train], values[one.test]
    answers, truth = labelled.labels[one.train], labelled.labels[one.test]
    rows = [compare_knn(k, train, answers, test, truth, bench.classes) for k in (10, 20, 100, 200)]
    rows += [compare_linear(train, answers, test, truth, bench.classes, seed) for seed in (0, 1, 2)]
    write([{"model": model, "data": Path(data).name, **row} for row in rows])


def compare_knn(
    k: int, train: np.ndarray, answers: np.ndarray, test: np.ndarray, truth: np.ndarray, classes: int
) -> dict[str, object]:
    began = time.perf_counter()
    ours = knn.predict(
        torch.from_numpy(test.copy()), torch.from_numpy(train.copy()), torch.from_numpy(answers), classes, [k]
    )[k].numpy()
    middle = time.perf_counter()
    votes = KNeighborsClassifier(
        k, metric="cosine", weights=lambda d: np.exp(-d / knn.TEMPERATURE), algorithm="brute"
    )
    theirs = votes.fit(train, answers).predict(test)
    ended = time.perf_counter()
    return {
        "what": f"k-NN, k = {k}",
        "ours": f"{(ours == truth).mean():.4f}",
        "scikit-learn": f"{(theirs == truth).mean():.4f}",
        "differ": int((ours != theirs).sum()),
        "differ_without_ties": int(((ours != theirs) & ~tied(votes, k, train, test)).sum()),
        "of": len(test),
        "our_seconds": f"{middle - began:.2f}",
        "their_seconds": f"{ended - middle:.2f}",
    }


def tied(votes: KNeighborsClassifier, k: int, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Where the last neighbour or the best class is not decided by more than rounding."""
    distances = NearestNeighbors(n_neighbors=k + 1, metric="cosine").fit(train).kneighbors(test)[0]
    best = np.sort(votes.predict_proba(test), axis=1)
    return (distances[:, k] - distances[:, k - 1] < TIE) | (best[:, -1] - best[:, -2] < TIE)


def compare_linear(
    train: np.ndarray, answers: np.ndarray, test: np.ndarray, truth: np.ndarray, classes: int, seed: int
) -> dict[str, object]:
    began = time.perf_counter()
    features = {"end/mean": torch.from_numpy(train.copy())}
    head, sweep = linear.choose_and_fit(
        features, torch.from_numpy(answers), classes, seed=seed, weighted=False
    )["plain"]
    ours = sweep.predict({"end/mean": torch.from_numpy(test.copy())})[0].numpy()
    middle = time.perf_counter()
    theirs = logistic_regression(train, answers, test, seed)
    ended = time.perf_counter()
    return {
        "what": f"linear, seed {seed} ({head.describe()})",
        "ours": f"{(ours == truth).mean():.4f}",
        "scikit-learn": f"{(theirs == truth).mean():.4f}",
        "differ": int((ours != theirs).sum()),
        "differ_without_ties": "",
        "of": len(test),
        "our_seconds": f"{middle - began:.2f}",
        "their_seconds": f"{ended - middle:.2f}",
    }


def logistic_regression(train: np.ndarray, answers: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    share = linear.held_out_share(len(train))
    learnt, held = split_indices(answers, None, (1 - share, share), seed)
    mean, spread = train.mean(axis=0), np.maximum(train.std(axis=0), 1e-6)
    train, test = (train - mean) / spread, (test - mean) / spread

    def fitted(strength: float, images: np.ndarray) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=1000).fit(train[images], answers[images])

    best = max(STRENGTHS, key=lambda strength: fitted(strength, learnt).score(train[held], answers[held]))
    return fitted(best, np.arange(len(train))).predict(test)


def write(rows: list[dict[str, object]]) -> None:
    about = {
        "scikit_learn": sklearn.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    known = list(csv.DictReader(RESULTS.open(encoding="utf-8"))) if RESULTS.is_file() else []
    kept = [row for row in known if (row["model"], row["data"]) != (rows[0]["model"], rows[0]["data"])]
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [*rows[0], *about])
        table.writeheader()
        table.writerows([*kept, *({**row, **about} for row in rows)])
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
