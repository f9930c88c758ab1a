"""Fine-tuning: how images are augmented, its module and its job as a task of the loop, and the protocol."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import lightning as L
import numpy as np
import torch
from jaxtyping import Float, Int64
from timm.loss.binary_cross_entropy import BinaryCrossEntropy
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from timm.optim.lamb import Lamb
from torch import Tensor, nn

from freqmask import __version__
from freqmask.backbones import batch_norms, cells, eval_no_grad, few_tokens_attention, recalibrate_batch_norm
from freqmask.console import LINES_A_RUN, counted, rank, readable_time, say, say_left_out
from freqmask.data.augment import AugmentedGeometry, Mixer
from freqmask.data.cache import hash_of
from freqmask.data.loader import (
    ChosenSampler,
    OrderedSampler,
    TrainDataset,
    calibration_images,
    make_loader,
)
from freqmask.data.source import Source, Subset
from freqmask.data.transforms import Geometry
from freqmask.data.values import ValueRange
from freqmask.errors import UserError
from freqmask.evaluation.eval_model import LOGITS, BackboneModel, ClassifierModel, EvalModel
from freqmask.evaluation.features import ComputeConfig, compute_features, not_finite
from freqmask.evaluation.finetune_plan import (
    DECIDING,
    FinetunePlan,
    Network,
    Tuning,
    held_out_share,
    make_classifier,
    problems,
    standardize_features,
    without_head_norm,
)
from freqmask.evaluation.labelled import SPLITS, LabelledData, shot_name
from freqmask.evaluation.linear import begin_head, right_out_of_fold
from freqmask.evaluation.protocol import EvalConfig, Protocol
from freqmask.evaluation.results import ClassificationResult, Result
from freqmask.evaluation.trainings import (
    AUTO,
    BETAS,
    TrainingJob,
    check_no_problems,
    layer_groups,
    make_task,
    run_names,
    run_training,
    series_folder,
)
from freqmask.interop.formats import CLASSIFIER, PIXELS
from freqmask.interop.weight_files import write_timm_folder
from freqmask.rng import sample_key
from freqmask.spectrum import Images, Normalization, as_float
from freqmask.timm_models import strides
from freqmask.training.callbacks import Measurement, Monitor
from freqmask.training.loop import ScheduledModule, Task, translate_errors
from freqmask.training.optim import Schedule, make_adamw, update_ema
from freqmask.training.run_folder import RunFolder, comparable, from_anywhere

_PRESENT = 0.2  # a class that is that much of a mixed image counts as present, as timm's RSB trainings do
_FEW_LINES = 4  # without a terminal a series of runs would be all progress
# Mirroring is tried on that many images, at most that share of those that the training sees (so of its time a tenth).
# It stops where frozen features tell the classes of fewer than that share of them, and by so many deviations.
_MIRRORED_LEAST, _MIRRORED_MOST, _MIRRORED_SHARE = 30, 1_000, 0.15
_MIRRORED_RIGHT, _MIRRORED_DEVIATIONS = 0.8, 3.0


class FinetuneModule(ScheduledModule):
    """Trains a timm classifier."""

    def __init__(self, model: nn.Module, tuning: Tuning, classes: int) -> None:
        super().__init__()
        if tuning.head_norm:
            standardize_features(model)
        self.model: Any = model
        self.average: Any = None if tuning.ema is None else copy.deepcopy(model).requires_grad_(False).eval()
        self.tuning = tuning
        self.stride = strides(model)[-1]
        self.mixer = Mixer(classes, tuning.mixup, tuning.cutmix, tuning.smoothing, tuning.erasing)
        binary = tuning.loss == "binary"
        self.loss = BinaryCrossEntropy(target_threshold=_PRESENT) if binary else SoftTargetCrossEntropy()
        self.normalization = Normalization(tuning.channels, tuning.mean, tuning.std)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """As usual; a frozen batch norm and the moving average stay as they are."""
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        for norm in batch_norms(self.model) if self.tuning.norm_frozen else ():
            norm.train(mode and not norm.affine)  # the one before the head has no weights
        return self

    @property
    def tested(self) -> Any:
        """The classifier that is tested: the moving average where there is one."""
        return self.model if self.average is None else self.average

    def normalize(self, view: Tensor) -> Tensor:
        """A view (B, C, H, W), uint8 or in [0, 1], as the classifier takes it."""
        return self.normalization(as_float(view))

    def training_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Tensor]:
        """One part of an optimizer step."""
        with torch.no_grad():
            part = batch_index % self.tuning.accumulate
            key = sample_key(self.tuning.seed, self.step, self.trainer.global_rank, part)
            images, targets = self.mixer(self.normalize(batch["views"][0]), batch["labels"], key)
        with few_tokens_attention(self.model, cells(images, self.stride)):
            logits = self.model(images)
        loss = self.loss(logits.float(), targets)
        self.check(loss)
        return {"loss": loss}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW or LAMB, the layers at learning rates of their own."""
        tuning = self.tuning
        groups = layer_groups(self.model, tuning.weight_decay, tuning.layer_decay)
        optimizer: torch.optim.Optimizer
        if tuning.optimizer == "lamb":
            optimizer = Lamb(groups, lr=tuning.lr, weight_decay=tuning.weight_decay)
        else:
            optimizer = make_adamw(groups, tuning.lr, BETAS, tuning.precision)
        self.schedule = Schedule(optimizer, tuning.optim(tuning.min_lr, tuning.warmup_lr))
        return optimizer

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step, then let the moving average follow."""
        optimizer.step(closure=optimizer_closure)
        if self.average is None:
            return
        # young averages follow faster, or of a short training its beginning would be tested
        momentum = min(float(self.tuning.ema or 0), (1 + self.step) / (10 + self.step))
        update_ema(self.average, self.model, momentum)
        for follower, leader in zip(self.average.buffers(), self.model.buffers(), strict=True):
            follower.copy_(leader)


def whole_images(
    tuning: Tuning, source: Source, sampler: ChosenSampler
) -> Iterator[tuple[Images, Int64[Tensor, " image"]]]:
    """Batches of images as a test sees them, normalized, on the device, and their labels on the CPU."""
    device, images = torch.device(tuning.accelerator), make_dataset(source, tuning, augmented=False)
    normalization = Normalization(tuning.channels, tuning.mean, tuning.std).to(device)
    for batch in make_loader(images, sampler, min(len(images), 64), workers=tuning.workers):
        yield normalization(as_float(batch["views"][0].to(device))), batch["labels"]


@torch.no_grad()
def frozen_features(
    model: Any, tuning: Tuning, source: Source, mirrored: bool = False
) -> tuple[list[Float[Tensor, "image dim"]], Int64[Tensor, " image"]]:
    """What a classifier's end is given for whole images and, with ``mirrored``, for their mirror images; the labels.

    Batch norm that is not frozen takes the statistics of these images first, as it will in training; else the head
    would be fitted to features that no step sees.
    """
    inputs, labels, views = list[Tensor](), list[Tensor](), 2 if mirrored else 1
    model.to(torch.device(tuning.accelerator))
    if not tuning.norm_frozen:
        several = ChosenSampler(calibration_images(source))
        recalibrate_batch_norm(model, (images for images, _ in whole_images(tuning, source, several)))
    hook = model.get_classifier().register_forward_pre_hook(
        lambda _, given: inputs.append(given[0].float().cpu())
    )
    with eval_no_grad(model):
        for images, of_batch in whole_images(tuning, source, OrderedSampler(len(source), 0, 1)):
            labels.append(of_batch)
            for view in (images, images.flip(-1))[:views]:
                model(view)
    hook.remove()
    model.cpu()
    return [torch.cat(inputs[number::views]) for number in range(views)], torch.cat(labels)


@torch.no_grad()
def begin_by_frozen_features(module: FinetuneModule, images: Source) -> None:
    """Sets a classifier's head to logistic regression on its features before the first step, norm and average alike."""
    model, end = module.model, module.model.get_classifier()
    (features,), labels = frozen_features(model, module.tuning, images)
    if module.tuning.head_norm:
        norm, end = end
        norm.running_mean.copy_(features.mean(dim=0))
        norm.running_var.copy_(features.var(dim=0, correction=0))
        features = norm.eval()(features)
        norm.train()
    begin_head(end, features, labels, binary=module.tuning.loss == "binary")
    if module.average is not None:
        module.average.load_state_dict(model.state_dict())


