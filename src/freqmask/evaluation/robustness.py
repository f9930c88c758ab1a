"""Robustness: accuracy on images that are corrupted, attacked, or test sets of others (ImageNet-C, -A, -R, -Sketch)."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from freqmask.console import aligned, say, shortened
from freqmask.data.source import Subset, spread
from freqmask.data.sources import open_source
from freqmask.errors import UserError
from freqmask.evaluation.bands_and_attacks import Attack, attack_images
from freqmask.evaluation.corruptions import (
    COMMON,
    CORRUPTIONS,
    FAMILIES,
    SEVERITIES,
    Corruption,
    Points,
    check_frost,
    draw_sheet,
    mce_applies,
    mean_corruption_error,
    strengths_for,
)
from freqmask.evaluation.features import compute_features, shared_objects
from freqmask.evaluation.labelled import LabelledData, Round
from freqmask.evaluation.linear import ClassifierHead, fit_head
from freqmask.evaluation.protocol import EvalConfig, EvalContext, Predict, Protocol, metadata_of
from freqmask.evaluation.results import ClassificationResult, Result, ResultTable, Summary, draw_bars
from freqmask.training.files import save_figure

COLUMNS = CLEAN, CORRUPTED, IMAGENET_C = "clean", "corrupted", "imagenet-c"
DATA, TREE = "data", "tree"  # groups of results; any other is the name of a test set
_COLUMNS = 4  # panels side by side: 15 or 19 corruptions and the bars fill the sheet
_ATTACKED_AT_ONCE = 64  # images; gradients need several times the memory of features

Tables = Mapping[str, ResultTable]


@dataclass(frozen=True)
class TestFolder:
    """One folder of classes that is tested on."""

    __test__ = False  # for pytest

    name: str  # for tables: that of the folder, or the corruption and its severity
    folder: Path  # classes lie in it
    corruption: tuple[str, int] | None = None  # which, and in what severity; None for a natural test set


def find_folders(folder: Path, corruptions: Sequence[str], severities: Sequence[int]) -> list[TestFolder]:
    """What a folder holds.

    ImageNet-C's layout is CORRUPTION/SEVERITY/CLASS/image, where the corruptions may lie in folders of their
    families (noise, blur, weather, digital, extra), as the archives unpack. Anything else is one set of class
    folders.

    Raises:
        UserError: there is no such folder, or what is wanted is not in it.
    """
    if not folder.is_dir():
        raise UserError(
            f"folder ({folder}) must be a folder: of ImageNet-C, or of classes as ImageNet-A, -R, -Sketch"
        )
    parents = [folder, *(folder / family for family in FAMILIES)]
    by_name = {
        name: parent / name
        for name in CORRUPTIONS
        for parent in parents
        if any((parent / name / str(severity)).is_dir() for severity in SEVERITIES)
    }
    if not by_name:
        # a link's own name, or two test sets of one name could not be told apart by linking one
        return [TestFolder(folder.name if folder.name.strip(".") else folder.resolve().name, folder)]
    wanted = [(name, severity) for name in corruptions for severity in severities]
    missing = [
        f"{name}/{severity}"
        for name, severity in wanted
        if not (by_name.get(name, folder / name) / str(severity)).is_dir()
    ]
    if missing:
        raise UserError(
            f"folder ({folder}) has no {missing[0]} ({len(missing)} missing); there are "
            f"{', '.join(by_name)}; name those wanted with --corruptions and --severities"
        )
    return [
        TestFolder(f"{name} {severity}", by_name[name] / str(severity), (name, severity))
        for name, severity in wanted
    ]


def open_folder(folder: TestFolder, known: Sequence[str] | None) -> LabelledData:
    """The images of a folder of classes, all of them to test, and all classes among the ``known`` ones of a head.

    Raises:
        UserError: it has no classes, or some that the head does not know.
    """
    source, name = open_source(folder.folder, split="all"), str(folder.folder)
    if source.class_names is None:
        why = f": {source.why_unlabelled}" if source.why_unlabelled else ""
        raise UserError(f"folder ({name}) must hold two folders or more, one a class (n01440764 ...){why}")
    unknown = [one for one in source.class_names if known is not None and one not in known]
    if unknown:
        raise UserError(
            f"folder ({name}) has {len(unknown)} classes that DATA lacks ({', '.join(unknown[:3])}); "
            "they must be a part of DATA's"
        )
    names = list(source.class_names)
    return all_tested(LabelledData(source, source.all_labels(), None, names, [], name, "all tested"))


def all_tested(data: LabelledData) -> LabelledData:
    """The same images, all of them to test and none to train on."""
    every = np.arange(len(data.source))
    return replace(data, rounds=[Round(every[:0], every)])


def check_tree(folders: Sequence[tuple[TestFolder, LabelledData]]) -> None:
    """All folders of an ImageNet-C tree hold the same images, or their mean would be of nothing."""
    trees = [(folder, data) for folder, data in folders if folder.corruption]
    if len({folder.corruption for folder, _ in trees}) < len(trees):
        raise UserError("folder names two ImageNet-C trees; measure one after the other")
    for folder, data in trees[1:]:
        first, same = trees[0]
        if not np.array_equal(data.labels, same.labels) or data.class_names != same.class_names:
            raise UserError(f"folder ({folder.folder}) must hold the same images as {first.folder}")
    names = [folder.name for folder, _ in folders if not folder.corruption]
    for name in names:  # which are columns beside ours
        if names.count(name) > 1 or name in (DATA, TREE, *COLUMNS) or _corruption_of(name):
            raise UserError(
                f"folder names test sets by their last part, and {name} is taken; rename or link one"
            )


@dataclass
class Robustness(Protocol):
    """Accuracy on corrupted, attacked and other test images."""

    head: str = "linear"  # linear, trained on DATA, or own, the model's own classifier
    corruptions: Sequence[str] = COMMON
    severities: Sequence[int] = SEVERITIES
    attacks: Sequence[Attack] = ()
    folders: Sequence[Path] = ()  # of ImageNet-C, or of classes
    constants: str = "auto"  # a data set whose constants are taken
    frost: str | None = None  # folder of photographs of frost
    test_images: int | None = None  # at most so many of DATA's test images

    headline, seeds = CLEAN, (0,)

    def __post_init__(self) -> None:
        self.title = f"robustness, {self.head} head; accuracy in %"
        self.own_heads = self.head == "own"
        self.seeded = not self.own_heads

    def open_data(self, config: EvalConfig) -> LabelledData:
        """DATA, which may be missing where nothing is trained, and the folders."""
        check_frost(self.frost)
        if not config.data and not (self.own_heads and self.folders):
            raise UserError("data is missing; --data DATA, or --head own with --folder alone")
        data = self._thinned(super().open_data(config)) if config.data else None
        known = None if data is None or self.own_heads else data.class_names
        self.test_sets = [
            (folder, open_folder(folder, known))
            for path in self.folders
            for folder in find_folders(path, self.corruptions, self.severities)
        ]
        check_tree(self.test_sets)
        if data is not None and known and self.test_sets and len(data.rounds) > 1:
            raise UserError("folder needs one head and --folds makes several; leave one of them out")
        is_read = any(folder.corruption for folder, _ in self.test_sets)
        self.made = [] if is_read or data is None else list(self.corruptions)
        return self.test_sets[0][1] if data is None else data

    def _thinned(self, data: LabelledData) -> LabelledData:
        """With fewer test images where asked for, and without training images where nothing is trained."""
        every = len(data.tested)
        if self.test_images is not None and self.test_images < every:
            rounds = []
            for one in data.rounds:
                count = max(1, round(self.test_images / every * len(one.test)))
                rounds.append(Round(one.train, spread(one.test, count)))
            data = replace(data, rounds=rounds)
            say(f"note: {len(data.tested):,} of {every:,} test images, evenly taken.")
        if not self.own_heads:
            return data
        images = data.tested
        source, labels, groups = Subset(data.source, images), data.labels[images], data.groups_of(images)
        return all_tested(replace(data, source=source, labels=labels, groups=groups))

    def evaluate(self, context: EvalContext, seed: int) -> list[Result]:
        """All rows of one model under one seed."""
        return RobustnessEval(self, context, seed=seed).measure()

    def tables(self, results: Sequence[Result]) -> dict[str, ResultTable]:
        """One table for DATA, for each test set of others, and for an ImageNet-C tree, in that order."""
        groups: dict[str, list[Result]] = {}
        for result in results:
            groups.setdefault(result.group, []).append(result)
        names = sorted(groups, key=lambda name: name == TREE)
        return {name: ResultTable(self.title, CLEAN, groups[name]) for name in names}

    def shown(self, tables: Mapping[str, ResultTable]) -> list[list[str]]:
        return [[self.title, *main_lines(tables)], *map(corruption_lines, tables.values())]

    def draw(self, tables: Mapping[str, ResultTable], folder: Path) -> list[Path]:
        """Curves, and a sheet of what was done to the images."""
        figures = [folder / "robustness.png"]
        draw_curves(figures[0], tables)
        if self.made:
            figures.append(folder / "corruptions.png")
            model = self.open_model(self.config.models[0], self.config.seeds[0])
            names = (self.made, self.severities, self.constants, self.frost)
            draw_sheet(figures[-1], model, self.data, *names)
        return figures


@dataclass
class RobustnessEval:
    """One model, the images, and everything that is asked of it."""

    protocol: Robustness
    context: EvalContext  # the model, prepared, and the images of DATA
    heads: list[ClassifierHead] = field(default_factory=list)  # what classifies, one a round
    seed: int = 0  # of the heads

    def measure(self) -> list[Result]:
        """DATA clean, corrupted and attacked, then the folders."""
        context, seed = self.context, self.seed
        say(f"\n{context.model.name}, {min(context.model.input_size[1:])} pixels")
        if error := context.table("end").error:
            return [replace(context.failed(CLEAN, seed, error), group=DATA)]
        self.heads = [fit_head(context, self.protocol.head, one, seed) for one in context.data.rounds]
        results: list[Result] = []
        if self.protocol.config.data:
            clean = self.clean()
            _say_accuracy(CLEAN, [clean])
            made = list(self._all_corrupted()) if self.protocol.made else []
            attacked = [self.attacked(attack) for attack in self.protocol.attacks]
            results += [clean, *([together(made)] if made else []), *attacked, *made]
        natural: list[Result] = []
        tree: list[ClassificationResult] = []
        for folder, data in self.protocol.test_sets:
            result = self._folder(folder, data)
            (tree if folder.corruption else natural).append(result)
            if not result.error:
                _say_accuracy(folder.name, [result])
        mean = [together(tree)] if tree and not any(result.error for result in tree) else []
        return [*results, *natural, *mean, *tree]

    def clean(self) -> ClassificationResult:
        """The images as they are."""
        return self._row(CLEAN, self.context.predicted(self._predict), {})

    @property
    def _predict(self) -> list[Predict]:
        return [functools.partial(head.predict, self.context) for head in self.heads]

    def _all_corrupted(self) -> Iterator[ClassificationResult]:
        """A result a corruption and severity; a line for each corruption tells how far it is."""
        context, frost = self.context, self.protocol.frost
        strengths = strengths_for(min(context.model.input_size[1:]), self.protocol.constants)
        say(f"constants   {strengths.describe()}")
        for name in self.protocol.corruptions:
            began, results = time.monotonic(), []
            for severity in self.protocol.severities:
                metadata = {"corruption": name, "severity": severity, "constants": strengths.describe()}
                metadata["frost"] = (frost or "drawn") if name == "frost" else ""
                corruption = Corruption(name, severity, strengths, frost)
                predicted = context.predicted(self._predict, corruption, quiet=True)
                results.append(self._row(f"{name} {severity}", predicted, metadata))
                yield results[-1]
            _say_accuracy(name, results, time.monotonic() - began)

    def attacked(self, attack: Attack) -> ClassificationResult:
        """Adversarial test images, made against this model and its heads."""
        data, compute, began = self.context.data, self.context.compute, time.monotonic()
        measured: list[list[np.ndarray]] = []
        for one, head in zip(data.rounds, self.heads, strict=True):
            source, labels = Subset(data.source, one.test), torch.from_numpy(data.labels[one.test])
            count = len(one.test)
            size = min(compute.batch_size or _ATTACKED_AT_ONCE, count)
            arguments = (attack, self.context.model, head, source, labels, size, compute.workers)
            shared = [*shared_objects(self.context.model, source), head]
            batches = dict(compute.run(attack_images, count, size, arguments, shared))
            measured += [batches[first] for first in sorted(batches)]
        predicted, losses, harder, change = (np.concatenate(parts) for parts in zip(*measured, strict=True))
        metadata = {
            "attack": attack.describe(),
            "loss": float(losses.mean()),
            "adversarial_loss": float(harder.mean()),
            "largest_change": float(change.max()),
        }
        result = self._row(attack.name, predicted, metadata)
        _say_accuracy(attack.name, [result], time.monotonic() - began)
        return result

    def _row(self, variant: str, predicted: np.ndarray, metadata: Mapping[str, Any]) -> ClassificationResult:
        cells = {"head": self.protocol.head, **metadata_of(self.heads), **metadata}
        return replace(self.context.result(variant, self.seed, predicted, **cells), group=DATA)

    def _folder(self, folder: TestFolder, data: LabelledData) -> ClassificationResult:
        """A test set of others, among the classes that it has."""
        context, model, columns = self.context, self.context.model, None
        if self.protocol.head == "own":
            # the files of an ImageNet-C tree are windows already
            model = self.protocol.classifier(model.text, data, cut=folder.corruption is not None)
            model.name = context.model.name
            model.prepare(data.source, context.compute.device)
        else:
            columns = [context.data.class_names.index(name) for name in data.class_names]
        table = compute_features(model, data.source, "end", context.compute, quiet=True)
        images = np.flatnonzero(table.read)
        metadata: dict[str, Any] = {"head": self.protocol.head}
        if folder.corruption:
            metadata |= dict(zip(("corruption", "severity"), folder.corruption, strict=True))
        result = ClassificationResult(
            model, data, folder.name, self.seed, images, metadata=metadata, error=table.error
        )
        result.group = TREE if folder.corruption else folder.name
        if not table.error:
            values = {name: rows[images] for name, rows in table.values.items()}
            result.predicted = self.heads[0].predict(context, values, columns)
            read = {"folder": data.name, "left_out": len(table.skipped), "chosen": self.heads[0].chosen}
            result.metadata = {**read, **metadata}
        return result


def together(results: Sequence[ClassificationResult]) -> ClassificationResult:
    """Several results on the same images as one: its accuracy is their mean, its interval draws whole images."""
    first = results[0]
    kept = ("head", "train_images", "chosen", "constants")
    names = dict.fromkeys(str(result.metadata.get("corruption", "")) for result in results)
    severities = sorted({int(result.metadata.get("severity", 0)) for result in results})
    return replace(
        first,
        variant=CORRUPTED,
        images=np.concatenate([result.images for result in results]),
        predicted=np.concatenate([result.predicted for result in results]),
        metadata={
            "constants": "",
            **{name: value for name, value in first.metadata.items() if name in kept},
            "corruption": " ".join(names),
            "severity": " ".join(map(str, severities)),
        },
    )


def _say_accuracy(name: str, results: Sequence[ClassificationResult], seconds: float = 0) -> None:
    numbers = " ".join(f"{100 * result.scores().accuracy:5.1f}" for result in results)
    say(f"  {name:<18} {numbers}" + (f"   ({seconds:.0f} s)" if seconds > 1 else ""))


def points_of(summaries: Mapping[str, Summary]) -> Points:
    """A model's accuracies on corrupted images, from its summaries by variant (``fog 3``)."""
    known = {_corruption_of(variant): one.mean for variant, one in summaries.items() if one.values}
    return {point: accuracy for point, accuracy in known.items() if point is not None}


