"""What `auto` stands for, each value with its reason; what a training costs; on which devices it runs."""

from __future__ import annotations

import copy
import math
import os
import re
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn

from freqmask.console import counted
from freqmask.errors import UserError, nearest
from freqmask.training.optim import BASE_LR, scaled_lr

IMAGE_SIZES = (32, 64, 96, 128, 160, 192, 224)
# of MFM and FOLK nothing can be judged before about 5,000 (docs/methods.md, small pictures)
ENOUGH_STEPS, TARGET_STEPS, SMALL_BATCH = 5_000, 10_000, 64
PUBLISHED_EPOCHS, MOST_EPOCHS = 300, 1_600
SECONDS_A_ROW = 5.0
TINY_WEIGHTS = 8_000_000  # experience: networks smaller than this want more than the published learning rate
MOST_TINY_LR = 4e-3  # more was never tried; large batches on GPUs would ask for it
MORE_FOR_TINY = f"since networks below {TINY_WEIGHTS // 10**6} million weights learn more with it"
BYTES_A_TRAINED_WEIGHT = 16  # weight, gradient and AdamW's two moments in float32
BYTES_A_FROZEN_WEIGHT = 4
ROUNDS, ROUNDS_SECONDS = 10, 3.0  # of measuring what a step costs: at most so many, and no more after so long
# A pass of few images is mostly what every pass costs: with 4 of 32 pixels a ResNet-10t was four times as dear an image
# as with 64 on a CPU. So more are taken at once, until that makes an image no cheaper or a pass is too long.
CHEAPER, PASS_SECONDS, MOST_AT_ONCE = 0.8, 0.25, {"cpu": 64, "cuda": 256}
CGROUP = Path("/sys/fs/cgroup")  # what a container may take, and has taken, of memory


