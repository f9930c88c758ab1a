"""Lightning's Trainer, with everything that we do ourselves switched off."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment

from freqmask.training.checkpoint import AtomicCheckpointIO
from freqmask.training.devices import launched_processes
from freqmask.training.heap import keep_freed_memory
from freqmask.training.runs import RunFolder


def make_trainer(
    run: RunFolder,
    options: Mapping[str, Any],
    total_steps: int,
    callbacks: Sequence[L.Callback],
    *,
    strategy: Any = None,
    logger: Any = False,
    sync_batchnorm: bool = False,
) -> L.Trainer:
    """A Trainer that counts optimiser steps and leaves sampler, checkpoints, progress and validation to us.

    On the CPU it also tells the allocator to keep what a step frees.

    Args:
        run: whose folder it works in.
        options: resolved: accelerator, devices, num_nodes, strategy, precision, accumulate.
        total_steps: optimiser steps of the whole training.
        callbacks: in the order in which they are called.
        strategy: instead of the option.
        logger: Lightning's, or False.
        sync_batchnorm: whether batch norm gathers its statistics over all devices.
    """
    if options["accelerator"] == "cpu":
        keep_freed_memory()
    return L.Trainer(
        accelerator=options["accelerator"],
        devices=options["devices"],
        num_nodes=options["num_nodes"],
        strategy=options["strategy"] if strategy is None else strategy,
        precision=options["precision"],
        max_steps=total_steps,
        max_epochs=-1,
        accumulate_grad_batches=options["accumulate"],
        callbacks=list(callbacks),
        logger=logger,
        plugins=[AtomicCheckpointIO(), *_environment()],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        log_every_n_steps=1,
        sync_batchnorm=sync_batchnorm,
        default_root_dir=run.path,
    )


def _environment() -> list[ClusterEnvironment]:
    """Lightning takes the mere presence of SLURM's variables for having been started by srun; a shell has them, too."""
    return [LightningEnvironment()] if launched_processes() == 1 and "SLURM_NTASKS" in os.environ else []