def _corruption_of(variant: str) -> tuple[str, int] | None:
    name, _, severity = variant.rpartition(" ")
    return (name, int(severity)) if name in CORRUPTIONS and severity.isdecimal() else None


def _measured_corruptions(table: ResultTable) -> list[str]:
    measured = {name for summaries in table.models().values() for name, _ in points_of(summaries)}
    return [name for name in CORRUPTIONS if name in measured]


def _headlines(group: str, summaries: Mapping[str, Summary]) -> dict[str, Summary]:
    rest = {variant: one for variant, one in summaries.items() if _corruption_of(variant) is None}
    return {IMAGENET_C if group == TREE else variant: one for variant, one in rest.items()}


def main_lines(tables: Tables) -> list[str]:
    """A line a model: clean, corrupted (also in per cent of clean), attacks, mCE, other test sets."""
    rows: dict[str, dict[str, str]] = {}
    for group, table in tables.items():
        for name, summaries in table.models().items():
            rows.setdefault(name, {}).update(_cells(group, table, summaries))
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    lines = [["model", *columns]]
    for name, cells in rows.items():
        error = cells.get(CLEAN, "").startswith("the features")
        lines.append([name, *([cells[CLEAN]] if error else [cells.get(one, "-") for one in columns])])
    notes = {
        CORRUPTED: "(corrupted: the mean over corruptions and severities; the interval is its own)",
        "mCE (made)": "(mCE (made): ImageNet-C's files are JPEGs, ours are not; read them for published numbers)",
    }
    return [*aligned(lines), *(note for column, note in notes.items() if column in columns)]


