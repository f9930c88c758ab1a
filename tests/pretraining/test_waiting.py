"""Nothing in a training step makes the host wait for the device, and nothing of it is left on the host."""

import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from freqmask.data.augment import DINO_VIEWS, PhotometricAugmentation
from freqmask.methods import build_method
from freqmask.pretraining.task import augmented
from freqmask.training.optim import OptimConfig, build_optimizer

TINY = {"embed_dim": 32, "depth": 1, "num_heads": 1}
HEADS = {"outputs": 16, "hidden_size": 16, "bottleneck_size": 8}
METHODS: dict[str, dict[str, Any]] = {
    "fixed": {"name": "mfm"},
    "com": {"name": "mfm", "filter": "com"},
    "com of each channel": {"name": "mfm", "filter": "com", "magnitude": "each"},
    "energy": {"name": "mfm", "filter": "energy(share=0.9)"},
    "rings": {"name": "mfm", "filter": "rings(edges=[2, 4, 8, 16], share=0.5)"},
    "random bins": {"name": "mfm", "filter": "randombins(fraction=0.5)"},
    "per image, focal": {"name": "mfm", "reduce": "image", "focal": 1.0, "gamma": 2.0},
    "folk": {"name": "folk", **HEADS},
    "folk, one view": {"name": "folk", "views": "one", **HEADS},
    "sr": {"name": "sr"},
    "deblur": {"name": "deblur"},
    "denoise": {"name": "denoise"},
}
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim"}
WAITING_GPU = "error"  # of torch.cuda.set_sync_debug_mode: whatever waits raises


class Waits(TorchDispatchMode):
    """Lists the operators whose result the host must wait for, whatever the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in WAITING:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def stepper(options: dict[str, Any], device: str) -> Callable[[], None]:
    """A whole step: augmentation, method, gradients, clipping, optimiser, moving average."""
    options = dict(options)
    method: Any = build_method(
        options.pop("name"),
        backbone="vit_tiny_patch16_224",
        image_size=32,
        patch_size=8,
        model_args=TINY,
        **options,
    ).to(device)
    optimizer = build_optimizer(method, OptimConfig(1e-3, 0.0, 0.0, 0, 10))
    augmentation: list[nn.Module] = [PhotometricAugmentation(DINO_VIEWS[n]) for n in range(method.n_views)]
    views = [torch.rand(4, 3, 32, 32, device=device) for _ in range(method.n_views)]
    keys = torch.arange(4, device=device)

    def step() -> None:
        loss = method(augmented(views, augmentation, keys), keys, details=True)["loss"]
        loss.backward()
        method.before_optimizer_step(0, 10)
        nn.utils.clip_grad_norm_([p for p in method.parameters() if p.grad is not None], 3.0)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(0, 10)

    return step


@pytest.mark.parametrize("name", METHODS)
def test_a_step_reads_no_number_back(name: str) -> None:
    step = stepper(METHODS[name], "cpu")
    step()  # the first one makes what is kept, such as pair weights
    with Waits() as waits:
        step()
    assert waits.found == []


def test_the_count_finds_a_wait() -> None:
    with Waits() as waits:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
    assert len(waits.found) == 2


def first_obstacle(name: str, mode: FakeTensorMode) -> str:
    """What goes wrong in a step whose tensors only claim to be on a GPU: two devices in one operation, a look."""
    options = dict(METHODS[name])
    method: Any = build_method(
        options.pop("name"),
        backbone="vit_tiny_patch16_224",
        image_size=32,
        patch_size=8,
        model_args=TINY,
        **options,
    )
    with mode:
        for part in method.modules():
            for tensors in (part._parameters, part._buffers):
                for key, tensor in tensors.items():
                    if tensor is not None:
                        moved = torch.empty_strided(
                            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda"
                        )
                        tensors[key] = nn.Parameter(moved) if isinstance(tensor, nn.Parameter) else moved
        optimizer = build_optimizer(method, OptimConfig(1e-3, 0.0, 0.0, 0, 10))
        augmentation: list[nn.Module] = [
            PhotometricAugmentation(DINO_VIEWS[n]) for n in range(method.n_views)
        ]
        views = [torch.rand(4, 3, 32, 32, device="cuda") for _ in range(method.n_views)]
        keys = torch.arange(4, device="cuda")
        try:
            parts = method(augmented(views, augmentation, keys), keys, details=True)
            for parameter in method.parameters():  # the backward pass itself needs a GPU
                parameter.grad = torch.empty_like(parameter)
            method.before_optimizer_step(0, 10)
            nn.utils.clip_grad_norm_([p for p in method.parameters() if p.grad is not None], 3.0)
            optimizer.step()
            method.after_step(0, 10)
        except Exception as error:
            return str(error)
    devices = {part.device.type for part in parts.values()}
    return "" if devices == {"cuda"} else f"on {devices}"


def first_obstacles() -> dict[str, str]:
    mode = FakeTensorMode()
    return {name: first_obstacle(name, mode) for name in METHODS}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")
def test_a_step_has_everything_on_the_device() -> None:
    """In a process of its own, because tables that are remembered would be without values here, too."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert {name: found for name, found in pool.apply(first_obstacles).items() if found} == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", METHODS)
def test_a_step_does_not_wait_for_the_gpu(name: str) -> None:
    step = stepper(METHODS[name], "cuda")
    step()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(WAITING_GPU)
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
