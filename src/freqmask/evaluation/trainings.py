"""One lifecycle for every evaluation that trains: its numbers, its plan, its run begun, resumed or found finished."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import lightning as L
import torch
from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]
from torch import Tensor, nn

from freqmask.console import counted, rank, readable_bytes, readable_time, say, silence_third_party_loggers
from freqmask.data.loader import TrainDataset, make_loader
from freqmask.data.source import Source
from freqmask.data.values import Survey
from freqmask.errors import UserError
from freqmask.evaluation.eval_model import BackboneModel
from freqmask.interop.formats import PIXELS
from freqmask.timm_models import parameters_behind
from freqmask.training import auto
from freqmask.training.callbacks import Export
from freqmask.training.files import check_writable
from freqmask.training.loop import (
    ScheduledModule,
    Task,
    begin_run,
    check_parts,
    ends,
    find_checkpoint,
    images_at_once,
    keep_threads,
    leave,
    make_sampler,
    train,
)
from freqmask.training.optim import OptimConfig
from freqmask.training.run_folder import RUNS, RunFolder, comparable, from_anywhere

AUTO = "auto"
BETAS = (0.9, 0.999)
PATHS = ("model", "data", "labels", "images", "masks")  # options that may be paths
SHOWN = {
    "images_per_second": "{:.1f} images/s",
    "data_wait_share": "{:.0%} waiting for data",
    "loss": "loss {:.4g}",
    "held_out_accuracy": "held out {:.1%}",
}
# Options that say nothing of how a training is repeated, or that --config of the repeating command has not.
_NOT_REPEATED = ("model", "seeds", "out", "dry_run", "config", "tune", "strength", "feature", "cache")
# Those of the machine may differ when a run is resumed: they do not change what it becomes.
_MACHINE = (
    *("accelerator", "devices", "strategy", "workers", "checkpoint_every_steps", "checkpoint_every_minutes"),
    *("keep_checkpoints", "max_skipped_share", "log_every_steps"),
)
_AS_ASKED = ("image_size", "train_size")  # an option is a side, a resolved number a height and a width


@dataclass(frozen=True, kw_only=True)
class TrainingNumbers:
    """Every number of a training, without any ``auto``, as its ``config.yaml`` records it."""

    steps: int  # optimizer steps
    batch_size: int  # images per optimizer step, over all devices and parts
    accumulate: int  # parts that a device's batch is cut into
    lr: float  # peak learning rate, of the last layer
    warmup_steps: int
    weight_decay: float  # on weights with two dimensions or more
    layer_decay: float  # factor on the learning rate from a layer of the backbone to the one below
    drop_path: float  # share of residual branches dropped in the last block
    flip: bool
    channels: int
    mean: Sequence[float]  # of the channels in [0, 1]
    std: Sequence[float]
    value_range: str  # what becomes [0, 1]
    seed: int  # of fresh weights, order, crops and augmentation
    accelerator: str
    devices: int
    num_nodes: int
    strategy: str
    precision: str
    workers: int
    log_every_steps: int
    checkpoint_every_steps: int
    checkpoint_every_minutes: float
    keep_checkpoints: int
    max_skipped_share: float

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Self:
        """The numbers that a run's ``config.yaml`` records; what else stands there is passed over."""
        values: dict[str, Any] = {name: config.get(name) for name in cls.__dataclass_fields__}
        return cls(**values)

    @property
    def images_at_once(self) -> int:
        """Images of one part of a step on one device."""
        return images_at_once(vars(self))

    @staticmethod
    def check_parts(numbers: Mapping[str, Any]) -> None:
        """Raises a UserError where a step leaves a device and part other images at once than it needs."""

    def optim(self, min_lr: float, warmup_lr: float, power: float | None = None) -> OptimConfig:
        """Learning rate and weight decay over the steps, as ``Schedule`` takes them."""
        decay = self.weight_decay
        return OptimConfig(
            self.lr, min_lr, warmup_lr, self.warmup_steps, self.steps, decay, decay, BETAS, None, power
        )


