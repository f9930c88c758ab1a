"""Training on two processes, each with half of the batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import VIT, photographs, tiny_method
from two_processes import NETWORKS

SCRIPT = Path(__file__).with_name("two_processes.py")


def run_two(folder: Path) -> list[dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    output = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(output)
    return [torch.load(folder / f"process{rank}.pt") for rank in range(2)]


def train_alone() -> dict[str, torch.Tensor]:
    """What two_processes.py trains last, here with the whole batch."""
    method = tiny_method("folk", VIT, freeze_last_layer_steps=1)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    views = [photographs(8, seed=view) for view in range(2)]
    for step in range(2):
        method(views, torch.arange(8))["loss"].backward()
        method.before_optimizer_step(step, 2)
        optimizer.step()
        method.after_step(step, 2)
        optimizer.zero_grad()
    return method.state_dict()


def test_ddp_trains_networks_that_leave_parameters_unreached_and_folk_as_one_process_would(
    tmp_path: Path,
) -> None:
    first, second = run_two(tmp_path)
    assert first["trained"] == list(NETWORKS)
    for name, value in first["words"].items():  # found by the first process; statistics are each one's own
        assert "running" in name or torch.equal(value, second["words"][name]), name
    assert first["words"]["words.found"]
    one, two, alone = first["folk"], second["folk"], train_alone()
    for name, value in alone.items():
        assert torch.equal(one[name], two[name]), name
        assert torch.allclose(one[name], value, atol=1e-6), name
