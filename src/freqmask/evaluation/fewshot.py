"""Few labels: logistic regression on frozen features, or all weights fine-tuned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from freqmask.console import counted, rank, say
from freqmask.errors import UserError
from freqmask.evaluation.features import ComputeConfig
from freqmask.evaluation.labelled import LabelledData, Round, parse_shots, shot_name
from freqmask.evaluation.linear import INVERSE_STRENGTH, fit_logistic_regression
from freqmask.evaluation.protocol import EvalConfig, EvalContext, Prediction, Protocol
from freqmask.evaluation.results import Result, ResultTable, Summary, summarize
from freqmask.interop.formats import PIXELS
from freqmask.options.of_evaluation import FineTuned, FineTuning

SHOTS = ("1", "5", "10", "1%", "10%")


def logistic_regression(
    train: Float[np.ndarray, "image dim"],
    labels: Int64[np.ndarray, " image"],
    test: Float[np.ndarray, "query dim"],
    unlabelled: Float[np.ndarray, "other dim"],
    strength: float = INVERSE_STRENGTH,
) -> Int64[np.ndarray, " query"]:
    """Classes of test images by L2-regularized multinomial logistic regression on a few training images.

    The mean and spread of ``unlabelled``, the features of all training images, standardize; their labels stay unseen.
    ``strength`` is C, the inverse of the regularization.
    """
    model, mean, scale = fit_logistic_regression(train, labels, unlabelled, strength)
    predicted: np.ndarray = model.predict((test - mean) * scale)
    return predicted.astype(np.int64)


@dataclass
class Fewshot(Protocol):
    """Logistic regression on few labels."""

    shots: Sequence[str] = SHOTS  # images a class, or shares in per cent
    feature: str = "mean"  # mean or class_token
    strength: float = INVERSE_STRENGTH  # scikit-learn's C

    title = "few labels, logistic regression on frozen features"

    def __post_init__(self) -> None:
        self.shots = parse_shots(self.shots)
        self.headline = shot_name("10" if "10" in self.shots else self.shots[-1])

    def open_data(self, config: EvalConfig) -> LabelledData:
        """The images; a shot that takes all of them is noted, since it differs from no larger one."""
        data: LabelledData = super().open_data(config)
        labels = data.labels[data.rounds[0].train]
        most = max(np.bincount(labels), default=0)
        for shot in self.shots:
            if not shot.endswith("%") and int(shot) > most:
                all_of = counted(len(labels), "training image")
                data.notes.append(f"No class has {shot} training images: {shot_name(shot)} is all {all_of}.")
        return data

    def predict(self, context: EvalContext, one: Round, seed: int) -> dict[str, Prediction]:
        """One prediction a number of labels; the draw is the same for every model."""
        values, labels = context.end(self.feature), context.data.labels
        train, test = values[one.train], values[one.test]
        predictions = {}
        for shot in self.shots:
            drawn = context.data.drawn(one.train, shot, seed)
            predicted = logistic_regression(values[drawn], labels[drawn], test, train, self.strength)
            predictions[shot_name(shot)] = Prediction(predicted, n_train=len(drawn))
        return predictions


EPOCHS = 50.0  # of the first two settings: the publication names the third one's only
# Learning rates as published, at any batch: scaled down to a handful of images they would move nothing.
SETTINGS: dict[str, dict[str, Any]] = {
    "lr 2e-3, warm-up": {"lr": 2e-3, "warmup_epochs": 5},
    "lr 2e-4": {"lr": 2e-4, "warmup_epochs": 0},
    "lr 2e-4, 100 epochs": {"lr": 2e-4, "warmup_epochs": 0, "epochs": 100.0},
}
FROZEN, AVERAGE, BEST = "frozen", "average", "best"


class TunedFewshot(Protocol):
    """Fine-tuning on few labels, with or without the frozen features beside it, by the options of ``fewshot``."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.shots = parse_shots(options["shots"] or SHOTS)
        of_frozen = {"strength": INVERSE_STRENGTH, "feature": "mean", "precision": "32", "cache": True}
        given = [name for name, value in of_frozen.items() if options[name] != value]
        if options["tune"] == "finetune" and given:
            raise UserError(
                f"{given[0]} ({options[given[0]]}) is of frozen features; leave it out, or give --tune both"
            )
        self.frozen = None
        if options["tune"] == "both":
            self.frozen = Fewshot(self.shots, options["feature"], options["strength"])
        # this imports Lightning, which frozen features need not
        from freqmask.evaluation.finetune import Finetune

        dropped = ("batch_size", "precision", "shots")
        kept = {name: value for name, value in options.items() if name not in dropped}
        epochs = EPOCHS if options["epochs"] is None else options["epochs"]
        usual = {**asdict(FineTuning()), **asdict(FineTuned()), "shots": None, "keep_checkpoints": 1}
        self.options = {**usual, **kept, "held_out": 0.0, "epochs": epochs}
        self.tuning = Finetune(self.options, self.frozen is not None)

    def compute_of(self, options: Mapping[str, Any]) -> ComputeConfig:
        return ComputeConfig.of(options)

    def open(self, config: EvalConfig) -> None:
        self.tuning.open(config)
        opened = {name: getattr(self.tuning, name) for name in ("config", "data", "survey", "names")}
        for other in filter(None, (self, self.frozen)):
            vars(other).update(opened)
        tuned = [text for text in config.models if text != PIXELS]
        if not tuned:
            raise UserError(
                "model (pixels) has no weights to be fine-tuned; add a model, or give --tune frozen"
            )
        count = len(tuned) * len(self.shots) * len(SETTINGS) * len(config.seeds) * len(self.data.rounds)
        say(f"{count} fine-tunings, each a run in {self.tuning.root}")

    def contexts(self, text: str) -> Iterator[tuple[Any, int]]:
        if self.frozen is not None and rank() == 0:
            yield from self.frozen.contexts(text)
        if text != PIXELS:
            yield from self.tuning.contexts(text)

    def evaluate(self, context: Any, seed: int) -> list[Result]:
        """Logistic regression on frozen features, or all labels and settings of fine-tuning."""
        if self.frozen is not None and isinstance(context, EvalContext):
            rows = self.frozen.evaluate(context, seed)
            return [replace(row, variant=f"{row.variant}, {FROZEN}") for row in rows]
        rows = []
        for shot in self.shots:
            for number, (name, setting) in enumerate(SETTINGS.items(), 1):
                options = {**self.options, **setting, "shots": shot}
                suffix = f"-{shot.replace('%', 'percent')}-{number}"
                rows += self.tuning.measure(context, options, seed, f"{shot_name(shot)}, {name}", suffix)
        return rows

    def tables(self, results: Sequence[Result]) -> dict[str, ResultTable]:
        """One for each number of labels, with the averages and the best of the settings."""
        tables = {}
        for words in map(shot_name, self.shots):
            here = [one for one in results if one.variant.startswith(f"{words}, ")]
            if here:
                settings = [f"{words}, {name}" for name in SETTINGS]
                table = ResultTable(f"few labels: {words}", AVERAGE, here, f"{words}, ", settings)
                table.summaries = summarize_settings(here, f"{words}, ")
                tables[words] = table
        return tables

    def shown(self, tables: Mapping[str, ResultTable]) -> list[list[str]]:
        blocks = [table.lines() for table in tables.values()]
        fair = f"({BEST}: the setting that is best on the test images, as published; {AVERAGE} is the fair number)"
        blocks[-1].append(fair)
        return blocks

    def draw(self, tables: Mapping[str, ResultTable], folder: Path) -> list[Path]:
        """A bar chart of the averages, and all classes."""
        title = f"few labels, fine-tuned: average of {len(SETTINGS)} settings"
        averages = [
            replace(one, variant=words)
            for words, table in tables.items()
            for one in table.summaries
            if one.variant == f"{words}, {AVERAGE}"
        ]
        results = [one for table in tables.values() for one in table.results]
        return self.draw_chart(folder / "fewshot-tuned", title, "accuracy", averages, results)


def summarize_settings(results: Sequence[Result], prefix: str) -> list[Summary]:
    """Summaries for one number of labels: every setting, then by model their average and the best one.

    The results are those of all models, settings and seeds; their variants are a prefix (``5 a class, ``) and the
    setting.
    """
    summaries, families = summarize(results), dict[str, list[Result]]()
    for result in results:
        if result.variant != prefix + FROZEN:
            families.setdefault(result.model.name, []).append(result)
    for name, family in families.items():
        if any(result.error for result in family):
            continue
        (mean,) = summarize([replace(result, variant=prefix + AVERAGE) for result in family])
        settings = [one for one in summaries if one.name == name and one.variant != prefix + FROZEN]
        summaries.append(replace(mean, values=np.mean([one.values for one in settings], axis=0).tolist()))
        summaries.append(replace(max(settings, key=lambda one: one.mean), variant=prefix + BEST))
    return summaries