@dataclass
class Plan(auto.Plan):
    """The numbers of a fine-tuning or a segmentation, and how they are printed."""

    job: TrainingJob = field(kw_only=True)
    network: Any = field(kw_only=True)  # what is trained
    images: int = field(kw_only=True)  # training images

    CHECKPOINTS: ClassVar[int] = 20  # a run

    def take_model(self) -> None:
        """What the model decides, and what is no matter of choice."""
        opened = self.job.model.opened
        self.values |= {"seed": self.job.seed, "flip": self.asked["flip"] in (True, AUTO)}
        self.values["channels"] = opened.input_size[0]
        self.values |= {name: getattr(opened, name) for name in ("mean", "std", "value_range")}

    def length_lines(self, numbers: TrainingNumbers, unit: str, optimizer: str, end: str) -> Iterator[str]:
        """The plan's lines on steps, learning rate and decays."""
        why, epochs = self.why, numbers.steps * numbers.batch_size / self.images
        yield (
            f"training    {counted(numbers.steps, 'step')} of {numbers.batch_size} {unit}{why('batch_size')} = "
            f"{counted(epochs, 'epoch')}{why('steps')}"
        )
        yield (
            f"            {optimizer}, learning rate {numbers.lr:.3g}{why('lr')}, "
            f"{counted(numbers.warmup_steps, 'step')} of warm-up{why('warmup_steps')}, {end}"
        )
        yield (
            f"            weight decay {numbers.weight_decay:g}, layer decay {numbers.layer_decay:g}"
            f"{why('layer_decay')}, drop path {numbers.drop_path:g}"
        )

    def machine_lines(self, numbers: TrainingNumbers) -> Iterator[str]:
        """The plan's lines on where it runs and what it costs."""
        parts = f", batch in {numbers.accumulate} parts" if numbers.accumulate > 1 else ""
        yield (
            f"machine     {numbers.devices} x {numbers.accelerator}, {numbers.precision}{self.why('precision')}, "
            f"{counted(numbers.workers, 'loader worker')}{parts}"
        )
        if "threads" in self.reasons:
            yield f"threads     {self.reasons['threads']}"
        took = readable_time(self.step_seconds() * numbers.steps)
        memory = readable_bytes(self.cost.peak_bytes(numbers.images_at_once))
        yield f"cost        about {took} (measured, where loading keeps up), {memory} of memory"


@dataclass
class TrainingJob(ABC):
    """One training of an evaluation; what differs between fine-tuning and segmentation."""

    model: BackboneModel  # as it was pre-trained
    data: Any  # images, labels or masks, splits
    survey: Survey  # what the images are like
    seed: int
    folder: Path  # of the run
    asked: Mapping[str, Any]  # the command's options

    method: ClassVar[str]  # in config.yaml
    command: ClassVar[str]  # such as ``evaluate finetune``
    product: ClassVar[str]  # what a finished run leaves behind
    metrics: ClassVar[list[str]]  # whose first and last values the summary holds
    numbers: ClassVar[type[TrainingNumbers]]
    decides: ClassVar[Sequence[str]]  # options that decide what a training becomes
    # options beside those of the machine that a resumed run may change
    resumes_with: ClassVar[Sequence[str]] = ()

    @abstractmethod
    def trained_on(self) -> Source:
        """The training images, those held out among them."""

    @abstractmethod
    def labels_decide(self) -> dict[str, Any]:
        """Plain values of the data, beside its images, on which the result depends."""

    @abstractmethod
    def plan(self) -> tuple[TrainingNumbers, dict[str, Any], Source]:
        """Resolve every number and print the plan; the numbers, what else the config holds, the training images."""

    @abstractmethod
    def task(self, run: RunFolder, numbers: Any) -> Task:
        """The training as the loop takes it."""

    @abstractmethod
    def end(self, run: RunFolder, summary: Mapping[str, Any]) -> None:
        """Print how the training ended."""

    def deciding(self) -> dict[str, Any]:
        """Plain values on which the result depends; a run is resumed only where they are the same."""
        values = {name: self.asked[name] for name in self.decides if name in self.asked}
        values |= {"seed": self.seed, "weights of the model": self.model.key()["weights"]}
        values["images"] = self.trained_on().fingerprint()
        return dict(comparable({**values, **self.labels_decide()}))