def _cells(group: str, table: ResultTable, summaries: Mapping[str, Summary]) -> dict[str, str]:
    """Column -> text."""
    cells: dict[str, str] = {}
    for title, one in _headlines(group, summaries).items():
        cells[title] = one.error or one.percent()
        if one.variant == CORRUPTED and one.values:
            cells["95 % interval"] = one.interval_text()
            if CLEAN in summaries and summaries[CLEAN].mean > 0:  # of nothing there is no share
                cells["of clean"] = f"{100 * one.mean / summaries[CLEAN].mean:.0f} %"
    points, first = points_of(summaries), table.results[0]
    side = 224 if group == TREE else min(first.model.input_size[1:])
    if mce_applies(first.class_names, side, points):
        title = "mCE" if group == TREE else "mCE (made)"
        cells[title] = f"{100 * mean_corruption_error(points):.1f}"
    return cells


def corruption_lines(table: ResultTable) -> list[str]:
    """Mean over severities: a line a corruption, a column a model."""
    models = {name: points for name, summaries in table.models().items() if (points := points_of(summaries))}
    if not models:
        return []
    rows = [["mean over severities", *models]]
    for name in _measured_corruptions(table):
        by_model = [[points[key] for key in points if key[0] == name] for points in models.values()]
        rows.append([name, *(f"{100 * np.mean(values):.1f}" if values else "-" for values in by_model)])
    return aligned(rows)