def why_not_mirrored(model: Any, tuning: Tuning, source: Source) -> str:
    """What speaks against mirroring images of this kind, as of digits; empty where nothing does."""
    seen = round(_MIRRORED_SHARE * tuning.steps * tuning.batch_size)
    count = min(len(source), _MIRRORED_MOST, seen)
    if count < _MIRRORED_LEAST or not isinstance(
        model.get_classifier(), nn.Linear
    ):  # two heads, or a convolution
        return ""
    chosen = np.sort(np.random.default_rng(0).permutation(len(source))[:count])
    tried = copy.deepcopy(model)  # its batch norm may change
    (whole, mirrored), labels = frozen_features(tried, tuning, Subset(source, chosen), mirrored=True)
    right, still_right = right_out_of_fold(whole, mirrored, labels)
    lost, won = int((right & ~still_right).sum()), int((still_right & ~right).sum())
    rare = lost - won > _MIRRORED_DEVIATIONS * math.sqrt(lost + won)  # by chance they are about as many
    if not rare or still_right.sum() >= _MIRRORED_RIGHT * right.sum():
        return ""
    return f"by frozen features {right.mean():.0%} of {count:,} images are right, mirrored {still_right.mean():.0%}"


class HeldOutAccuracy(Measurement):
    """The accuracy of the classifier on held-out images."""

    def __init__(self, images: TrainDataset, *common: Any) -> None:
        super().__init__(*common)
        self.images = images

    def measure(self, trainer: L.Trainer, module: Any, step: int) -> dict[str, float]:
        """The share of images that are classified rightly, over all processes."""
        sampler = OrderedSampler(len(self.images), trainer.global_rank, trainer.world_size)
        counts = torch.zeros(2, device=module.device)
        for batch in make_loader(self.images, sampler, min(self.batch_size, len(sampler)), workers=0):
            images = module.normalize(batch["views"][0].to(module.device))
            labels = batch["labels"].to(module.device)
            with trainer.precision_plugin.forward_context():
                predicted = module.tested(images).argmax(dim=1)
            counts += torch.stack([(predicted == labels).sum(), torch.ones_like(labels).sum()])
        counts = trainer.strategy.reduce(counts, reduce_op="sum") if trainer.world_size > 1 else counts
        return {"held_out_accuracy": float(counts[0] / counts[1])}