def run_training(job: TrainingJob) -> RunFolder:
    """Train, or resume, or find that all is done; a dry run writes nothing.

    Raises:
        UserError: the folder holds another run, or the training cannot be resumed.
    """
    run, dry_run = RunFolder(job.folder), job.asked["dry_run"]
    if rank() > 0:
        if dry_run:
            return run  # nothing will be begun that it could wait for
        run.begun()
    if run.path.is_file():
        raise UserError(f"out: {run.path} is a file; give the path of a folder that may be made")
    if not run.exists() and (run.path / "model.safetensors").exists():
        raise UserError(f"out: {run.path} holds a model and no training; give another --out")
    deciding = job.deciding()  # before training: the model's weights are hashed as they were
    notes: list[str] = []
    if run.exists():
        check_same(run, deciding)
        content = job.trained_on().content_stamp()
        if run.state().get("content", content) != content:  # 0.1.0 noted none
            notes = [f"files of the training images were rewritten since; delete {run.path} to train on them"]
    if run.finished():
        say(f"run {run.path} is finished; its {job.product} is taken")
        for note in notes:
            say(f"note: {note}")
        return run
    with silence_third_party_loggers(), keep_threads(), nullcontext() if dry_run else run.held():
        checkpoint = None
        if run.exists():
            numbers, checkpoint = _numbers_to_resume(run, job), find_checkpoint(run, notes)
        else:
            numbers = _begin(run, job, deciding)
        if not dry_run:
            task = job.task(run, numbers)
            summary = train(task, checkpoint, lambda: {"method": job.method, **ends(run, job.metrics)})
            if rank() == 0:
                job.end(run, summary)
            if task.interrupted is not None:  # else a series would go on
                leave(task.interrupted)
    return run


def check_same(run: RunFolder, asked: Mapping[str, Any]) -> None:
    """Raises a UserError where a run was begun with other values than these plain ones."""
    before = run.state().get("deciding", {})
    before.setdefault("labels of the images", asked.get("labels of the images"))  # 0.1.0 noted none
    if before.get("flip") is True and asked.get("flip") == AUTO:
        before["flip"] = AUTO  # the default was true; the run's own config says what it does
    other = [name for name in asked if before.get(name) != asked[name]]
    if other:
        changes = "; ".join(f"{name} was {before.get(name)} and is {asked[name]} now" for name in other)
        raise UserError(f"run {run.path} was begun with other settings: {changes}; give another --out")


def _numbers_to_resume(run: RunFolder, job: TrainingJob) -> TrainingNumbers:
    run.check_whole([one.name for one in fields(TrainingNumbers) if one.type in ("int", "float")], {})
    asked = {name: job.asked.get(name) for name in (*_MACHINE, *job.resumes_with)}
    given = {name: value for name, value in asked.items() if value not in (None, AUTO)}
    if "accelerator" in given:
        given["accelerator"] = auto.pick_device(str(given["accelerator"])).type  # gpu is cuda, as in the plan
    numbers = {**run.config(), **given}
    check_parts(numbers)
    job.numbers.check_parts(numbers)
    return job.numbers.read(numbers)


def _begin(run: RunFolder, job: TrainingJob, deciding: Mapping[str, Any]) -> TrainingNumbers:
    numbers, about, images = job.plan()
    if job.asked["dry_run"]:
        say(f"run         {run.path}    (--dry_run: nothing was trained)")
        return numbers
    say(f"run         {run.path}, seed {job.seed}")
    shared = {
        "method": job.method,
        "model": job.model.text,
        "backbone": str(job.model.opened.module.pretrained_cfg["architecture"]),
    }
    plain = comparable(asdict(numbers))
    state = {
        "deciding": dict(deciding),
        "images": len(images),
        "data": images.fingerprint(),
        "content": job.trained_on().content_stamp(),
    }
    # what `freqmask COMMAND --config` repeats this one training by
    options = {name: value for name, value in job.asked.items() if name not in _NOT_REPEATED}
    options |= {name: plain[name] for name in options if name in plain and name not in _AS_ASKED}
    options |= {"epochs": None}  # the steps say it
    given = {name: value for name, value in comparable(options).items() if value is not None}
    given = {"model": [job.model.text], "seeds": [job.seed], **given}
    # one name of a class may be a file of them
    paths = PATHS if len(given.get("class_names", ())) > 1 else (*PATHS, "class_names")
    given |= {name: from_anywhere(given[name]) for name in paths if name in given}
    repeated = {"command": job.command, "options": given}
    begin_run(run, job.command, {**shared, **about, **plain, **repeated}, state)
    return numbers


