"""Robustness: accuracy on images that are corrupted, attacked, or test sets of others (ImageNet-C, -A, -R, -Sketch)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from freqmask.console import say
from freqmask.data.loader import make_loader
from freqmask.data.sampler import ChosenSampler
from freqmask.data.source import Source
from freqmask.data.sources import open_source
from freqmask.errors import UserError
from freqmask.evaluation.attacks import Attack, size_of_change
from freqmask.evaluation.corruptions import (
    COMMON,
    CORRUPTIONS,
    FAMILIES,
    SEVERITIES,
    Corruption,
    check_frost,
    strengths_for,
)
from freqmask.evaluation.eval_model import EvalModel
from freqmask.evaluation.features import compute_features, shared_objects
from freqmask.evaluation.labelled import LabelledData, Round, subset
from freqmask.evaluation.linear import ClassifierHead, fit_head
from freqmask.evaluation.protocol import (
    EvalConfig,
    EvalContext,
    Protocol,
    metadata_of,
)
from freqmask.evaluation.results import ClassificationResult, Result, ResultTable
from freqmask.evaluation.robustness_results import (
    CLEAN,
    CORRUPTED,
    DATA,
    TREE,
    corruption_lines,
    draw_curves,
    draw_sheet,
    main_lines,
)
from freqmask.images import as_float

_ATTACKED_AT_ONCE = 64  # images; gradients need several times the memory of features


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
        return [TestFolder(folder.resolve().name, folder)]
    wanted = [(name, severity) for name in corruptions for severity in severities]
    missing = [
        f"{name}/{severity}"
        for name, severity in wanted
        if name not in by_name or not (by_name[name] / str(severity)).is_dir()
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
        raise UserError(f"folder ({name}) must hold two folders or more, one a class (n01440764 ...)")
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
    for name in names:
        if names.count(name) > 1 or name in (DATA, TREE):
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
        rounds, every = data.rounds, len(data.tested)
        if self.test_images is not None and self.test_images < every:
            share = self.test_images / every
            counts = [max(1, round(share * len(one.test))) for one in rounds]
            places = [
                np.linspace(0, len(one.test) - 1, count).round().astype(np.int64)
                for one, count in zip(rounds, counts, strict=True)
            ]
            rounds = [Round(one.train, one.test[some]) for one, some in zip(rounds, places, strict=True)]
            say(f"note: {sum(counts):,} of {every:,} test images, evenly taken.")
        data = replace(data, rounds=rounds)
        if self.head != "own":
            return data
        images = data.tested
        source, labels, groups = subset(data, images), data.labels[images], data.groups_of(images)
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
        return {name: ResultTable(self.name, self.title, CLEAN, groups[name]) for name in names}

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

    @property
    def model(self) -> EvalModel:
        """The one that is measured."""
        return self.context.model

    def measure(self) -> list[Result]:
        """DATA clean, corrupted and attacked, then the folders."""
        context, seed = self.context, self.seed
        say(f"\n{self.model.name}, {min(self.model.input_size[1:])} pixels")
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
        return [*results, *self._all_folders()]

    def clean(self) -> ClassificationResult:
        """The images as they are."""
        tested = self.context.data.tested
        values = self.context.table("end").values
        return self._result(CLEAN, {name: rows[tested] for name, rows in values.items()}, {})

    def corrupted(self, corruption: Corruption) -> ClassificationResult:
        """Corrupted test images."""
        table = self.context.changed(self.context.data.tested, corruption, quiet=True)
        metadata = {
            "corruption": corruption.name,
            "severity": corruption.severity,
            "constants": corruption.strengths.describe(),
            "frost": (corruption.frost or "drawn") if corruption.name == "frost" else "",
        }
        return self._result(f"{corruption.name} {corruption.severity}", table.values, metadata)

    def attacked(self, attack: Attack) -> ClassificationResult:
        """Adversarial test images, made against this model and its heads."""
        rounds, began = zip(self.context.data.rounds, self.heads, strict=True), time.monotonic()
        measured = [self._attack(attack, one, head) for one, head in rounds]
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

    def _all_corrupted(self) -> Iterator[ClassificationResult]:
        """A result a corruption and severity; a line for each corruption tells how far it is."""
        strengths = strengths_for(min(self.model.input_size[1:]), self.protocol.constants)
        say(f"constants   {strengths.describe()}")
        for name in self.protocol.corruptions:
            began, results = time.monotonic(), []
            for severity in self.protocol.severities:
                results.append(self.corrupted(Corruption(name, severity, strengths, self.protocol.frost)))
                yield results[-1]
            _say_accuracy(name, results, time.monotonic() - began)

    def _attack(self, attack: Attack, one: Round, head: ClassifierHead) -> list[np.ndarray]:
        """Predictions, losses before and after, and sizes of the changes, of a round's test images."""
        compute, data, count = self.context.compute, self.context.data, len(one.test)
        source, labels = subset(data, one.test), torch.from_numpy(data.labels[one.test])
        size = min(compute.batch_size or _ATTACKED_AT_ONCE, count)
        arguments = (attack, self.model, head, source, labels, size, compute.workers)
        shared = [*shared_objects(self.model, source), head]
        batches = dict(compute.run(_attack_images, count, size, arguments, shared))
        return [np.concatenate(parts) for parts in zip(*(batches[k] for k in sorted(batches)), strict=True)]

    def _result(
        self, variant: str, values: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
    ) -> ClassificationResult:
        parts = zip(self.heads, self.context.by_round(values), strict=True)
        predicted = [head.predict(self.context, part) for head, part in parts]
        return self._row(variant, np.concatenate(predicted), metadata)

    def _row(self, variant: str, predicted: np.ndarray, metadata: Mapping[str, Any]) -> ClassificationResult:
        cells = {"head": self.protocol.head, **metadata_of(self.heads), **metadata}
        return replace(self.context.result(variant, self.seed, predicted, **cells), group=DATA)

    def _all_folders(self) -> list[Result]:
        """The natural test sets, then an ImageNet-C tree, its mean first."""
        natural: list[Result] = []
        tree: list[ClassificationResult] = []
        for folder, data in self.protocol.test_sets:
            result = self._folder(folder, data)
            (tree if folder.corruption else natural).append(result)
            if not result.error:
                _say_accuracy(folder.name, [result])
        mean = [together(tree)] if tree and not any(result.error for result in tree) else []
        return [*natural, *mean, *tree]

    def _folder(self, folder: TestFolder, data: LabelledData) -> ClassificationResult:
        """A test set of others, among the classes that it has."""
        context, model, columns = self.context, self.model, None
        if self.protocol.head == "own":
            model = self.protocol.classifier(self.model.text, data)
            model.prepare(data.source, context.compute.device)
        else:
            columns = [context.data.class_names.index(name) for name in data.class_names]
        table = compute_features(model, data.source, "end", context.compute, quiet=True)
        images = np.flatnonzero(table.read)
        metadata: dict[str, Any] = {"head": self.protocol.head}
        if folder.corruption:
            metadata |= {"corruption": folder.corruption[0], "severity": folder.corruption[1]}
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


def _attack_images(
    device: torch.device,
    images: range,
    attack: Attack,
    model: EvalModel,
    head: ClassifierHead,
    source: Source,
    labels: Tensor,
    size: int,
    workers: int,
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """A batch's first number; its predictions, losses before and after, sizes of the changes; in whatever process."""

    def classify(batch: Tensor) -> Tensor:
        return head.logits(model.features(batch, "end"))

    first = images.start
    for batch in make_loader(model.dataset(source), ChosenSampler(images), size, workers):
        clean, keys = as_float(batch["views"][0].to(device)), batch["keys"].to(device)
        truth = labels[first : first + len(clean)].to(device)
        harder = attack.run(classify, clean, truth, keys)
        with torch.no_grad():
            before, after = classify(clean).float(), classify(harder).float()
        losses = (F.cross_entropy(logits, truth, reduction="none") for logits in (before, after))
        change = size_of_change(harder - clean, attack.norm)
        yield first, [part.cpu().numpy() for part in (after.argmax(dim=1), *losses, change)]
        first += len(clean)


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