@dataclass
class FinetuneJob(TrainingJob):
    """A fine-tuning of one model on some of the training images."""

    data: LabelledData
    train: np.ndarray = field(kw_only=True)  # numbers of the training images whose labels are used
    # whether the plan of such a run was printed already, with another seed or other labels
    short: bool = False
    _classifier: Network | None = None

    method, command, product = "finetune", "evaluate finetune", "classifier"
    metrics, numbers, decides = ["loss", "held_out_accuracy"], Tuning, DECIDING

    def trained_on(self) -> Source:
        return Subset(self.data.source, self.train)

    def labels_decide(self) -> dict[str, Any]:
        return {"labels of the images": hash_of(self.data.labels[self.train])}

    def plan(self) -> tuple[Tuning, dict[str, Any], Source]:
        asked = self.asked
        share = held_out_share(asked["held_out"], len(self.train))
        train, held_out = self.data.parted(self.train, share, self.seed)
        plan = FinetunePlan(asked, job=self, network=self._make(0.0), images=len(train), held_out=share)
        tuning = plan.resolve()
        network = self._classifier = self._make(tuning.drop_path)
        if network.notes and asked["drop_path"] not in (None, AUTO):
            raise UserError(f"drop_path ({asked['drop_path']}) must be left out: {network.notes[0]}")
        if asked["flip"] == AUTO:
            with translate_errors(RunFolder(self.folder), vars(tuning)):
                why_not = why_not_mirrored(network.model, tuning, Subset(self.data.source, train))
            tuning, plan.reasons["flip"] = replace(tuning, flip=not why_not), why_not
        say()
        if self.short:  # what tells it from the one whose plan was printed before
            say(
                f"training    {len(train):,} images, {tuning.steps:,} steps of {tuning.batch_size}, learning rate "
                f"{tuning.lr:.3g}, {tuning.warmup_steps:,} steps of warm-up; the rest as before"
            )
            if "threads" in plan.reasons:
                say(f"threads     {plan.reasons['threads']}")
        else:
            for line in plan.lines(tuning, network, len(held_out)):
                say(line)
        about = {
            "data": from_anywhere(comparable(asked["data"])),
            "labels": from_anywhere(asked["labels"]),
            "pages": asked["pages"],
            "split": asked["train_split"],
            "splits_in": str(SPLITS.absolute()),
        }
        return tuning, about, Subset(self.data.source, train)

    def task(self, run: RunFolder, numbers: Tuning) -> Task:
        network = self._classifier or self._make(numbers.drop_path)
        parts = self.data.parted(self.train, numbers.held_out, numbers.seed)
        train, held_out = (Subset(self.data.source, part) for part in parts)
        module = FinetuneModule(network.model, numbers, len(self.data.class_names))
        if numbers.head_fitted and not any(run.checkpoints.glob("*.ckpt")):
            if not self.short:
                say(f"head        on frozen features of {counted(len(train), 'image')} first")
            with translate_errors(run, vars(numbers)):
                begin_by_frozen_features(module, train)
        torch.manual_seed(numbers.seed)  # of drop path
        if numbers.accelerator in ("cpu", "cuda") and self.model.opened.backbone.is_cnn:
            module.to(memory_format=torch.channels_last)
        lines = _FEW_LINES if self.short else LINES_A_RUN

        def callbacks(monitor: Monitor) -> list[L.Callback]:
            if not len(held_out):
                return []
            images = make_dataset(held_out, numbers, augmented=False)
            at_once = max(numbers.images_at_once, 64)
            return [HeldOutAccuracy(images, monitor, numbers.validate_every_steps, at_once)]

        def export(trainer: L.Trainer, module: Any, step: int) -> None:
            if trainer.is_global_zero:
                metadata = {
                    "version": __version__,
                    "method": self.method,
                    "model": self.model.text,
                    "run": run.path.name,
                    "recipe": numbers.recipe,
                    "data": self.data.source.fingerprint(),
                    "value_range": numbers.value_range,
                    "step": step,
                }
                height, width = numbers.image_size
                write_timm_folder(
                    without_head_norm(module.tested) if numbers.head_norm else module.tested,
                    run.path / CLASSIFIER,
                    input_size=(numbers.channels, height, width),
                    mean=numbers.mean,
                    std=numbers.std,
                    metadata=metadata,
                    crop_pct=numbers.crop_share,
                    label_names=self.data.class_names,
                )

        dataset = make_dataset(train, numbers, augmented=True)
        return make_task(run, numbers, module, dataset, export, callbacks=callbacks, lines=lines)

    def end(self, run: RunFolder, summary: Mapping[str, Any]) -> None:
        """Print how it ended and where its classifier lies."""
        measured = summary.get("held_out_accuracy")
        accuracy = f", {measured:.1%} right on held-out images" if measured is not None else ""
        say(
            f"done        {counted(summary['steps'], 'step')} in {readable_time(summary['seconds'])}{accuracy}"
        )
        say(f"classifier  {run.path / CLASSIFIER}")

    def _make(self, drop_path: float) -> Network:
        return make_classifier(self.model.opened, len(self.data.class_names), drop_path, self.seed)


