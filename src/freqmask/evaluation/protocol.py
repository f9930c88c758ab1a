"""The contract of every evaluation, and how one is carried out: open, measure every model, report, add rows.

A protocol of yours is a file beside this one and a command of its name in ``freqmask.commands.evaluate``.
"""

from __future__ import annotations

import time
from abc import ABC
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from jaxtyping import Int64
from torch import Tensor

from freqmask import __version__
from freqmask.console import MOST_PATHS, rank, say, say_left_out
from freqmask.data.source import Subset
from freqmask.data.sources import REMOTE
from freqmask.data.values import Survey, survey
from freqmask.errors import UserError
from freqmask.evaluation.eval_model import (
    ClassifierModel,
    EvalModel,
    check_shown,
    open_eval_model,
    seen_in_training,
    what_differs,
)
from freqmask.evaluation.features import ComputeConfig, FeatureTable, ImageChange, compute_features
from freqmask.evaluation.labelled import LabelledData, Round, SplitConfig, identical_notes, open_labelled
from freqmask.evaluation.results import (
    ClassificationResult,
    Result,
    ResultTable,
    Summary,
    draw_bar_chart,
    write_class_scores,
)
from freqmask.options import command_words, group_among
from freqmask.options.of_evaluation import Windows
from freqmask.training.files import (
    append_row,
    check_writable,
    end_last_row,
    lockless,
    read_rows,
    write_rows,
    writing,
)
from freqmask.training.run_folder import RESULTS, now

_PATIENCE = 60.0  # seconds until a lock on it that nobody gives free is passed over
# Columns that say, with those of the model, what was measured: a row of the same replaces it.
_IDENTITY = {
    *("protocol", "model", "variant", "seed", "data", "split", "data_fingerprint"),
    *("command", "freqmask", "torch"),
}
Predict = Callable[[dict[str, np.ndarray]], np.ndarray]  # features of images by name -> their classes
LONG = 5.0  # seconds after which silence seems a standstill
QUICKLY_READ = 500e6  # pixels: half a minute at most, for a note alone


@dataclass
class EvalConfig:
    """What all protocols share, as the commands' options give it."""

    models: Sequence[str]  # MODEL as typed, each once
    data: Any
    split: SplitConfig = field(default_factory=SplitConfig)
    seeds: Sequence[int] = (0,)  # of heads, draws and fresh weights
    windows: Windows = field(default_factory=Windows)  # what the networks see
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    out: Path | None = None  # folder of the results
    options: Mapping[str, Any] = field(default_factory=dict)  # those of the command, to repeat it

    def __post_init__(self) -> None:
        self.models = list(dict.fromkeys(map(str, self.models)))
        if not self.models:
            raise UserError(
                "MODEL is missing; try pixels, random:vit_tiny_patch16_224 and a run folder together"
            )


