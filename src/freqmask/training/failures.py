"""What may go wrong in a training, as sentences with the way out; what other libraries do not say."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from freqmask.data.loader import worker_failure
from freqmask.errors import UserError
from freqmask.training.files import WriteError
from freqmask.training.run_folder import RunFolder

_LONE_VALUE = "more than 1 value per channel"  # torch, of batch norm


def check_single_image(loss: Callable[[int], Any], backbone: str) -> None:
    """Raises a UserError where a single image at once leaves batch norm one value a channel: a map of 1x1.

    Args:
        loss: of a number of images, in train mode.
        backbone: its name.
    """
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            loss(1)
    except ValueError as error:
        if _LONE_VALUE not in str(error):
            raise
        raise lone_image(backbone) from error


def lone_image(backbone: str) -> UserError:
    """The sentence for one image at once where batch norm needs two."""
    return UserError(
        f"batch_size, devices and accumulate leave one image at once, and {backbone} ends in a map of 1x1, of which "
        "batch norm needs two; try a larger --batch_size, a smaller --accumulate, or a larger --image_size"
    )


class NotFiniteError(UserError):
    """The loss became infinite or not a number at a step; the job adds what to do."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss is no longer finite at step {step + 1}")
        self.step = step


@contextmanager
def translate_errors(run: RunFolder, options: Mapping[str, Any]) -> Iterator[None]:
    """Turn what a training dies of into a UserError; what is unknown passes as it is.

    Args:
        run: the run folder.
        options: resolved options.
    """
    # here, because evaluations silence loggers with this file and need no Lightning, which takes seconds to import
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except NotFiniteError as error:
        raise UserError(_not_finite(error, run, options)) from error
    except WriteError as error:
        raise UserError(f"{error}; {_last_good(run)}; with room made, the same command goes on") from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(out_of_memory(options)) from error
    except MisconfigurationException as error:  # devices or nodes that do not fit a launcher or a machine
        raise UserError(" ".join(str(error).split())) from error
    except ValueError as error:
        if _LONE_VALUE not in str(error):
            raise
        raise lone_image(str(options.get("backbone", "the backbone"))) from error
    except RuntimeError as error:
        if "--ntasks" in str(error):  # Lightning's rule for srun
            raise UserError(f"SLURM: {' '.join(str(error).split())}") from error
        if "can't allocate memory" in str(error):  # the CPU's own way to say it
            raise UserError(out_of_memory(options)) from error
        failure = worker_failure(error)
        if failure is None:
            raise
        raise failure from error


def _not_finite(error: NotFiniteError, run: RunFolder, options: Mapping[str, Any]) -> str:
    return (
        f"{error} (learning rate {options['lr']:.3g}, precision {options['precision']}, "
        f"batch {options['batch_size']}); {_last_good(run)}; try --lr {options['lr'] / 2:.2g} "
        "or --precision 32-true with another --out"
    )


def _last_good(run: RunFolder) -> str:
    kept = sorted(run.checkpoints.glob("step-*.ckpt"))
    return f"the last good checkpoint is {kept[-1]}" if kept else "there was no checkpoint yet"


def out_of_memory(options: Mapping[str, Any]) -> str:
    """The sentence for a batch that does not fit: the same batch in smaller parts."""
    peak = (
        f"the peak was {torch.cuda.max_memory_allocated() / 1e9:.1f} GB; "
        if torch.cuda.is_available()
        else ""
    )
    devices = int(options["devices"]) * int(options["num_nodes"])
    at_once = int(options["batch_size"]) // devices // int(options["accumulate"])
    return (
        f"out of memory with {at_once} images at once; {peak}the same batch in smaller parts: "
        f"--batch_size {options['batch_size']} --accumulate {options['accumulate'] * 2}"
    )


LOUD = ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero", "timm")


@contextmanager
def silence_third_party_loggers() -> Iterator[None]:
    """Silence the libraries inside the block, unless FREQMASK_DEBUG is set, and put all back afterwards."""
    if os.environ.get("FREQMASK_DEBUG"):
        yield
        return
    loggers = [logging.getLogger(name) for name in LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