def make_dataset(source: Source, tuning: Tuning, augmented: bool) -> TrainDataset:
    """Images as the classifier sees them, whatever their channels: ``augmented``, or the centered windows of a test."""
    geometry: Geometry
    if augmented:
        fill = [min(255, round(255 * value)) for value in tuning.mean] if tuning.channels == 3 else [0, 0, 0]
        geometry = AugmentedGeometry(
            image_size=(tuning.train_size[0], tuning.train_size[1]),
            scale=(tuning.crop_scale[0], tuning.crop_scale[1]),
            horizontal_flip=0.5 if tuning.flip else 0.0,
            augment=tuning.augment,
            fill=(fill[0], fill[1], fill[2]),
        )
    else:
        size = (tuning.image_size[0], tuning.image_size[1])
        geometry = Geometry(size, crop="center", horizontal_flip=0.0, center_share=tuning.crop_share)
    values = ValueRange.parse(tuning.value_range) or ValueRange()
    return TrainDataset(source, [geometry], values, tuning.channels, convert_channels=True, seed=tuning.seed)


def predict_images(
    run: RunFolder, data: LabelledData, test: np.ndarray, config: EvalConfig
) -> tuple[np.ndarray, np.ndarray, str]:
    """What a run's classifier predicts of test images.

    Returns:
        The class of each image that could be read, the numbers of those images, and what is wrong, if anything.
    """
    model = ClassifierModel(str(run.path), data.class_names, config.windows.crop)
    source = Subset(data.source, test)
    model.prepare(source, config.compute.device)
    table = compute_features(model, source, "end", config.compute)
    say_left_out(table.skipped)
    logits = table.values[LOGITS][table.read]
    broken = not_finite(logits)
    error = f"the logits of {broken:,} images are not finite; no result" if broken else ""
    return logits.argmax(axis=1), test[table.read], error


