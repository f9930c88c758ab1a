"""Trains a segmentation network on every model with every seed, tests it, tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from freqmask.backbones import Backbone
from freqmask.console import rank, say
from freqmask.data.values import Survey, survey
from freqmask.errors import UserError
from freqmask.evaluation.duplicates import seen_in_pretraining
from freqmask.evaluation.results import check_results
from freqmask.evaluation.segmentation.data import SegmentationData, Wanted, open_segmentation
from freqmask.evaluation.segmentation.network import decoder_class
from freqmask.evaluation.segmentation.overlay import draw_overlays
from freqmask.evaluation.segmentation.predict import Predictor, Shown, add_shown, predict
from freqmask.evaluation.segmentation.resolve import STRIDE_SHARE, choose_crop
from freqmask.evaluation.segmentation.run import Task, Trained, train
from freqmask.evaluation.segmentation.settings import DECIDING, check_options
from freqmask.evaluation.segmentation.tables import (
    PROTOCOL,
    SegmentationResult,
    SegmentationSummary,
    append_results,
    class_lines,
    draw,
    summarise,
    table_lines,
    warnings_of,
    write_classes,
)
from freqmask.evaluation.subjects import check_models
from freqmask.evaluation.trainings import AUTO, digest, run_names
from freqmask.interop.models import stage_features
from freqmask.training.files import check_writable
from freqmask.training.quiet import quiet_libraries
from freqmask.training.runs import RUNS

TITLE = "UperNet, judged after the last step"


@dataclass
class Bout:
    """A series of trainings on the same images.

    Attributes:
        options: of the command.
        models: MODEL as typed.
        seeds: of the trainings.
        data: images with masks.
        seen: what the images are like.
        root: the folder of the runs.
        out: folder of the results, or None.
        shown: images to be looked at.
    """

    options: Mapping[str, Any]
    models: list[str]
    seeds: Sequence[int]
    data: SegmentationData
    seen: Survey
    root: Path
    out: Path | None
    shown: list[Shown] = field(default_factory=list)

    @property
    def inferences(self) -> list[str]:
        """Ways to test, the one of the class table and the overlays first."""
        return list(dict.fromkeys(self.options["inference"] or ["windows"]))


def evaluate_segmentation(options: Mapping[str, Any]) -> list[SegmentationSummary]:
    """Train and test all models; one table, rows, classes, bars and overlays.

    Args:
        options: those of the command.

    Returns:
        One summary a model and way to test; none after a dry run, and none from processes that only help to train.

    Raises:
        UserError: an option cannot be, or something cannot be opened.
    """
    with quiet_libraries():
        bout = open_bout(options)
        results = [
            result for text in bout.models for seed in bout.seeds for result in measure(bout, text, seed)
        ]
        return tell(bout, results) if results else []


def open_bout(options: Mapping[str, Any]) -> Bout:
    """Everything opened and checked before any work.

    Raises:
        UserError: an option cannot be, or something cannot be opened.
    """
    asked = options["model"]
    models = [str(asked)] if isinstance(asked, (str, Path)) else [str(one) for one in asked]
    options = {**options, "model": check_models(models)}
    check_options(options)
    decoder_class()
    seeds = options["seeds"] or [0]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds ({seeds}) must be different numbers; try 0 1 2")
    out = None if options["out"] is None else Path(options["out"])
    check_writable(out or RUNS, folder=True)
    if out is not None:
        check_results(out)
    data = open_segmentation(_wanted(options))
    seen = survey(data.source)
    words = {name: options[name] for name in DECIDING if name in options}
    series = digest(words, data.train.fingerprint(), data.split, data.labels.values)
    root = out or RUNS / f"{PROTOCOL}-{series}"
    bout = Bout(options, options["model"], seeds, data, seen, root, out)
    _check_models(bout)
    _say_data(data)
    return bout


def _wanted(options: Mapping[str, Any]) -> Wanted:
    return Wanted(
        data=options["data"],
        images=options["images"],
        masks=options["masks"],
        layout=options["layout"],
        class_names=options["class_names"],
        ignore_label=options["ignore_label"],
        train_split=options["train_split"],
        test_split=options["test_split"],
        test_share=options["test_share"],
        split_seed=options["split_seed"],
        pages=options["pages"],
    )


def _check_models(bout: Bout) -> None:
    """Open every model once, so that a mistake shows before hours of work."""
    options = bout.options
    on_gpu = torch.cuda.is_available() and options["accelerator"] != "cpu"
    crop = int(choose_crop(options["crop"], bout.seen, on_gpu).value)
    for text in bout.models:
        subject = Task(text, bout.data, bout.seen, bout.seeds[0], bout.root, options).open(crop)
        if "whole" in bout.inferences:
            _check_any_size(text, subject.opened.backbone, crop)
        if subject.kind == "run" and subject.results is not None:
            tested = np.arange(len(bout.data.train), len(bout.data.source))
            say(seen_in_pretraining(subject.results, bout.data.source, tested))


@torch.no_grad()
def _check_any_size(text: str, backbone: Backbone, crop: int) -> None:
    """Tried rather than asked: some families take the argument for it and no other size all the same."""
    try:
        stage_features(backbone, torch.zeros(1, backbone.channels, crop + 8, 2 * crop))
    except (AssertionError, RuntimeError, ValueError, UserError) as error:
        raise UserError(
            f"inference (whole) must be left out: {text} takes images of {crop}x{crop} pixels only; "
            "--inference windows will do"
        ) from error


def _say_data(data: SegmentationData) -> None:
    labels = data.labels
    say(
        f"{data.name}: {len(data.train):,} images to learn from, {len(data.test):,} to test, {len(labels)} classes "
        f"({data.split}); ignored labels: {labels.describe_ignored()}"
    )
    for note in data.notes:
        say(f"note: {note}")


def measure(bout: Bout, text: str, seed: int) -> list[SegmentationResult]:
    """One training, tested in each of the ways asked for; nothing after a dry run or in a helping process."""
    folder = bout.root / f"{run_names(bout.models)[text]}-seed{seed}"
    trained = train(Task(text, bout.data, bout.seen, seed, folder, bout.options))
    if trained is None or rank() > 0:
        return []
    predictor = _predictor(bout, trained)
    name, test, labels = trained.subject.name, bout.data.test, bout.data.labels
    facts = _facts(trained, predictor.stride)
    results = [
        SegmentationResult(trained.subject, way, seed, predict(predictor, test, labels, way, name), facts)
        for way in bout.inferences
    ]
    count = int(bout.options["overlays"])
    if seed == bout.seeds[0] and count:
        way = bout.inferences[0]
        bout.shown = add_shown(bout.shown, predictor, test, labels, way, name, count)
    trained.subject.opened.backbone.cpu()
    return results


def _predictor(bout: Bout, trained: Trained) -> Predictor:
    from freqmask.evaluation.job import pick_device

    training = trained.training
    asked = bout.options["stride"]
    stride = round(training.crop * STRIDE_SHARE) if asked in (None, AUTO) else int(asked)
    device = pick_device(bout.options["accelerator"])
    return Predictor(trained.network, training, device, max(1, stride), training.images_at_once)


def _facts(trained: Trained, stride: int) -> dict[str, Any]:
    """Cells on how a network came about."""
    training = trained.training
    names = ("steps", "crop", "lr", "layer_decay", "drop_path", "decoder_channels")
    return {
        **{name: getattr(training, name) for name in names},
        "step_images": training.batch_size,
        "shorter_side": training.image_size or "",
        "stride": stride,
        "network": str(trained.run.path),
    }


def tell(bout: Bout, results: Sequence[SegmentationResult]) -> list[SegmentationSummary]:
    """The table, the rows, the pictures."""
    data, out = bout.data, bout.out
    summaries = summarise(results, data)
    lines = [table_lines(TITLE, summaries), class_lines(summaries, bout.inferences[0])]
    for block in filter(None, lines):
        say()
        for line in block:
            say(line)
    for line in warnings_of(results, data):
        say(line)
    options = {name: value for name, value in bout.options.items() if name not in ("model", "out", "dry_run")}
    tables = append_results(results, data, options, out)
    folder = out or next((r.subject.results for r in results if r.subject.results), None) or Path()
    draw(folder / f"{PROTOCOL}.png", f"{TITLE}\n{data.name}", summaries)
    write_classes(folder / f"{PROTOCOL}-classes.csv", results, data)
    look = [folder / f"{PROTOCOL}.png", folder / f"{PROTOCOL}-classes.csv"]
    if bout.shown:
        look.insert(0, folder / f"{PROTOCOL}-overlays.png")
        draw_overlays(look[0], data.name, bout.shown, data.labels.names)
    say()
    say(f"rows        {', '.join(map(str, tables))}")
    say(f"look at     {', '.join(map(str, look))}")
    return summaries