def make_task(
    run: RunFolder,
    numbers: TrainingNumbers,
    module: ScheduledModule,
    dataset: TrainDataset,
    export: Export,
    **more: Any,
) -> Task:
    """A training on a dataset as the loop takes it."""
    images = len(dataset.source)

    def batches(trainer: L.Trainer, done: int) -> Any:
        sampler = make_sampler(asdict(numbers), images, trainer, done)
        return make_loader(dataset, sampler, numbers.images_at_once, numbers.workers)

    several = {"sync_batchnorm": numbers.devices > 1 and numbers.accelerator == "cuda"}
    shared: dict[str, Any] = {"shown": SHOWN, "warmup_steps": numbers.warmup_steps, "trainer": several}
    return Task(run, asdict(numbers), module, images, batches, export, **shared, **more)


def check_no_problems(models: Sequence[str], use: str, baseline: str, problems: Iterator[str]) -> None:
    """Raises a UserError with all that is wrong with the options of a training, raw pixels among MODEL included."""
    no_weights = f"model (pixels) must have weights to be {use}; random:NAME is the {baseline}"
    sentences = [*([no_weights] if PIXELS in models else []), *problems]
    if sentences:
        raise UserError("; ".join(sentences))


def train_reached(model: nn.Module, run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Trains all parameters but those on which no output of ``run`` depends: DDP refuses them. Returns the outputs."""
    model.requires_grad_(True).eval()
    with torch.enable_grad():
        outputs = run()
    reached = parameters_behind(outputs)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in reached)
    return outputs


def layer_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Parameters by layer, each with the factor on its learning rate (``lr_scale``) and its weight decay.

    Vectors, positions and tokens get no weight decay. The head's factor is 1, that of the layer below it
    ``layer_decay``, and so on down to the patch embedding.
    """
    spared: set[str] = getattr(model, "no_weight_decay", set)()
    return list(
        param_groups_layer_decay(model, weight_decay, no_weight_decay_list=spared, layer_decay=layer_decay)
    )


def run_names(models: Sequence[str]) -> dict[str, str]:
    """What the runs of each MODEL are called: its last part, told apart where two are alike.

    >>> run_names(["runs/a/backbone", "random:runs/a", "b/a"])
    {'runs/a/backbone': 'a', 'random:runs/a': 'random-a', 'b/a': 'a-2'}
    """
    names: dict[str, str] = {}
    for text in models:
        foreign = text.startswith(("timm:", "random:"))
        path, taken = Path(text.partition(":")[2] if foreign else text), set(names.values())
        name = path.resolve().parent.name if path.name == "backbone" else path.name or path.resolve().name
        prefix = f"{text.partition(':')[0]}-" if foreign else ""
        stem = re.sub(r"[^\w.-]+", "_", prefix + name).strip("_")
        free = (f"{stem}-{number}" for number in itertools.count(2))
        names[text] = stem if stem not in taken else next(name for name in free if name not in taken)
    return names


def series_folder(out: Path | None, name: str, *decides: Any) -> Path:
    """The folder of the runs of a series: ``out``, or one in ``runs`` that the same command finds again."""
    words = hashlib.blake2b(json.dumps(decides, default=str).encode(), digest_size=4).hexdigest()
    root = out or RUNS / f"{name}-{words}"
    check_writable(root, folder=True)
    return root