@dataclass
class EvalContext:
    """A model and the images it is measured on; features are computed when they are first asked for."""

    model: EvalModel  # on the device of ``compute``
    data: LabelledData
    compute: ComputeConfig
    _tables: dict[str, FeatureTable] = field(default_factory=dict)

    def table(self, what: str) -> FeatureTable:
        """Features of all images: of the ``end``, or of the ``blocks`` inside."""
        if what not in self._tables:
            self._tables[what] = compute_features(self.model, self.data.source, what, self.compute)
        return self._tables[what]

    def end(self, feature: str) -> np.ndarray:
        """The last features (image, dim): ``mean``, or ``class_token`` where the model has one."""
        values = self.table("end").values
        token = feature == "class_token" and "end/token" in values
        return values["end/token" if token else "end/mean"]

    def inside(self) -> dict[str, np.ndarray]:
        """All features by name, of the end and of the blocks inside."""
        blocks = self.table("blocks").values if self.model.blocks else {}
        return {**self.table("end").values, **blocks}

    def predicted(
        self, heads: Sequence[Predict], change: ImageChange | None = None, quiet: bool = False
    ) -> np.ndarray:
        """What the head of each round predicts of its test images, after something was done to them."""
        tested = self.data.tested
        if change is None:
            values = {name: rows[tested] for name, rows in self.table("end").values.items()}
        else:
            images = Subset(self.data.source, tested)
            values = compute_features(self.model, images, "end", self.compute, change, quiet).values
        ends = np.cumsum([len(one.test) for one in self.data.rounds])[:-1]
        parts = np.split(np.arange(len(tested)), ends)
        rounds = zip(heads, parts, strict=True)
        return np.concatenate(
            [head({name: rows[part] for name, rows in values.items()}) for head, part in rounds]
        )

    def tensor(self, values: np.ndarray, images: np.ndarray | None = None) -> Tensor:
        """Rows of an array, or all of it, on the device."""
        rows = values if images is None else values[images]
        return torch.from_numpy(np.ascontiguousarray(rows)).to(self.compute.device)

    def tensors(
        self, values: Mapping[str, np.ndarray], images: np.ndarray | None = None
    ) -> dict[str, Tensor]:
        """The same of several arrays by name."""
        return {name: self.tensor(rows, images) for name, rows in values.items()}

    def labels(self, images: np.ndarray) -> Tensor:
        """The classes of some images on the device."""
        return self.tensor(self.data.labels, images)

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(self.data.class_names)

    def result(self, variant: str, seed: int, predicted: np.ndarray, **metadata: Any) -> ClassificationResult:
        """Predictions of all test images as a row."""
        return ClassificationResult(
            self.model, self.data, variant, seed, self.data.tested, predicted, metadata=metadata
        )

    def failed(self, variant: str, seed: int, error: str) -> ClassificationResult:
        """A row without a number, and why."""
        say(f"warning: {self.model.name}: {error}")
        return ClassificationResult(self.model, self.data, variant, seed, self.data.tested, error=error)


@dataclass
class Prediction:
    """The predictions of one head for the test images of a round."""

    predicted: Int64[np.ndarray, " test"]  # class of each test image
    chosen: str = ""  # what was chosen on a held-out part of the training images
    n_train: int = 0  # training images of the head