class Finetune(Protocol):
    """All weights learn from labels.

    Args:
        options: of the command.
        frozen_too: whether models are measured frozen beside, which raw pixels can be.
    """

    title = "fine-tuned, evaluated after the last step"
    seeds: Sequence[int] = (0,)

    def __init__(self, options: Mapping[str, Any], frozen_too: bool = False) -> None:
        self.options, self.frozen_too = options, frozen_too
        self.headline = "all labels" if options["shots"] is None else shot_name(str(options["shots"]))

    def compute_of(self, options: Mapping[str, Any]) -> ComputeConfig:
        return ComputeConfig.of({**options, "batch_size": "auto", "precision": "32", "cache": True})

    def open(self, config: EvalConfig) -> None:
        models = [text for text in config.models if not (self.frozen_too and text == PIXELS)]
        check_no_problems(models, "fine-tuned", "supervised baseline", problems(self.options))
        super().open(config)
        words = {name: self.options[name] for name in (*DECIDING, "tune") if name in self.options}
        # mirroring was true by default: folders of repeated commands keep their names
        words["flip"] = {AUTO: True, True: "always"}.get(words["flip"], words["flip"])
        self.root = series_folder(
            config.out, "finetune", words, self.data.source.fingerprint(), self.data.split
        )
        self.run_names = run_names(config.models)
        self.planned: set[str] = set()  # models whose plan has been printed

    def what_differs(self, model: EvalModel) -> list[str]:
        """Training crops are brought to the size, whatever the pre-training's were; so are test images by ``auto``."""
        if not (isinstance(model, BackboneModel) and model.crop == model.opened.trained_crop == "native"):
            return super().what_differs(model)
        (_, height, width), side = model.input_size, min(self.survey.median_size)
        frozen = self.frozen_too or self.config.windows.crop != "auto"
        return [
            *(super().what_differs(model) if frozen else []),
            f"{model.name} was pre-trained on windows of {width}x{height} pixels as they are (crop native), and is "
            f"fine-tuned on crops brought to that size; --image_size {side} keeps about the scale of these images",
        ]

    def context_of(self, model: BackboneModel) -> BackboneModel:
        return model

    def evaluate(self, context: Any, seed: int) -> list[Result]:
        """The classifiers of all rounds as one row."""
        return self.measure(context, self.options, seed, self.headline)

    def measure(
        self, model: BackboneModel, options: Mapping[str, Any], seed: int, variant: str, suffix: str = ""
    ) -> list[Result]:
        """One classifier a round, and their predictions of all test images as one row; ``suffix`` ends run names."""
        data, parts, runs, counts = self.data, [], list[RunFolder](), list[int]()
        for number, fold in enumerate(data.rounds):
            words = f"seed{seed}-fold{number}" if len(data.rounds) > 1 else f"seed{seed}"
            folder = self.root / f"{self.run_names[model.text]}-{words}{suffix}"
            train, short = data.drawn(fold.train, options.get("shots"), seed), model.text in self.planned
            job = FinetuneJob(model, data, self.survey, seed, folder, options, short, train=train)
            run = run_training(job)
            self.planned.add(model.text)
            if rank() == 0 and not options["dry_run"]:
                parts.append(predict_images(run, data, fold.test, self.config))
                runs.append(run)
                counts.append(len(train))
        if not parts:
            return []
        error = next((error for _, _, error in parts if error), "")
        images = np.concatenate([images for _, images, _ in parts])
        predicted = np.empty(0) if error else np.concatenate([predicted for predicted, _, _ in parts])
        config, accuracies = runs[0].config(), [run.summary().get("held_out_accuracy") for run in runs]
        measured = [accuracy for accuracy in accuracies if accuracy is not None]
        metadata = {
            "train_images": " ".join(map(str, counts)),
            "classifier": " ".join(str(run.path) for run in runs),
            **{name: config[name] for name in ("recipe", "steps", "lr")},
            "step_images": config["batch_size"],
            **({"held_out_accuracy": float(np.mean(measured))} if measured else {}),
        }
        row = ClassificationResult(
            model, data, variant, seed, images, predicted, metadata=metadata, error=error
        )
        return [row]
