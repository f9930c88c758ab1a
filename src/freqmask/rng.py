"""Reproducible randomness: numbers that are a function of a key and of nothing else.

A counter-based hash (the finalizer of splitmix64) turns a 64-bit key, the name of a stream and a position
into bits. There is no state, so a sample's numbers do not depend on its batch, worker, device or on a
restart, and a step can be repeated. The integer part is exact everywhere; the same code runs eager and
compiled, and ``uniform_numbers`` is its twin in plain Python for loader workers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from freqmask.errors import UserError

Keys = Int64[Tensor, " batch"]  # one an image: all of its random numbers come from it

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the step between the counters of splitmix64
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def _signed(number: int) -> int:
    """The int64 with the same 64 bits."""
    return (number + (1 << 63) & _MASK) - (1 << 63)


def identity_of(content: str | bytes) -> int:
    """A signed 64-bit number for a text or some bytes, the same in every process and on every machine.

    Args:
        content: for example a file's path inside its data set.

    Returns:
        The first eight bytes of the BLAKE2b hash.

    >>> identity_of("cat.png") == identity_of(b"cat.png")
    True
    """
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little", signed=True)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _number(value: int | str) -> int:
    """What a stream's name or an integer contributes to the hash, mixed once, as a signed number."""
    return _signed(_mix_number(identity_of(value) if isinstance(value, str) else value))


def _mix_number(number: int) -> int:
    number = (number + _GOLDEN) & _MASK
    number = ((number ^ (number >> 30)) * _FIRST) & _MASK
    number = ((number ^ (number >> 27)) * _SECOND) & _MASK
    return number ^ (number >> 31)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    # int64 shifts drag the sign along; the mask makes the shift a logical one
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    # sums and products of int64 wrap around, which is the arithmetic modulo 2^64 that is wanted
    bits = bits + _signed(_GOLDEN)
    bits = (bits ^ _shift_right(bits, 30)) * _signed(_FIRST)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(_SECOND)
    return bits ^ _shift_right(bits, 31)


def combine(keys: Keys, *values: int | str) -> Keys:
    """New keys from old ones and some numbers or names, one hash a value.

    Args:
        keys: one key an image.
        values: what tells the new keys from the old ones, for example the number of a view.

    Returns:
        Keys that share nothing visible with the old ones.
    """
    for value in values:
        keys = _mix(keys ^ _number(value))
    return keys


def sample_key(seed: int, epoch: int, identity: int, view: int | None = None) -> int:
    """The key of one image in one epoch, or of one of its views.

    Args:
        seed: the run's seed.
        epoch: which pass over the data.
        identity: the image's own number, see ``identity_of``.
        view: which view; ``None`` gives the key of the image, from which ``combine(keys, view)`` makes
            the very number that ``sample_key(..., view)`` returns.

    Returns:
        A signed 64-bit number.

    >>> key = torch.tensor([sample_key(0, 3, 77)])
    >>> int(combine(key, 1)) == sample_key(0, 3, 77, view=1)
    True
    """
    key = 0
    for value in (seed, epoch, identity) if view is None else (seed, epoch, identity, view):
        key = _mix_number(key ^ _mix_number(value & _MASK))
    return _signed(key)


def sample_keys(seed: int, epochs: Int64[Tensor, " batch"], identities: Int64[Tensor, " batch"]) -> Keys:
    """The keys of a batch, those that ``sample_key`` gives image by image.

    Args:
        seed: the run's seed.
        epochs: which pass over the data each image belongs to.
        identities: the images' own numbers, see ``identity_of``.

    Returns:
        One key an image; ``combine(keys, view)`` are those of a view.

    >>> keys = sample_keys(0, torch.tensor([3, 4]), torch.tensor([77, 77]))
    >>> keys.tolist() == [sample_key(0, 3, 77), sample_key(0, 4, 77)]
    True
    """
    keys = combine(torch.zeros_like(identities), seed)
    for values in (epochs, identities):
        keys = _mix(keys ^ _mix(values))
    return keys


def fresh_keys(count: int, device: torch.device | str | None = None) -> Keys:
    """Keys for a caller who has none; the only place that reads torch's global generator.

    Returns:
        Random keys, repeatable by ``torch.manual_seed``.
    """
    return torch.randint(-(1 << 63), (1 << 63) - 1, (count,), dtype=torch.int64, device=device)