def draw_curves(path: Path, tables: Tables) -> None:
    """A panel a corruption, a curve a model; the last panel has clean images, attacks and other test sets."""
    from matplotlib.figure import Figure

    curves = [(name, table) for table in tables.values() for name in _measured_corruptions(table)]
    models = list(dict.fromkeys(name for table in tables.values() for name in table.models()))
    columns = min(_COLUMNS, len(curves) + 1)
    rows = -(-(len(curves) + 1) // columns)
    size = (max(2.2 * columns, 4.5), 1.9 * rows + 0.6 + 0.18 * len(models))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axis, (name, table) in zip(axes, curves, strict=False):
        _draw_curve(axis, name, table, models)
    series: dict[str, dict[str, Summary]] = {model: {} for model in models}
    for group, table in tables.items():
        for model, summaries in table.models().items():
            series[model] |= _headlines(group, summaries)
    bars, names = axes[len(curves)], list(dict.fromkeys(name for one in series.values() for name in one))
    draw_bars(bars, names, series)
    words = [shortened(name, 18) for name in names]
    bars.set_xticks(range(len(names)), words, rotation=40, ha="right", fontsize=6, parse_math=False)
    bars.tick_params(axis="y", labelsize=7)
    for axis in axes[len(curves) + 1 :]:
        axis.set_axis_off()
    for axis in axes[max(len(curves) - columns, 0) : len(curves)]:
        axis.set_xlabel("severity", fontsize=8)
    for axis in axes[::columns]:
        axis.set_ylabel("accuracy in %", fontsize=8)
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower center", fontsize=8, frameon=False)
    save_figure(figure, path)


def _draw_curve(axis: Any, name: str, table: ResultTable, models: Sequence[str]) -> None:
    """Accuracy over severity; severity 0 is the clean image."""
    for model, summaries in table.models().items():
        clean, points = summaries.get(CLEAN), points_of(summaries)
        curve = [(0.0, clean.mean)] if clean is not None and clean.values else []
        curve += [(severity, points[name, severity]) for severity in SEVERITIES if (name, severity) in points]
        x, y = np.array(curve or [(np.nan, np.nan)]).T
        axis.plot(x, 100 * y, "o-", ms=2.5, lw=1.2, color=f"C{models.index(model)}")
    axis.axhline(100 / len(table.results[0].class_names), color="0.75", lw=0.8)
    axis.set_title(name.replace("_", " "), fontsize=8)
    axis.set_xticks(range(6))
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
