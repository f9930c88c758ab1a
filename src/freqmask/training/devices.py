"""Over which devices work is spread by processes that we start ourselves."""

from __future__ import annotations

import os

import torch

from freqmask.console import rank
from freqmask.errors import UserError
from freqmask.training.plan import usable_cores

# How many processes a launcher started: torchrun, srun. SLURM_NTASKS will not do: batch scripts and the shells of
# salloc have it, too, without having been started so many times.
_LAUNCHED = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def launched_processes() -> int:
    """How many processes a launcher (torchrun, srun) started; 1 without one."""
    counts = (os.environ.get(name, "") for name in _LAUNCHED)
    return next((int(count) for count in counts if count.isdigit()), 1)


def choose_devices(devices: int | str, first: torch.device, accelerator: str) -> list[torch.device]:
    """The devices of ``--devices``, one process each.

    Args:
        devices: how many; ``auto`` is all GPUs, else one.
        first: what ``--accelerator`` stands for here.
        accelerator: as it was typed: several processes on the CPU have to be asked for.

    Raises:
        UserError: there are not that many.
    """
    here = torch.cuda.device_count() if first.type == "cuda" else 1
    count = here if devices == "auto" else devices
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UserError(f"devices ({devices}) must be a whole number of at least 1, or auto")
    if count == 1:
        return [first]
    if first.type == "cpu":
        _check_cores(count, accelerator)
        return [first] * count
    if count > here:
        raise UserError(
            f"devices ({devices}) must be at most {here}, as many as {first.type} has here; try auto"
        )
    return [torch.device(first.type, number) for number in range(count)]


def _check_cores(count: int, accelerator: str) -> None:
    if accelerator != "cpu":
        raise UserError(
            f"devices ({count}) must be 1 or auto where no GPU is; --accelerator cpu starts {count} processes"
        )
    most = max(usable_cores(), 2)  # two can be tried anywhere
    if count > most:
        raise UserError(f"devices ({count}) must be at most {most} on this CPU, a process a core")


def check_started_once(command: str) -> None:
    """Raises a UserError where a launcher started this command several times: it starts its processes itself.

    Args:
        command: its name.
    """
    started = max(rank() + 1, launched_processes())
    if started > 1:
        raise UserError(
            f"{command} was started {started} times (torchrun, srun) and starts its processes itself; start it "
            f"once, with --devices {started}"
        )