def batch_keys(images: Float[Tensor, "batch channel height width"], keys: Keys | None) -> Keys:
    """The keys of a batch, one an image, fresh ones where none are given.

    Raises:
        UserError: the images are no batch; a single one without its first axis would be taken for several. Or the
            keys are not one an image: a single one would be drawn from for all of them.
    """
    if not isinstance(images, Tensor) or images.dim() != 4 or images.numel() == 0:
        given = "x".join(map(str, images.shape)) if isinstance(images, Tensor) else type(images).__name__
        raise UserError(
            f"images ({given}) must be a tensor (batch, channel, height, width) of an image or more"
        )
    if keys is None:
        return fresh_keys(len(images), images.device)
    if not isinstance(keys, Tensor) or keys.shape != images.shape[:1] or keys.dtype != torch.int64:
        given = f"{tuple(keys.shape)}, {keys.dtype}" if isinstance(keys, Tensor) else type(keys).__name__
        raise UserError(
            f"keys ({given}) must be a tensor of an int64 an image ({len(images)}); leave them out for fresh ones"
        )
    return keys


@contextmanager
def torch_seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Inside, torch's generator starts from a seed, and that of a CUDA device where one is given; restored afterwards.

    ``torch.manual_seed`` would reset the generators of every other device, too.
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for one in devices:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        yield


def _bits(keys: Tensor, stream: int | str, count: int) -> Tensor:
    """``count`` hashed int64 a key, (batch, count)."""
    places = torch.arange(count, dtype=torch.int64, device=keys.device)
    # exclusive or before the product: Inductor would take ``places * constant`` for an index and lose bits
    return _mix((combine(keys, stream)[:, None] ^ places) * _signed(_GOLDEN))


def uniform(keys: Keys, stream: int | str, shape: Sequence[int] = ()) -> Float[Tensor, "batch ..."]:
    """Uniform numbers in [0, 1), multiples of 2^-24, bit for bit the same on every device.

    Args:
        keys: one key an image.
        stream: what the numbers are for; streams of one key are independent.
        shape: how many numbers an image.

    Returns:
        float32, one block of ``shape`` an image.

    >>> keys = torch.tensor([1, 2])
    >>> uniform(keys, "flip").tolist() == [uniform_numbers(1, "flip", 1)[0], uniform_numbers(2, "flip", 1)[0]]
    True
    """
    bits = _shift_right(_bits(keys, stream, math.prod(shape)), 40)  # 24 bits fit a float32 exactly
    return (bits.to(torch.float32) * 2.0**-24).reshape(len(keys), *shape)


def uniform_numbers(key: int, stream: int | str, count: int) -> list[float]:
    """The numbers of ``uniform(tensor([key]), stream, (count,))`` without torch, for one sample in a worker.

    Args:
        key: a signed 64-bit number.
        stream: what the numbers are for.
        count: how many.

    Returns:
        ``count`` floats in [0, 1).
    """
    base = _mix_number((key & _MASK) ^ (_number(stream) & _MASK))
    return [(_mix_number((base ^ place) * _GOLDEN) >> 40) * 2.0**-24 for place in range(count)]


def normal(keys: Keys, stream: int | str, shape: Sequence[int] = ()) -> Float[Tensor, "batch ..."]:
    """Standard normal numbers by Box and Muller, two from each hash.

    Args:
        keys: one key an image.
        stream: what the numbers are for.
        shape: how many numbers an image.

    Returns:
        float32. The underlying integers are exact; logarithm and cosine differ between devices by rounding.
    """
    count = math.prod(shape)
    bits = _bits(keys, stream, (count + 1) // 2)
    first = (_shift_right(bits, 32) + 1).to(torch.float32) * 2.0**-32  # (0, 1]: its logarithm is finite
    angle = (bits & 0xFFFFFFFF).to(torch.float32) * (2.0 * math.pi * 2.0**-32)
    length = torch.sqrt(-2.0 * torch.log(first))
    pairs = torch.cat((length * torch.cos(angle), length * torch.sin(angle)), dim=1)
    return pairs[:, :count].reshape(len(keys), *shape)
