"""Several processes that were started from outside (torchrun, SLURM): they have to agree on one run."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from freqmask.console import rank
from freqmask.errors import UserError
from freqmask.pretraining.resume import CHOSEN_BY_RANK_0
from freqmask.training.runs import RunFolder

PATIENCE = 1800.0  # seconds that the others wait for the first one to look at the data and to write its plan
WORLD = ("WORLD_SIZE", "SLURM_NTASKS")


def started_from_outside() -> int:
    """How many processes a launcher started, 1 without one. Those that Lightning starts itself don't count."""
    if os.environ.get(CHOSEN_BY_RANK_0):
        return 1
    for name in WORLD:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 1


def check_processes(options: Mapping[str, Any]) -> None:
    """Raises a UserError unless the launcher's processes and the options fit, and the run has a name."""
    world = started_from_outside()
    if world == 1:
        return
    if not options["out"]:
        raise UserError(f"out must be given when {world} processes are started from outside: --out RUN")
    asked = options["devices"]
    if asked != "auto" and int(asked) * int(options["num_nodes"]) != world:
        raise UserError(
            f"devices ({asked}) x num_nodes ({options['num_nodes']}) must be the {world} processes that were "
            f"started; try --devices {max(world // int(options['num_nodes']), 1)}"
        )


def wait_for_run(out: str) -> RunFolder:
    """The run that the first process has begun, or goes on with; the others wait for it here.

    Raises:
        UserError: it did not appear.
    """
    run = RunFolder(out)
    until = time.monotonic() + PATIENCE
    while not run.exists():
        if time.monotonic() > until:
            raise UserError(
                f"run ({out}) was not begun by process 0 within {PATIENCE:g} seconds; see its output"
            )
        time.sleep(0.2)
    return run


def follows() -> bool:
    """Whether this process only takes part in a run that the first one chooses."""
    return rank() > 0 and started_from_outside() > 1
