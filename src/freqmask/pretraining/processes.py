"""Several processes that were started from outside (torchrun, SLURM): they have to agree on one run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from freqmask.console import rank
from freqmask.errors import UserError
from freqmask.pretraining.resume import CHOSEN_BY_RANK_0
from freqmask.training.auto import launched_processes


def started_from_outside() -> int:
    """How many processes a launcher started, 1 without one. Those that Lightning starts itself don't count."""
    return 1 if os.environ.get(CHOSEN_BY_RANK_0) else launched_processes()


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


def follows() -> bool:
    """Whether this process only takes part in a run that the first one chooses."""
    return rank() > 0 and started_from_outside() > 1
