"""Lightning's Trainer with our sampler, checkpoints and monitors."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger

from freqmask import __version__
from freqmask.console import rank, say
from freqmask.data.in_memory import InMemoryBatches, InMemoryImages
from freqmask.data.loader import TrainDataset, make_loader
from freqmask.data.sampler import TrainSampler
from freqmask.data.source import Source
from freqmask.data.transforms import Geometry
from freqmask.data.values import ValueRange
from freqmask.errors import UserError
from freqmask.evaluation.labelled import LabelledData
from freqmask.pretraining.exporting import BackboneExport
from freqmask.pretraining.heldout import HeldOut, calibration
from freqmask.pretraining.module import PretrainingModule
from freqmask.pretraining.probe import ENOUGH_RANKED, Probe, steps_between
from freqmask.pretraining.resolve import make_augmentation, make_geometries, make_recipe, pick_device
from freqmask.pretraining.sharding import SHARDED, sharding_strategy
from freqmask.training.checkpoint import ExactResume, Saver, StopSignals
from freqmask.training.loop import Outcome, Start, ends, make_trainer
from freqmask.training.monitor import Monitor, Skipped
from freqmask.training.optim import OptimConfig
from freqmask.training.progress import Progress
from freqmask.training.run_folder import RunFolder

SHOWN = {
    "images_per_second": "{:.0f} images/s",
    "data_wait_share": "{:.0%} waiting for data",
    "loss": "loss {:.4g}",
    "reconstruction": "reconstruction {:.4g}",
    "distillation": "distillation {:.4g}",
    "loss_over_zero": "{:.3f} of predicting nothing",
    "collapse": "collapse number {:.2f}",
    "held_out_loss_over_zero": "held out {:.3f}",
    "probe_knn": "k-NN {:.1%}",
    "probe_linear": "linear {:.1%}",
    "rankme": "features of rank {:.1f}",
}
LOSSES = ["loss", "reconstruction", "distillation", "loss_over_zero", "collapse"]
LOOKS = ["held_out_loss", "held_out_loss_over_zero"]
FEATURES = [
    "probe_knn",
    "probe_linear",
    "rankme",
]  # the first of each is of the weights that the run began with


class Fit:
    """One start of a training, new or continued.

    Args:
        run: the run folder, locked.
        options: resolved options.
        train: images to learn from.
        held_out: images to measure the loss on, or None.
        method: what is trained.
        convert: whether images with other channels are converted instead of skipped.
        state: the run's state, traced in the export.
        probed: images with labels to measure features on, or None.
        kept: the decoded images to learn from where they stay on the device, or None.
    """

    def __init__(
        self,
        run: RunFolder,
        options: Mapping[str, Any],
        train: Source,
        held_out: Source | None,
        method: Any,
        convert: bool,
        state: Mapping[str, Any],
        probed: LabelledData | None = None,
        kept: InMemoryImages | None = None,
    ) -> None:
        """Nothing runs yet."""
        self.run_folder = run
        self.options = options
        self.train = train
        self.held_out = held_out
        self.method = method
        self.convert = convert
        self.state = state
        self.probed = probed
        self.kept = kept
        self._looks: HeldOut | None = None
        self.processes = int(options["devices"]) * int(options["num_nodes"])
        self.part = int(options["batch_size"]) // self.processes // int(options["accumulate"])

    def run(self, checkpoint: Path | None) -> Outcome:
        """Train from the checkpoint, or from the beginning, to the end or to a signal."""
        options = self.options
        recipe = make_recipe(options, len(self.train))
        start = Start(self.run_folder, checkpoint, recipe.total_steps, int(options["batch_size"]))
        module = PretrainingModule(self.method, recipe, make_augmentation(options, self.method.n_views))
        self._prepare(module)
        progress = Progress(recipe.total_steps, start.done, SHOWN)
        outcome = start.fit(
            progress,
            module,
            lambda signals: self._trainer(recipe, self._callbacks(progress, recipe, signals)),
            lambda trainer: self._loader(trainer, start.done),
        )
        outcome.summary = self._summary(outcome)
        return outcome

    def _callbacks(self, progress: Progress, recipe: OptimConfig, signals: StopSignals) -> list[L.Callback]:
        options = self.options
        monitor = Monitor(
            self.run_folder,
            progress,
            int(options["log_every_steps"]),
            int(options["batch_size"]),
            len(self.train),
            recipe.warmup_steps,
        )
        self._looks = self._held_out(monitor)
        # rows of a step are written before its checkpoint: a restart from there will not make them again
        return [
            ExactResume(int(options["accumulate"])),
            self._skipped(),
            monitor,
            self._probe(monitor),
            self._looks,
            self._saver(signals, monitor),
        ]

    @property
    def preview(self) -> str | None:
        """The newest preview."""
        return self._looks.preview if self._looks is not None else None

    def _prepare(self, module: PretrainingModule) -> None:
        """Layout and compilation, before the optimiser sees the parameters."""
        backbones = self.method.backbones().values()
        if self.options["accelerator"] in ("cpu", "cuda") and all(b.is_cnn for b in backbones):
            module.to(memory_format=torch.channels_last)  # a ResNet-50 in bf16 on a CPU: 1.22 times as fast
        if self.options["compile"]:
            reason = compile_failure(next(iter(backbones)), self.options)
            if reason is None:
                self.method.compile_backbone()
            else:
                say(f"note: torch.compile cannot be used here ({reason}); going on without it")

    def _trainer(self, recipe: OptimConfig, callbacks: list[L.Callback]) -> L.Trainer:
        options = self.options
        sharded = options["strategy"] in SHARDED
        return make_trainer(
            self.run_folder,
            options,
            recipe.total_steps,
            callbacks,
            strategy=sharding_strategy(self.processes) if sharded else None,
            logger=_logger(options["logger"], self.run_folder),
        )

    def _loader(self, trainer: L.Trainer, done: int) -> Any:
        accumulate = int(self.options["accumulate"])
        geometries = make_geometries(self.options, self.method.n_views)
        sampler = TrainSampler(
            len(self.train),
            self.options["seed"],
            self.part,
            rank=trainer.global_rank,
            world_size=self.processes,
            start_step=done * accumulate,
            total_steps=int(self.options["steps"]) * accumulate,
            blocks=self.train.blocks() if self.kept is None else None,  # kept images are equally near
            workers=int(self.options["workers"]),
        )
        if self.kept is None:
            dataset = self._dataset(self.train, geometries)
            return make_loader(dataset, sampler, self.part, int(self.options["workers"]))
        images = self.kept.to(trainer.strategy.root_device)
        value_range = ValueRange.parse(self.options["value_range"])
        return InMemoryBatches(images, self.train, sampler, geometries, value_range, self.options["seed"])

    def _dataset(self, source: Source, geometries: list[Geometry]) -> TrainDataset:
        options = self.options
        return TrainDataset(
            source,
            geometries,
            ValueRange.parse(options["value_range"]),
            options["channels"],
            convert_channels=self.convert,
            seed=options["seed"],
        )

    def _still(self, source: Source, views: int) -> TrainDataset:
        """The images as an evaluation sees them: centred, unflipped."""
        geometry = Geometry(image_size=self.options["image_size"], crop="center", horizontal_flip=0.0)
        return self._dataset(source, [geometry] * views)

    def _held_out(self, monitor: Monitor) -> HeldOut:
        shown = self.held_out if self.held_out is not None else self.train
        return HeldOut(
            self.run_folder,
            monitor,
            self._still(self.held_out, self.method.n_views) if self.held_out is not None else None,
            self._still(shown, 1),
            int(self.options["preview_every_steps"]),
            min(self.part, 64),
        )

    def _probe(self, monitor: Monitor) -> Probe:
        ranked = (
            self.held_out if self.held_out is not None and len(self.held_out) >= ENOUGH_RANKED else self.train
        )
        return Probe(
            monitor,
            steps_between(self.options, len(self.train)),
            self._still(ranked, 1),
            self._still(self.probed.source, 1) if self.probed is not None else None,
            self.probed,
            min(self.part, 64),
        )

    def _skipped(self) -> Skipped:
        return Skipped(self.run_folder.skipped, len(self.train), self.options["max_skipped_share"])

    def _saver(self, signals: StopSignals, monitor: Monitor) -> Saver:
        options = self.options
        calibrating = self._still(self.train, 1)
        return Saver(
            self.run_folder,
            signals,
            monitor,
            int(options["checkpoint_every_steps"]),
            float(options["checkpoint_every_minutes"]),
            int(options["keep_checkpoints"]),
            BackboneExport(
                self.run_folder,
                lambda: calibration(calibrating, self.method),
                {
                    "mean": options["mean"],
                    "std": options["std"],
                    "facts": {
                        "version": __version__,
                        "run": self.run_folder.path.name,
                        "method": options["method"],
                        "value_range": options["value_range"],
                        "crop": options["crop"],
                        "data": self.state["data"],
                    },
                },
            ),
        )

    def _summary(self, outcome: Outcome) -> dict[str, Any]:
        return {
            "method": self.options["method"],
            "backbone": self.options["backbone"],
            **outcome.summary,
            **ends(self.run_folder, LOSSES),
            **ends(self.run_folder, LOOKS, firsts=False),
            **ends(self.run_folder, FEATURES),
            **ends(self.run_folder, ["pixels_knn", "pixels_linear"], firsts=False),
        }


def compile_failure(backbone: Any, options: Mapping[str, Any]) -> str | None:
    """Why a backbone cannot be compiled here, tried on a copy; None where it can.

    Args:
        backbone: a :class:`freqmask.backbones.Backbone`.
        options: resolved options.
    """
    device = pick_device(options["accelerator"])
    trial = copy.deepcopy(backbone).to(device)
    trial.compile()
    images = torch.zeros(2, backbone.channels, *backbone.image_size, device=device)
    try:
        trial(images).feature_map.sum().backward()
    except Exception as error:  # a missing compiler, an operator it does not know: anything may come
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    finally:
        torch._dynamo.reset()  # else the training's batch, another size, would be compiled for any size: slower
    return None


def _logger(name: str | None, run: RunFolder) -> Logger | bool:
    if name is None:
        return False
    try:
        if name == "tensorboard":
            from lightning.pytorch.loggers import TensorBoardLogger

            return TensorBoardLogger(run.path, name="tensorboard", version="")
        from lightning.pytorch.loggers import WandbLogger

        return WandbLogger(
            name=run.path.name, save_dir=run.path, project="freqmask", id=_wandb_id(run), resume="allow"
        )
    except ModuleNotFoundError as error:
        raise UserError(f"logger ({name}) is not installed; pip install 'freqmask[log]'") from error


def _wandb_id(run: RunFolder) -> str:
    """The id of the run at W&B, drawn once and kept in the state: a run that goes on, goes on there, too."""
    state = run.state()
    if "wandb" not in state and rank() == 0:
        state["wandb"] = secrets.token_hex(4)
        run.write_state(state)
    return str(state.get("wandb", ""))
