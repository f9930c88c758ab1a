"""Trains methods under DDP as one of two processes; test_two_processes.py starts it twice."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as distributed
from tiny import VIT, photographs, tiny_method
from torch.nn.parallel import DistributedDataParallel

SMALL = {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}
HIERA = {"embed_dim": 16, "stages": (1, 1, 1, 1)}
# networks of which the last stage leaves parameters unreached, or that are asked to stop early
NETWORKS: dict[str, dict[str, Any]] = {
    "convnext": {"backbone": "convnext_atto", "image_size": 32, "model_args": SMALL},
    "hiera": {"backbone": "hiera_tiny_224", "image_size": 64, "model_args": HIERA},
    "maxvit": {"backbone": "maxvit_rmlp_pico_rw_256", "image_size": 32, "stage": 2},
    "mambaout": {"backbone": "mambaout_femto", "image_size": 32, "model_args": SMALL},
    "vit, first block": {**VIT, "stage": 0},
}


def train(name: str, network: dict[str, Any], **settings: Any) -> torch.nn.Module:
    """Two steps on this process's half of a batch; DDP's second step fails where a gradient was missing."""
    rank, size = distributed.get_rank(), network["image_size"]
    method = tiny_method(name, network, **settings)
    wrapped = DistributedDataParallel(method)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    views = [
        photographs(8, size=(size, size), seed=v)[rank * 4 : rank * 4 + 4] for v in range(method.n_views)
    ]
    for step in range(2):
        wrapped(views, torch.arange(8)[rank * 4 : rank * 4 + 4])["loss"].backward()
        method.before_optimizer_step(step, 2)
        optimizer.step()
        method.after_step(step, 2)
        optimizer.zero_grad()
    return method


def main(rank: int, folder: Path) -> None:
    """Trains every network, then words, and FOLK for a comparison with one process."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    trained = [name for name, network in NETWORKS.items() if train("mfm", network)]
    train("distill", VIT, token_weight=1.0)  # DDP passes over a frozen teacher
    words = train("words", VIT)
    folk = train("folk", VIT, freeze_last_layer_steps=1)
    states = {"words": words.state_dict(), "folk": folk.state_dict()}
    torch.save({"trained": trained, **states}, folder / f"process{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
