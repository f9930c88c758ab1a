"""How well a classifier does on images that were made harder: the story of ``freqmask evaluate robustness``."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from freqmask.console import say
from freqmask.data.values import Survey
from freqmask.errors import UserError
from freqmask.evaluation.answers import Answers, learn_answers
from freqmask.evaluation.attacks import Attack
from freqmask.evaluation.classifier import ClassifierSubject
from freqmask.evaluation.corruptions import COMMON, SEVERITIES, Corruption, strengths_for
from freqmask.evaluation.corruptions.frost import check_frost
from freqmask.evaluation.examination import (
    CLEAN,
    CORRUPTED,
    Examination,
    answer_variant,
    is_broken,
    together,
)
from freqmask.evaluation.job import Setting, begin, open_one, prepare
from freqmask.evaluation.labelled import LabelledData, Round, subset
from freqmask.evaluation.protocol import Bench
from freqmask.evaluation.results import Result, Summary, score_of
from freqmask.evaluation.robustness_board import Board
from freqmask.evaluation.robustness_report import tell
from freqmask.evaluation.subjects import Subject, check_models
from freqmask.evaluation.variants import Variant, find_variants, open_variant


@dataclass(frozen=True)
class Wanted:
    """What is done to the images, and what classifies them.

    Attributes:
        head: ``linear``, learnt from DATA, or ``own``, the model's own classifier.
        corruptions: names.
        severities: 1 to 5.
        attacks: with their budgets.
        folders: of ImageNet-C, or of classes.
        constants: a data set whose constants are taken, or auto.
        frost: folder of photographs of frost, or None.
        test_images: at most so many of DATA's test images; None takes all.
    """

    head: str = "linear"
    corruptions: Sequence[str] = COMMON
    severities: Sequence[int] = SEVERITIES
    attacks: Sequence[Attack] = ()
    folders: Sequence[Path] = ()
    constants: str = "auto"
    frost: str | None = None
    test_images: int | None = None


@dataclass
class Job:
    """Everything opened, before the first model is measured.

    Attributes:
        wanted: what is asked.
        setting: on what, where.
        data: DATA; None where only folders are tested.
        seen: what DATA's images are like.
        variants: test sets of the folders with their images.
        read: whether corruptions are read from a folder rather than made.
        boards: results on DATA, and on each tree and test set, in the order of the tables.
        own: subjects with an own classifier, by model and classes.
    """

    wanted: Wanted
    setting: Setting
    data: LabelledData | None
    seen: Survey | None
    variants: list[tuple[Variant, LabelledData]]
    read: bool
    boards: dict[str, Board] = field(default_factory=dict)
    own: dict[tuple[str, tuple[str, ...]], ClassifierSubject] = field(default_factory=dict)

    def board(self, name: str, data: LabelledData) -> Board:
        """The board of a name, new where there is none."""
        return self.boards.setdefault(name, Board(name, data))

    def classifier(self, text: str, data: LabelledData) -> ClassifierSubject:
        """A model with its own classifier, answering with the classes of some images."""
        key = (text, tuple(data.class_names))
        if key not in self.own:
            self.own[key] = ClassifierSubject(text, data.class_names, self.setting.crop)
        return self.own[key]


def evaluate_robustness(wanted: Wanted, setting: Setting) -> list[Summary]:
    """Measure all models on corrupted, attacked and other people's images; tables, rows, pictures.

    Args:
        wanted: what is done to the images.
        setting: models, DATA (may be empty for models with their own classifier), where.

    Returns:
        One summary a model and variant.

    Raises:
        UserError: something cannot be opened, or does not fit; nothing has been written then.
    """
    models, job = open_job(wanted, setting)
    with closing(setting.place):
        for text in models:
            for seed in setting.seeds:
                _examine(job, text, seed)
                if wanted.head == "own":
                    break  # nothing depends on the seed
    return tell(list(job.boards.values()), setting, wanted.head, _example(job, models[0]))


def open_job(wanted: Wanted, setting: Setting) -> tuple[list[str], Job]:
    """Open models, DATA and folders once, so that a mistake shows before hours of work.

    Raises:
        UserError: whatever is wrong with them.
    """
    if wanted.test_images is not None and wanted.test_images < 1:
        raise UserError(f"test_images ({wanted.test_images}) must be at least 1, or left out for all")
    check_frost(wanted.frost)
    strengths_for(224, wanted.constants)
    models, data, seen = check_models(setting.models), None, None
    if setting.data:
        models, data, seen = prepare(setting, check=wanted.head != "own")
        data = _thinned(data, wanted)
    elif wanted.head != "own" or not wanted.folders:
        raise UserError("data is missing; --data DATA, or --head own with --folder alone")
    known = data.class_names if data is not None and wanted.head != "own" else None
    variants = [
        (variant, open_variant(variant, known))
        for folder in wanted.folders
        for variant in find_variants(folder, wanted.corruptions, wanted.severities)
    ]
    _check_tree(variants)
    if known is not None and variants and data is not None and len(data.rounds) > 1:
        raise UserError("folder needs one head and --folds makes several; leave one of them out")
    read = any(variant.corruption for variant, _ in variants)
    job = Job(wanted, setting, data, seen, variants, read)
    for text in models:
        _open(job, text, setting.seeds[0])
    return models, job


def _check_tree(variants: Sequence[tuple[Variant, LabelledData]]) -> None:
    """All folders of an ImageNet-C tree hold the same images, or their mean would be of nothing."""
    trees = [(variant, data) for variant, data in variants if variant.corruption]
    if len({variant.corruption for variant, _ in trees}) < len(trees):
        raise UserError("folder names two ImageNet-C trees; measure one after the other")
    for variant, data in trees[1:]:
        if not np.array_equal(data.labels, trees[0][1].labels) or data.class_names != trees[0][1].class_names:
            raise UserError(f"folder ({variant.folder}) must hold the same images as {trees[0][0].folder}")


def _thinned(data: LabelledData, wanted: Wanted) -> LabelledData:
    """With fewer test images where asked for, and without those to learn from where nothing is learnt."""
    rounds = data.rounds
    if wanted.test_images is not None and wanted.test_images < len(data.tested):
        share = wanted.test_images / len(data.tested)
        rounds = [Round(one.train, _spread(one.test, max(1, round(share * len(one.test))))) for one in rounds]
        say(
            f"note: {sum(len(one.test) for one in rounds):,} of {len(data.tested):,} test images, evenly taken."
        )
    data = dataclasses.replace(data, rounds=rounds)
    if wanted.head != "own":
        return data
    images = data.tested
    every = np.arange(len(images))
    return dataclasses.replace(
        data,
        source=subset(data, images),
        labels=data.labels[images],
        groups=None if data.groups is None else [data.groups[int(image)] for image in images],
        rounds=[Round(every[:0], every)],
    )


def _spread(images: np.ndarray, most: int) -> np.ndarray:
    return images[np.linspace(0, len(images) - 1, most).round().astype(np.int64)]


def _open(job: Job, text: str, seed: int) -> Subject:
    if job.wanted.head == "own":
        return job.classifier(text, job.data if job.data is not None else job.variants[0][1])
    assert job.seen is not None  # DATA is there wherever a head is learnt
    return open_one(text, job.seen, job.setting, seed)


def _side(subject: Subject) -> int:
    _, height, width = subject.key()["input_size"]
    return int(min(height, width))


def _examine(job: Job, text: str, seed: int) -> None:
    """Everything that is asked of one model under one seed."""
    subject = _open(job, text, seed)
    data = job.data if job.data is not None else job.variants[0][1]
    bench = begin(subject, data, job.setting.place)
    say(f"\n{subject.name}, {_side(subject)} pixels")
    if is_broken(bench.table("end")):
        trouble = "features are not finite; no result"
        job.board("data", data).add(
            data, Result(subject, CLEAN, seed, bench.data.tested, np.empty(0), trouble=trouble)
        )
        return
    learnt = [learn_answers(bench, job.wanted.head, one, seed) for one in bench.data.rounds]
    if job.data is not None:
        _examine_data(job, Examination(bench, learnt, seed, job.wanted.head))
    if job.variants:
        _examine_variants(job, bench, learnt[0], text, seed)


def _examine_data(job: Job, examination: Examination) -> None:
    """DATA clean, corrupted and attacked."""
    bench = examination.bench
    board = job.board("data", bench.data)
    clean = examination.clean()
    _say_accuracy(CLEAN, [clean], bench.data)
    made = [] if job.read or not job.wanted.corruptions else list(_corrupted(job, examination))
    attacked = []
    for attack in job.wanted.attacks:
        began = time.monotonic()
        attacked.append(examination.attacked(attack))
        _say_accuracy(attack.name, attacked[-1:], bench.data, time.monotonic() - began)
    board.side = max(board.side, _side(bench.subject))
    for result in [clean, *([together(made)] if made else []), *attacked, *made]:
        board.add(bench.data, result)


def _corrupted(job: Job, examination: Examination) -> Iterator[Result]:
    """A result a corruption and severity; a line for each corruption tells how far it is."""
    strengths = strengths_for(_side(examination.bench.subject), job.wanted.constants)
    say(f"constants   {strengths.describe()}")
    for name in job.wanted.corruptions:
        began, found = time.monotonic(), []
        for severity in job.wanted.severities:
            found.append(examination.corrupted(Corruption(name, severity, strengths, job.wanted.frost)))
            yield found[-1]
        _say_accuracy(name, found, examination.bench.data, time.monotonic() - began)


def _say_accuracy(name: str, results: Sequence[Result], data: LabelledData, seconds: float = 0) -> None:
    numbers = " ".join(f"{100 * score_of(result, data).accuracy:5.1f}" for result in results)
    say(f"  {name:<18} {numbers}" + (f"   ({seconds:.0f} s)" if seconds > 1 else ""))


def _examine_variants(job: Job, bench: Bench, answers: Answers, text: str, seed: int) -> None:
    """The test sets of the folders."""
    read = []
    for variant, data in job.variants:
        subject, columns = bench.subject, None
        if job.wanted.head == "own":
            subject = job.classifier(text, data)
            subject.begin(data.source, bench.place.device)
        else:
            columns = [bench.data.class_names.index(name) for name in data.class_names]
        result = answer_variant(subject, answers, data, columns, variant.name, seed, bench)
        result.facts["head"] = job.wanted.head
        if variant.corruption:
            result.facts |= {"corruption": variant.corruption[0], "severity": variant.corruption[1]}
            read.append((result, data))
        else:
            job.board(variant.name, data).add(data, result)
        if not result.trouble:
            _say_accuracy(variant.name, [result], data)
    if read:
        _add_tree(job, read)


def _add_tree(job: Job, read: Sequence[tuple[Result, LabelledData]]) -> None:
    """The results of an ImageNet-C tree, their mean first."""
    board = job.board("tree", read[0][1])
    board.side = 224  # that of the files
    board.is_read = True
    if not any(result.trouble for result, _ in read):
        board.add(read[0][1], together([result for result, _ in read], CORRUPTED))
    for result, data in read:
        board.add(data, result)


def _example(job: Job, text: str) -> tuple[Subject, LabelledData, Wanted] | None:
    """What the sheet of corrupted images shows."""
    if job.data is None or job.read or not job.wanted.corruptions:
        return None
    return _open(job, text, job.setting.seeds[0]), job.data, job.wanted