class Choice(NamedTuple):
    """A resolved value and the reason for it."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Cost:
    """What one image costs in training, measured on this device."""

    seconds_per_image: float  # forward and backward of one image (all its views)
    bytes_per_image: int  # what the forward keeps for the backward
    fixed_bytes: int  # weights, gradients and optimizer state
    images: int = 4  # at once, of which it was measured

    def seconds(self, steps: int, images_a_step_a_device: int) -> float:
        """Wall time of the training where the loader keeps up."""
        return self.seconds_per_image * steps * images_a_step_a_device

    def peak_bytes(self, images_at_once: int) -> int:
        """Memory at the height of a step."""
        return self.fixed_bytes + self.bytes_per_image * images_at_once


@dataclass
class Plan:
    """The numbers of a training as they come together, each with the reason for those that were not given."""

    asked: Mapping[str, Any]  # the options as they were given
    values: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    cost: Cost = field(init=False)  # of an image

    def take(self, name: str, value: Any, reason: str = "") -> None:
        """What was asked for, else this value."""
        asked = self.asked.get(name)
        if asked in (None, "auto"):
            self.values[name], self.reasons[name] = value, reason
        else:
            self.values[name] = asked

    def why(self, *names: str) -> str:
        """The reasons for numbers, each in brackets; nothing where they were given."""
        return "".join(f" ({self.reasons[name]})" for name in names if self.reasons.get(name))

    def take_machine(self, **fixed: Any) -> torch.device:
        """Accelerator, devices, precision and loader workers, beside what is fixed of the machine."""
        device = pick_device(self.asked["accelerator"])
        self.values |= {"accelerator": device.type, **fixed}
        count = torch.cuda.device_count() if device.type == "cuda" else 1
        self.take("devices", count, "all of them" if count > 1 else "one device here")
        self.take("workers", *choose_workers(device.type == "cuda", int(self.values["devices"])))
        asked = self.asked.get("precision")  # where it is given nothing is measured
        self.take("precision", *(choose_precision(device.type) if asked in (None, "auto") else (asked,)))
        return device

    def take_cost(
        self,
        module: nn.Module,
        shape: Sequence[int],
        loss: Callable[[Any, Tensor], Tensor],
        batch: int,
        images: int = 4,
    ) -> tuple[nn.Module, Callable[[int], Tensor]]:
        """Measure time and memory of an image, on a copy so that the module stays as it was.

        Args:
            module: what will be trained.
            shape: (channels, height, width) of a training image.
            loss: of the copy and random images.
            batch: the largest that `auto` would take.
            images: how many at once; more, up to what a pass of the training may have, where that makes one cheaper.

        Returns:
            The copy, and its loss for a number of random images.
        """
        device, precision = torch.device(self.values["accelerator"]), str(self.values["precision"])
        trial = copy.deepcopy(module).to(device).train()
        kind = torch.bfloat16 if "bf16" in precision else torch.float16

        def trial_loss(count: int) -> Tensor:
            samples = torch.rand(count, *shape, device=device)
            with torch.autocast(device.type, kind, enabled="mixed" in precision):
                return loss(trial, samples)

        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            asked, parts = (self.asked.get(name) for name in ("batch_size", "accumulate"))
            a_device = (asked if isinstance(asked, int) else batch) // world_size(self.values)
            most = max(a_device // (parts if isinstance(parts, int) else 1), 1)
            self.cost = measure_cost(trial, trial_loss, device, images, most)
            may = device.type == "cpu" and world_size(self.values) == 1 and not threads_are_asked()
            while may and (reason := _take_fewer_threads(trial_loss, self.cost)):
                self.reasons["threads"] = reason
                self.cost = measure_cost(trial, trial_loss, device, images, most)
            trial.zero_grad(set_to_none=True)
        return trial, trial_loss

    def take_batch(self, choose: Callable[[Cost, str, int, int], Choice]) -> tuple[int, int]:
        """Batch size and its parts, from the cost, the devices and their memory.

        Returns:
            Images of a part, and those that do not divide.
        """
        values, memory = self.values, usable_memory(torch.device(self.values["accelerator"]))
        processes = world_size(values)
        self.take("batch_size", *choose(self.cost, values["accelerator"], processes, memory))
        batch = int(values["batch_size"])
        if batch % processes:
            raise UserError(
                f"batch_size ({batch}) must be a multiple of the {processes} devices; "
                f"try --batch_size {-(-batch // processes) * processes}"
            )
        self.take("accumulate", *choose_accumulation(self.cost, batch // processes, memory))
        return divmod(batch // processes, int(values["accumulate"]))

    def take_records(self, checkpoints: int) -> None:
        """How often metrics and this many checkpoints are written, once steps and cost are known."""
        values, steps = self.values, int(self.values["steps"])
        row = round(SECONDS_A_ROW / max(self.step_seconds(), 1e-6))
        self.take("log_every_steps", max(1, min(row, steps // 20, 100)), "about five seconds")
        self.take("checkpoint_every_steps", math.ceil(steps / checkpoints), f"{checkpoints} times a run")
        for name in ("checkpoint_every_minutes", "keep_checkpoints", "max_skipped_share"):
            values[name] = self.asked[name]

    def step_seconds(self) -> float:
        """Time of an optimizer step where the loader keeps up."""
        return self.cost.seconds(1, int(self.values["batch_size"]) // world_size(self.values))


def choose_image_size(median_side: int) -> Choice:
    """The largest usual size that the median image fills, so that no empty frequencies are made up."""
    fitting = [size for size in IMAGE_SIZES if size <= median_side]
    if not fitting:
        return Choice(IMAGE_SIZES[0], f"the smallest we use; the median shorter side is {median_side}")
    return Choice(fitting[-1], f"the median shorter side is {median_side}")


def choose_patch_size(image_size: int, backbone: str) -> Choice | None:
    """Smaller patches for small pictures: about 14 patches a side, as 224 pixels have at patch 16."""
    if "patch" not in backbone or image_size >= 192:
        return None
    patch = next(size for size in (16, 8, 4, 2, 1) if size * 8 <= image_size or size == 1)
    return Choice(patch, f"{image_size // patch}x{image_size // patch} patches of a {image_size}-pixel image")


def largest_batch(device: str, images: int) -> int:
    """256 (a GPU: 1,024), or what the data fill eight times, at least 8."""
    return max(min(1024 if device == "cuda" else 256, images // 8), 8)


def choose_batch_size(
    cost: Cost, images: int, device: str, devices: int, memory: int, seconds: float | None = None
) -> Choice:
    """The largest power of two up to 256 (a GPU: 1,024) that memory holds and the data fills eight times.

    Devices whose number is no power of two get a little less, so that it divides.

    Args:
        cost: of an image.
        images: training images.
        device: ``"cuda"`` or another type.
        devices: that share a batch.
        memory: bytes that each may take.
        seconds: of the training; where they hold fewer than 5,000 steps the batch is smaller, down to 64.
    """
    fits = max(int((memory - cost.fixed_bytes) / max(cost.bytes_per_image, 1)), 1) * devices
    wanted = largest_batch(device, images)
    value = 2 ** int(math.log2(max(min(fits, wanted), 1)))
    usual = "a usual batch" if wanted == largest_batch(device, 2**30) else "the number of images"
    limit = "memory" if fits < wanted else usual
    value = max(value, devices)
    while seconds is not None and value >= 2 * max(SMALL_BATCH, devices):
        if seconds >= ENOUGH_STEPS * cost.seconds(1, value // devices):
            break
        value //= 2
        limit = f"the time, so that it holds {ENOUGH_STEPS:,} steps, or as many as it can"
    pairs = 2 * devices if value >= 2 * devices else devices  # images are mixed in pairs
    return Choice(value - value % pairs, f"bounded by {limit}")


def choose_accumulation(cost: Cost, batch_a_device: int, memory: int) -> Choice:
    """The fewest parts that a device's batch has to be cut into so that one part fits into memory."""
    for parts in range(1, batch_a_device + 1):
        at_once = batch_a_device // parts
        if batch_a_device % parts == 0 and cost.peak_bytes(at_once) <= memory:
            return Choice(parts, "the batch fits at once" if parts == 1 else f"{at_once} images fit at once")
    return Choice(batch_a_device, "even one image at once may not fit into memory")