class Protocol(ABC):
    """A way to evaluate models: its fields are its own options, `evaluate` its rows.

    A protocol on frozen features gives `predict`, once a round; another one its own `evaluate`.
    """

    name: str = ""  # of the command, which gives it
    title: str  # above its table
    headline: str  # the variant whose interval and further scores the table shows
    seeds: Sequence[int] = (0, 1, 2)  # where none are given
    seeded: bool = True  # whether its result depends on the seed, the model being the same
    blocks: bool = False  # whether it reads the blocks inside, too
    own_heads: bool = False  # whether each MODEL is measured with its own classifier, and nothing is trained
    all_classes: bool = False  # whether the table of classes holds every variant, not the headline alone
    config: EvalConfig  # what was asked for, once it is opened
    data: Any  # the images and what is known of them: LabelledData, SegmentationData
    survey: Survey  # what the images are like
    # MODEL -> what tables and figures call it: ``a/run`` and ``b/run`` as they were typed
    names: Mapping[str, str]
    # models with a classifier of their own, by model and classes
    classifiers: dict[tuple[str, tuple[str, ...], bool], ClassifierModel]

    def config_of(self, options: Mapping[str, Any]) -> EvalConfig:
        """What the protocol shares with every other, by the options of its command."""
        data, out = options["data"], options["out"]
        return EvalConfig(
            models=options["model"],
            data=[] if data is None else list(data) if isinstance(data, (list, tuple)) else [data],
            split=group_among(SplitConfig, options),
            seeds=options["seeds"] or self.seeds,
            windows=group_among(Windows, options),
            compute=self.compute_of(options),
            out=None if out is None else Path(out),
            options=options,
        )

    def compute_of(self, options: Mapping[str, Any]) -> ComputeConfig:
        """Where features are computed: on all of --devices."""
        return ComputeConfig.of(options, "evaluate")

    def open(self, config: EvalConfig) -> None:
        """Models, data and the folder of the results, each tried once: a mistake shows before hours of work.

        Raises:
            UserError: whatever is wrong with models, data, seeds or the protocol's own options.
        """
        if not config.seeds or len(set(config.seeds)) < len(config.seeds):
            raise UserError(
                f"seeds ({list(config.seeds)}) must be one or several different numbers; try 0 1 2"
            )
        if config.out is not None:
            check_results(config.out)
        self.config, self.classifiers, self.data = config, {}, self.open_data(config)
        self.survey = survey(self.data.source)
        differences, names = dict[str, None](), dict[str, str]()
        for text in config.models:
            model = self.open_model(text, config.seeds[0])
            check_shown(model, self.survey)
            self.check_model(model)
            names[text] = model.name
            check_results(config.out or model.results or Path())
            differences |= dict.fromkeys(self.what_differs(model))
            if model.run is not None and (config.data or not self.own_heads):
                say(seen_in_training(model.run, self.data.source, self.data.tested))
        counts = Counter(names.values())
        self.names = {text: name if counts[name] == 1 else text for text, name in names.items()}
        say(self.data.describe())
        quick = len(self.data.source) * self.survey.mean_pixels < QUICKLY_READ and rank() == 0
        near = not any(REMOTE.match(str(one)) for one in config.data)
        identical = identical_notes(self.data.source, self.data.rounds) if quick and near else []
        for note in [*self.data.notes, *identical, *differences]:
            say(f"note: {note}")

    def open_data(self, config: EvalConfig) -> Any:
        """The images."""
        # a classifier of its own needs no training images
        split = replace(config.split, train=not self.own_heads)
        return open_labelled(config.data, split)

    def open_model(self, text: str, seed: int) -> Any:
        """One MODEL as the config wants it."""
        if self.own_heads:
            return self.classifier(text, self.data)
        return open_eval_model(text, self.survey, seed=seed, **vars(self.config.windows))

    def named(self, text: str, seed: int) -> Any:
        """The same under the name that tells it from the others."""
        model = self.open_model(text, seed)
        model.name = self.names[text]
        return model

    def classifier(self, text: str, data: LabelledData, cut: bool = False) -> ClassifierModel:
        """A model with its own classifier, predicting the classes of images; those that are ``cut`` it sees whole."""
        key = (text, tuple(data.class_names), cut)
        if key not in self.classifiers:
            model = ClassifierModel(text, data.class_names, self.config.windows.crop)
            model.crop_share = 1.0 if cut else model.crop_share
            self.classifiers[key] = model
        return self.classifiers[key]

    def check_model(self, model: Any) -> None:  # noqa: B027 - most protocols take any
        """Raises a UserError where the protocol's own options do not fit a model."""

    def what_differs(self, model: EvalModel) -> list[str]:
        """Sentences on what of the images a model is not shown."""
        return what_differs(model, self.survey)

    def contexts(self, text: str) -> Any:
        """(context, seed) of each measurement of a model; seeds that nothing depends on are left out."""
        model = None
        for seed in self.config.seeds:
            if model is None or model.kind == "random":
                model = self.named(text, seed)
                context = self.context_of(model)
            yield context, seed
            if not self.seeded and model.kind != "random":
                return

    def context_of(self, model: Any) -> Any:
        """What a model is measured by."""
        return prepare_context(model, self.data, self.config.compute)

    def evaluate(self, context: Any, seed: int) -> list[Result]:
        """The rows of one model and seed: one a variant, put together from all rounds."""
        tables = [context.table("end")]
        if self.blocks and context.model.blocks:
            tables.append(context.table("blocks"))
        if error := next((table.error for table in tables if table.error), ""):
            return [context.failed(self.headline, seed, error)]
        began = time.monotonic()
        by_variant: dict[str, list[Prediction]] = {}
        for one in context.data.rounds:
            for variant, prediction in self.predict(context, one, seed).items():
                by_variant.setdefault(variant, []).append(prediction)
        if (seconds := time.monotonic() - began) > LONG:
            say(f"measured    {context.model.name}: seed {seed} in {seconds:.0f} s")
        return [
            context.result(
                variant, seed, np.concatenate([one.predicted for one in parts]), **metadata_of(parts)
            )
            for variant, parts in by_variant.items()
            if len(parts) == len(context.data.rounds)
        ]

    def predict(self, context: EvalContext, one: Round, seed: int) -> dict[str, Prediction]:
        """Train on the round's training images and predict its test images, once a variant."""
        raise NotImplementedError

    def report(self, results: Sequence[Result]) -> list[Summary]:
        """The tables, the rows, the figures."""
        tables, out = self.tables(results), self.config.out
        # rows go to ``out``, else to the run of each model, else here
        rows: dict[Path, list[dict[str, str]]] = {}
        for result in [result for table in tables.values() for result in table.results]:
            file = (out or result.model.results or Path()) / RESULTS
            rows.setdefault(file, []).append(row_of(result, self.name, self.config.options))
        try:  # first of all, since whoever reads our output may leave (`| head`), and a figure may fail
            for file, members in rows.items():
                add_rows(file, members)
        finally:  # where rows cannot be written, the table is all that there is
            warnings = [line for table in tables.values() for line in table.warnings()]
            for block in filter(None, [*self.shown(tables), warnings]):
                for line in ["", *block]:
                    say(line)
        # figures go to ``out``, else to the first run that was measured, else here
        folder = out or next((one.model.results for one in results if one.model.results), None) or Path()
        figures = self.draw(tables, folder)
        say()
        say(f"results     {', '.join(map(str, rows))}")
        say(f"figures     {', '.join(map(str, figures))}")
        return [summary for table in tables.values() for summary in table.summaries]

    def tables(self, results: Sequence[Result]) -> dict[str, ResultTable]:
        """The results by group: one table for most protocols."""
        return {"": ResultTable(self.title, self.headline, results)}

    def shown(self, tables: Mapping[str, ResultTable]) -> list[list[str]]:
        """What is printed, blocks of lines."""
        return [block for table in tables.values() for block in (table.lines(), table.class_lines())]

    def draw(self, tables: Mapping[str, ResultTable], folder: Path) -> list[Path]:
        """Draw the figures and write the table of classes; their files."""
        (table,) = tables.values()
        measured = [one for one in table.summaries if not one.error]
        results = [one for one in table.results if self.all_classes or one.variant == self.headline]
        return self.draw_chart(folder / self.name, table.title, table.metric, measured, results)

    def draw_chart(
        self, stem: Path, title: str, metric: str, summaries: Sequence[Summary], results: Sequence[Result]
    ) -> list[Path]:
        """Bars of the summaries where there are any (``stem.png``) and the classes of the results; their files."""
        chart, classes = Path(f"{stem}.png"), Path(f"{stem}-classes.csv")
        if summaries:
            draw_bar_chart(chart, f"{title}\n{self.data.name}", f"{metric} in %", summaries)
        write_class_scores(classes, results)
        return [chart, classes] if summaries else [classes]


