"""Trains a segmentation network on every model with every seed and evaluates it on the test images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from freqmask.backbones import Backbone
from freqmask.console import rank, say, silence_third_party_loggers
from freqmask.data.values import Survey, survey
from freqmask.errors import UserError
from freqmask.evaluation.duplicates import seen_in_pretraining
from freqmask.evaluation.eval_model import check_models
from freqmask.evaluation.protocol import (
    EvalConfig,
    Protocol,
    check_seeds_differ,
    finish_report,
    say_blocks,
)
from freqmask.evaluation.results import Result, ResultTable, SegmentationResult, Summary, check_results
from freqmask.evaluation.segmentation.inference import Predictor, Shown, add_shown, draw_overlays, predict
from freqmask.evaluation.segmentation.mask_data import SegmentationConfig, SegmentationData, open_segmentation
from freqmask.evaluation.segmentation.segmentation_plan import (
    DECIDING,
    STRIDE_SHARE,
    check_options,
    choose_crop,
)
from freqmask.evaluation.segmentation.segmentation_task import SegmentationJob, Trained, train_network
from freqmask.evaluation.segmentation.upernet import decoder_class
from freqmask.evaluation.trainings import AUTO, digest, run_names
from freqmask.interop.models import stage_features
from freqmask.training.auto import pick_device
from freqmask.training.files import check_writable
from freqmask.training.run_folder import RUNS


@dataclass
class SegmentationExperiment:
    """A series of trainings on the same images.

    Attributes:
        config: what is asked.
        models: MODEL as typed.
        data: images with masks.
        seen: what the images are like.
        root: the folder of the runs.
        shown: images to be looked at.
    """

    config: EvalConfig
    models: list[str]
    data: SegmentationData
    seen: Survey
    root: Path
    shown: list[Shown] = field(default_factory=list)


class Segment(Protocol):
    """UperNet on a backbone, all weights trained.

    Args:
        options: of the command.
    """

    name, title = "segment", "UperNet, evaluated after the last step"

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = {**options, "model": check_models(options["model"])}
        self.inferences = list(dict.fromkeys(options["inference"] or ["windows"]))
        self.headline = self.inferences[0]

    def config(self, options: Mapping[str, Any]) -> EvalConfig:
        """What a segmentation shares with every evaluation."""
        return EvalConfig(
            models=check_models(options["model"]),
            data=options["data"],
            seeds=options["seeds"] or (0,),
            weights=options["weights"],
            value_range=options["value_range"],
            out=None if options["out"] is None else Path(options["out"]),
            options=options,
        )

    def open(self, config: EvalConfig) -> SegmentationExperiment:
        """Everything opened and checked before any work."""
        options = self.options
        check_options(options)
        decoder_class()
        check_seeds_differ(config.seeds)
        check_writable(config.out or RUNS, folder=True)
        names = SegmentationConfig.__dataclass_fields__
        data = open_segmentation(SegmentationConfig(**{name: options[name] for name in names}))
        words = {name: options[name] for name in DECIDING if name in options}
        series = digest(words, data.train.fingerprint(), data.split, data.labels.values)
        root = config.out or RUNS / f"{self.name}-{series}"
        experiment = SegmentationExperiment(config, config.models, data, survey(data.source), root)
        self._check_models(experiment)
        labels = data.labels
        say(
            f"{data.name}: {len(data.train):,} training images, {len(data.test):,} test images, {len(labels)} classes "
            f"({data.split}); ignored labels: {labels.describe_ignored()}"
        )
        for note in data.notes:
            say(f"note: {note}")
        return experiment

    def _check_models(self, experiment: SegmentationExperiment) -> None:
        options, data, config = self.options, experiment.data, experiment.config
        on_gpu = torch.cuda.is_available() and options["accelerator"] != "cpu"
        crop = int(choose_crop(options["crop"], experiment.seen, on_gpu).value)
        for text in experiment.models:
            task = SegmentationJob(text, data, experiment.seen, config.seeds[0], experiment.root, options)
            model = task.open(crop)
            check_results(config.out or model.results or Path())
            if "whole" in self.inferences:
                _check_any_size(text, model.opened.backbone, crop)
            if model.kind == "run" and model.results is not None:
                tested = np.arange(len(data.train), len(data.source))
                say(seen_in_pretraining(model.results, data.source, tested))

    def contexts(
        self, experiment: SegmentationExperiment, text: str
    ) -> Iterator[tuple[tuple[SegmentationExperiment, SegmentationJob], int]]:
        """A training for each seed."""
        for seed in experiment.config.seeds:
            folder = experiment.root / f"{run_names(experiment.models)[text]}-seed{seed}"
            yield (
                (
                    experiment,
                    SegmentationJob(text, experiment.data, experiment.seen, seed, folder, self.options),
                ),
                seed,
            )

    def evaluate(self, context: tuple[SegmentationExperiment, SegmentationJob], seed: int) -> list[Result]:
        """One training, tested in each of the ways asked for; nothing after a dry run or in a helping process."""
        experiment, task = context
        with silence_third_party_loggers():
            trained = train_network(task)
        if trained is None or rank() > 0:
            return []
        predictor = self._predictor(trained)
        name, data = trained.subject.name, experiment.data
        metadata = _metadata(trained, predictor.stride, len(data.train))
        results: list[Result] = []
        for way in self.inferences:
            counts, images, error = predict(predictor, data.test, data.labels, way, name)
            row = SegmentationResult(
                trained.subject, data, way, seed, images, counts, metadata=metadata, error=error
            )
            results.append(row)
        count = int(self.options["overlays"])
        if seed == experiment.config.seeds[0] and count:
            experiment.shown = add_shown(
                experiment.shown, predictor, data.test, data.labels, self.headline, name, count
            )
        trained.subject.opened.backbone.cpu()
        return results

    def _predictor(self, trained: Trained) -> Predictor:
        training, asked = trained.training, self.options["stride"]
        stride = round(training.crop * STRIDE_SHARE) if asked in (None, AUTO) else int(asked)
        device = pick_device(self.options["accelerator"])
        return Predictor(trained.network, training, device, max(1, stride), training.images_at_once)

    def report(self, experiment: SegmentationExperiment, results: Sequence[Result]) -> list[Summary]:
        """The table, the rows, the figures."""
        table = ResultTable(self.name, self.title, self.headline, results)
        say_blocks(table.lines(), table.class_lines(), table.warnings())
        folder = table.folder(experiment.config.out)
        figures = [folder / "segment.png", folder / "segment-classes.csv"]
        table.draw_bars(figures[0])
        table.write_classes(figures[1])
        if experiment.shown:
            figures.insert(0, folder / "segment-overlays.png")
            names = experiment.data.labels.names
            draw_overlays(figures[0], experiment.data.name, experiment.shown, names)
        finish_report([table], experiment.config, figures)
        return table.summaries


@torch.no_grad()
def _check_any_size(text: str, backbone: Backbone, crop: int) -> None:
    try:
        stage_features(backbone, torch.zeros(1, backbone.channels, crop + 8, 2 * crop))
    except (AssertionError, RuntimeError, ValueError, UserError) as error:
        raise UserError(
            f"inference (whole) must be left out: {text} takes images of {crop}x{crop} pixels only; "
            "--inference windows will do"
        ) from error


def _metadata(trained: Trained, stride: int, n_train: int) -> dict[str, Any]:
    training = trained.training
    names = ("steps", "crop", "lr", "layer_decay", "drop_path", "decoder_channels")
    return {
        "train_images": n_train,
        **{name: getattr(training, name) for name in names},
        "step_images": training.batch_size,
        "shorter_side": training.image_size or "",
        "stride": stride,
        "network": str(trained.run.path),
    }