def choose_lr(batch_size: int, weights: int, tiny_lr: tuple[float, int], trained: bool) -> Choice:
    """The peak learning rate: as published, for small networks the method's own (``tiny_lr``: rate, for a batch of)."""
    if weights < TINY_WEIGHTS:
        base, of = tiny_lr
        rate = min(scaled_lr(base, batch_size, of), MOST_TINY_LR)
        why = f"{base:g} x batch/{of}, {MORE_FOR_TINY}"
    else:
        rate, why = scaled_lr(BASE_LR, batch_size), "3e-4 x batch/512, as published"
    if trained:
        return Choice(rate / 4, f"a quarter of {why}, since the weights are trained already")
    return Choice(rate, why)


def choose_epochs(images: int, batch_size: int) -> Choice:
    """The published 300 epochs, or more where that makes fewer than 10,000 steps, at most 1,600."""
    steps_an_epoch = max(images / batch_size, 1e-9)
    needed = math.ceil(TARGET_STEPS / steps_an_epoch)
    if needed <= PUBLISHED_EPOCHS:
        return Choice(PUBLISHED_EPOCHS, "as published")
    if needed <= MOST_EPOCHS:
        why = f"{TARGET_STEPS:,} steps: the published {PUBLISHED_EPOCHS} epochs would be fewer"
        return Choice(needed, why)
    return Choice(MOST_EPOCHS, f"the most we give to {images:,} images")