def run_protocol(protocol: Protocol, options: Mapping[str, Any]) -> list[Summary]:
    """Measure all models by a protocol and the options of its command: one table, rows in results.csv, figures.

    Returns:
        One summary a model and variant; none after a dry run, and none from processes that only help to train.

    Raises:
        UserError: a model or the data cannot be opened; nothing has been written then.
    """
    config = protocol.config_of(options)
    protocol.open(config)
    results: list[Result] = []
    with closing(config.compute):
        for text in config.models:
            for context, seed in protocol.contexts(text):
                results += protocol.evaluate(context, seed)
    return protocol.report(results) if results and rank() == 0 else []


def prepare_context(model: EvalModel, data: LabelledData, compute: ComputeConfig) -> EvalContext:
    """A model on its device, the images that it cannot read taken out."""
    images = data.rounds[0].train if len(data.rounds[0].train) else data.tested
    model.prepare(Subset(data.source, images), compute.device)
    context = EvalContext(model, data, compute)
    table = context.table("end")
    say_left_out(table.skipped)
    context.data = data.without(set(np.flatnonzero(~table.read).tolist()))
    return context


def metadata_of(predictions: Sequence[Any]) -> dict[str, Any]:
    """Cells on how predictions (or heads) of all rounds came about."""
    chosen = list(dict.fromkeys(one.chosen for one in predictions if one.chosen))
    return {
        "train_images": " ".join(str(one.n_train) for one in predictions),
        "chosen": "; ".join(chosen),
    }


def row_of(result: Result, protocol: str, options: Mapping[str, Any]) -> dict[str, str]:
    """A row of results.csv: when, who, how good, on what, and all that repeats it by the options that were given."""
    scores: dict[str, Any] = {result.METRIC: "", "error": result.error}
    if not result.error:
        low, high = result.own_interval
        scores = {**vars(result.scores()), f"{result.METRIC}_low": low, f"{result.METRIC}_high": high}
    row = {
        "time": now(),
        "protocol": protocol,
        "model": result.model.name,
        "variant": result.variant,
        "seed": result.seed,
        **scores,
        "data": result.data.name,
        "split": result.data.split,
        "classes": len(result.class_names),
        "test_images": len(np.unique(result.images)),
        **result.metadata,
        **{
            f"model_{name}": " ".join(f"{x:g}" for x in value) if isinstance(value, list) else value
            for name, value in result.model.key().items()
        },
        "data_fingerprint": result.data.source.fingerprint(),
        "command": command_of(protocol, result.model.text, options),
        "freqmask": __version__,
        "torch": torch.__version__,
    }
    return {name: f"{cell:.7g}" if isinstance(cell, float) else str(cell) for name, cell in row.items()}


def add_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Append rows; those of the same measurements, which a command that was repeated left before, make room.

    Rows of other weights, images, options, seeds or versions stay: they are the history.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = {_measurement(row) for row in rows}
    # another process may write to the same table: its rows must not come between reading and writing
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=_PATIENCE, mode=0o666)
    with writing(path), ExitStack() as held:
        # on a file system without locks, or behind one that is stuck: better a row at risk than none
        with suppress(Timeout), lockless():
            held.enter_context(lock)
        end_last_row(path)
        known = read_rows(path)
        others = [row for row in known if _measurement(row) not in measured]
        if len(others) < len(known):
            header = list(dict.fromkeys(name for row in (*known, *rows) for name in row if name))
            write_rows(path, header, [*others, *rows])
            return
        for row in rows:
            append_row(path, row)


def _measurement(row: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    """What was measured, and how, whatever came out."""
    return frozenset(
        (name, cell)
        for name, cell in row.items()
        if cell and name and (name in _IDENTITY or name.startswith("model_"))
    )


def command_of(protocol: str, model: str, options: Mapping[str, Any]) -> str:
    """The command that measures this model again."""
    dropped = ("model", "out", "dry_run")
    given = {name: value for name, value in options.items() if value is not None and name not in dropped}
    if isinstance(given.get("data"), (list, tuple)) and len(given["data"]) > MOST_PATHS:
        given["data"] = "DATA"  # of thousands the table could not be read any more
    return f"freqmask evaluate {protocol} {command_words({'model': [model], **given}, first='model')}"


def check_results(folder: Path) -> None:
    """Raises a UserError for a folder whose table cannot be written; asked before hours of measuring."""
    check_writable(folder, folder=True)
    table = folder / RESULTS
    check_writable(table, "results")
    rows = read_rows(table)  # a damaged one would refuse the rows after all measuring
    if rows and not {"protocol", "model"} <= set(rows[0]):
        names = ", ".join(map(str, rows[0]))[:80]
        raise UserError(
            f"results ({table}) is no table of ours, separated by commas, with columns protocol and model (it has "
            f"{names}); move it away, or give another --out"
        )