def choose_workers(on_gpu: bool, devices: int = 1) -> Choice:
    """All cores feed the GPUs, each its share; on a CPU the training itself needs them, so a quarter loads."""
    cores = usable_cores()
    if on_gpu:
        return Choice(max(min(cores // devices, 32), 1), f"{cores} cores feed {counted(devices, 'GPU')}")
    use = "most of them for" if cores > 1 else "shared with"
    return Choice(max(cores // 4 // devices, 1), f"{counted(cores, 'core')}, {use} the training itself")


def world_size(numbers: Mapping[str, Any]) -> int:
    """Processes of a training: devices times nodes."""
    return int(numbers["devices"]) * int(numbers["num_nodes"])


def choose_precision(accelerator: str) -> Choice:
    """bf16 where the device computes it faster, else float32."""
    if accelerator == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return Choice("bf16-mixed", "this GPU computes bf16 natively")
    if accelerator != "cpu":
        return Choice("32-true", "bf16 is no faster on this device")
    gain = bf16_gain()
    why = f"this CPU computes bf16 {gain:.2g} times as fast as float32, measured now"
    return Choice("bf16-mixed" if gain * CHEAPER > 1 else "32-true", why)


@cache
def bf16_gain() -> float:
    """How many times as fast this CPU multiplies matrices in bf16 as in float32."""
    # instructions do not tell: with AVX512-bf16 Zen 4 trains a ViT-S 1.4 times as fast, Emerald Rapids 0.62 times
    one, threads = torch.ones(256, 256), torch.get_num_threads()
    torch.set_num_threads(1)  # beside other programs two wait for each other, and longer products are cut
    try:
        products = (partial(torch.mm, matrix, matrix) for matrix in (one, one.bfloat16()))
        exact, half = (min(timeit.repeat(product, number=1, repeat=16)) for product in products)
    finally:
        torch.set_num_threads(threads)
    return exact / half


def usable_cores() -> int:
    """Cores that this process may use, which a container or a scheduler may have cut down."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_are_asked() -> bool:
    """Whether somebody chose how many threads torch takes on a CPU."""
    return any(name in os.environ for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))


def usable_memory(device: torch.device) -> int:
    """Bytes that a training may take: 80 % of what is free on the device."""
    return int(free_memory(device) * 0.8)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device, or in the host for a device without memory of its own."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    for part, words in (("", "max current stat"), ("memory", "limit_in_bytes usage_in_bytes stat")):
        with suppress(OSError, ValueError):  # a file that is not here, or no limit
            limit, taken, counts = ((CGROUP / part / f"memory.{word}").read_text() for word in words.split())
            # what was read of files is given up for whoever asks; the last two are those of the groups inside, too
            cached = re.findall(r"^(?:total_)?(?:in)?active_file (\d+)", counts, re.MULTILINE)[-2:]
            free = min(free, max(int(limit) - int(taken) + sum(map(int, cached)), 0))
    return free


def measure_cost(
    module: nn.Module,
    loss: Callable[[int], Tensor],
    device: torch.device,
    images: int = 4,
    most: int = 2**30,
) -> Cost:
    """Time and memory of one image, from a few forward and backward passes; of their times the shortest counts.

    Args:
        module: whose parameters are counted; its gradients are cleared afterwards.
        loss: makes the loss of a number of images.
        device: where it runs.
        images: how many at once; four times as many, and so on, while that makes an image cheaper.
        most: at once; no more than fill a device of this kind.
    """
    trained = sum(p.nelement() for p in module.parameters() if p.requires_grad)
    frozen = sum(p.nelement() for p in module.parameters() if not p.requires_grad)
    fixed, memory = trained * BYTES_A_TRAINED_WEIGHT + frozen * BYTES_A_FROZEN_WEIGHT, usable_memory(device)
    kept = _bytes_kept(loss, images) // images
    times, most = _two_timed(loss, images, device), min(most, MOST_AT_ONCE.get(device.type, images))
    while (more := min(4 * images, most)) > images and min(times) < PASS_SECONDS:
        if fixed + 2 * more * kept > memory:
            break
        try:
            found = _two_timed(loss, more, device)
        except RuntimeError as error:
            # what is kept for the backward pass is not all that a pass takes: a teacher keeps nothing
            if not is_out_of_memory(error):
                raise
            break
        is_cheaper = min(found) / more < CHEAPER * min(times) / images
        times, images = found, more
        if not is_cheaper:
            break
    kept = _bytes_kept(loss, images) // images
    while len(times) < ROUNDS and sum(times) < ROUNDS_SECONDS:  # other programs disturb some of them
        times.append(_timed(loss, images, device))
    module.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # or what these passes took would count as taken
    return Cost(min(times) / images, kept, fixed, images)


def _take_fewer_threads(loss: Callable[[int], Tensor], cost: Cost) -> str:
    """Half of the threads from now on, if that makes an image cheaper on this CPU; the reason, empty where it does not.

    Where another program has a core, the other threads of a pass wait for the one that has none: torch's convolutions
    in bf16 on two cores with one of them taken made 10 to 19 images/s by two threads and 330 by one (alone 640, 320).
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return ""
    torch.set_num_threads(threads // 2)
    fewer = min(_two_timed(loss, cost.images, torch.device("cpu"))) / cost.images
    if fewer < CHEAPER * cost.seconds_per_image:
        return (
            f"{threads // 2}, since with {threads} an image takes longer now: other programs want the cores, or there "
            "is too little to share; OMP_NUM_THREADS decides otherwise"
        )
    torch.set_num_threads(threads)
    return ""


def _bytes_kept(loss: Callable[[int], Tensor], images: int) -> int:
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        if not isinstance(tensor, nn.Parameter):
            kept += tensor.nelement() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss(images).backward()
    return kept


def _two_timed(loss: Callable[[int], Tensor], images: int, device: torch.device) -> list[float]:
    # the first pass of a size finds its kernels and its memory
    return [_timed(loss, images, device) for _ in range(2)]


def _timed(loss: Callable[[int], Tensor], images: int, device: torch.device) -> float:
    start = seconds_now(device)
    loss(images).backward()
    return seconds_now(device) - start


def seconds_now(device: torch.device) -> float:
    """A clock that first waits for what the device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def check_single_image(loss: Callable[[int], Any], backbone: str) -> None:
    """Raises a UserError where a single image at once leaves batch norm one value a channel: a map of 1x1.

    Args:
        loss: of a number of images, in train mode.
        backbone: its name.
    """
    with translate_lone_image(backbone), torch.no_grad(), torch.random.fork_rng(devices=[]):
        loss(1)


@contextmanager
def translate_lone_image(backbone: str) -> Iterator[None]:
    """A UserError where inside there is one image at once and batch norm needs two."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):  # torch, of batch norm
            raise
        raise UserError(
            f"batch_size, devices and accumulate leave one image at once, and {backbone} ends in a map of 1x1, of "
            "which batch norm needs two; try a larger --batch_size, a smaller --accumulate, or a larger --image_size"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no room left; of the CPU torch says it in a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def pick_device(accelerator: str) -> torch.device:
    """The device of an accelerator's name; ``auto`` is CUDA, then Apple's, then the CPU.

    Raises:
        UserError: it is unknown, or not here.
    """
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if accelerator == "auto":
        return torch.device(next(name for name in here if here[name]))
    name = "cuda" if accelerator == "gpu" else accelerator
    if name not in here:
        raise UserError(f"accelerator ({accelerator}) is unknown; {nearest(name, ('auto', 'gpu', *here))}")
    if not here[name]:
        why = ": torch sees no CUDA device" if name == "cuda" else ""
        raise UserError(f"accelerator ({accelerator}) is not here{why}; try --accelerator cpu")
    return torch.device(name)


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
        if accelerator != "cpu":
            raise UserError(
                f"devices ({count}) must be 1 or auto where no GPU is; --accelerator cpu starts {count} processes"
            )
        most = max(usable_cores(), 2)  # two can be tried anywhere
        if count > most:
            raise UserError(f"devices ({count}) must be at most {most} on this CPU, one process per core")
        return [first] * count
    if count > here:
        raise UserError(
            f"devices ({devices}) must be at most {here}, as many as {first.type} has here; try auto"
        )
    return [torch.device(first.type, number) for number in range(count)]
