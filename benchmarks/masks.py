"""Claim: choosing and applying a mask costs a few FFTs at most; Com needs no full sort of the spectrum.

For every filter the time of ``keep`` (given the spectrum) and of the whole ``forward``, over that of one
rfft2 of the same batch, the two taking turns; then the ways to find each image's strongest bins, each giving the
very same choice. Median and quartiles of repeated runs after a warm-up, synchronised on a GPU. Maps of fixed
filters are cached.

    python benchmarks/masks.py                         # 16 x 3 x 224 x 224 on the CPU
    python benchmarks/masks.py --device cuda --batch 256
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import write_record
from torch import Tensor

from freqmask.filters import build_filter
from freqmask.filters.selected import representatives
from freqmask.rng import fresh_keys
from freqmask.spectrum import irfft2, power, rfft2

FILTERS = [
    "lowpass()",
    "highpass()",
    "bandpass(low=4, high=16)",
    "bandstop(low=4, high=16)",
    "lowpass(softness=2)",
    "rings()",
    "com()",
    "com(magnitude='mean')",
    "com(magnitude='each')",
    "rcom()",
    "energy()",
    "renergy()",
    "randombins(fraction=0.05)",
    "fixed",
    "com",
    "oneof(['lowpass()', 'highpass()', 'com()', 'rcom()'])",
]
RESULTS = Path(__file__).parent / "results" / "masks.csv"
Row = dict[str, object]


def compare(what: str, work: Callable[[], object], images: Tensor, repeats: int) -> Row:
    """One line of the table: the work and one rfft2 take turns, so that a busy machine slows both."""
    times: dict[str, list[float]] = {"work": [], "rfft2": []}
    for number in range(repeats + 3):
        for name, call in (("work", work), ("rfft2", lambda: rfft2(images))):
            synchronise(images.device)
            start = time.perf_counter()
            call()
            synchronise(images.device)
            if number >= 3:
                times[name].append((time.perf_counter() - start) * 1e3)
    low, middle, high = statistics.quantiles(times["work"], n=4)
    return {
        "what": what,
        "milliseconds": round(middle, 3),
        "lower_quartile": round(low, 3),
        "upper_quartile": round(high, 3),
        "times_rfft2": round(middle / statistics.median(times["rfft2"]), 2),
    }


def synchronise(device: torch.device) -> None:
    """Waits for a GPU to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def natural_images(batch: int, side: int, device: torch.device) -> Tensor:
    """Noise with a 1/f spectrum in [0, 1]; ranking costs depend on the values' distribution."""
    generator = torch.Generator().manual_seed(0)
    noise = rfft2(torch.randn(batch, 3, side, side, generator=generator))
    ky, kx = torch.fft.fftfreq(side)[:, None] * side, torch.arange(side // 2 + 1)
    images = irfft2(noise / (ky.square() + kx.square()).sqrt().clamp_min(1), (side, side))
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return ((images - low) / (high - low)).to(device)


# --- ways to find the n strongest of each row: all return the n-th strongest value of each row


def by_sort(score: Tensor, count: Tensor, most: int) -> Tensor:
    """The rival: sort everything."""
    return score.sort(descending=True).values.gather(1, count[:, None] - 1)


def by_topk(score: Tensor, count: Tensor, most: int) -> Tensor:
    """The strongest of the largest fraction, then each image's place in it."""
    return score.topk(most).values.gather(1, count[:, None] - 1)


def by_topk_integers(score: Tensor, count: Tensor, most: int) -> Tensor:
    """The same on (bits, place) in one int64, which leaves no ties: what ``Com`` does."""
    order = (score.view(torch.int32).to(torch.int64) << 32) | torch.arange(
        score.shape[1], device=score.device
    )
    last = order.topk(most).values.gather(1, count[:, None] - 1)
    return (last >> 32).to(torch.int32).view(torch.float32)


def by_kth_value(score: Tensor, count: Tensor, most: int) -> Tensor:
    """One pass a fraction, each for the whole batch: k may not differ between images."""
    values = [score.kthvalue(score.shape[1] - n + 1, keepdim=True).values for n in FRACTION_COUNTS]
    index = torch.searchsorted(torch.tensor(FRACTION_COUNTS, device=score.device), count)
    return torch.cat(values, 1).gather(1, index[:, None])


def by_bisection(score: Tensor, count: Tensor, most: int) -> Tensor:
    """31 halvings of the floats' bit patterns, all images at once."""
    bits = score.view(torch.int32)
    low = torch.zeros(len(score), 1, dtype=torch.int32, device=score.device)
    for place in range(30, -1, -1):
        middle = low | (1 << place)
        enough = (bits >= middle).sum(1, keepdim=True) >= count[:, None]
        low = torch.where(enough, middle, low)
    return low.view(torch.float32)


def by_histogram(score: Tensor, count: Tensor, most: int) -> Tensor:
    """Three passes over the bits, 11 + 10 + 10, each a histogram of what is left."""
    bits = score.view(torch.int32).long()
    prefix = torch.zeros(len(score), 1, dtype=torch.int64, device=score.device)
    wanted = count[:, None].clone()
    for done, width in ((0, 11), (11, 10), (21, 10)):
        shift = 31 - done - width
        alive = (bits >> (31 - done)) == prefix
        digit = (bits >> shift) & ((1 << width) - 1)
        histogram = torch.zeros(len(score), 1 << width, dtype=torch.int64, device=score.device)
        histogram.scatter_add_(1, digit, alive.long())
        above = histogram.flip(1).cumsum(1).flip(1)  # how many have this digit or a higher one
        chosen = (above >= wanted).sum(1, keepdim=True) - 1
        wanted = wanted - (above.gather(1, chosen) - histogram.gather(1, chosen))
        prefix = (prefix << width) | chosen
    return prefix.to(torch.int32).view(torch.float32)


SELECTIONS = (by_sort, by_topk, by_topk_integers, by_kth_value, by_histogram, by_bisection)
FRACTION_COUNTS: list[int] = []


def filter_rows(images: Tensor, repeats: int) -> list[Row]:
    """Every filter over one rfft2."""
    size = (images.shape[-2], images.shape[-1])
    keys, spectrum = fresh_keys(len(images), images.device), rfft2(images)
    rows = [
        compare("rfft2", lambda: rfft2(images), images, repeats),
        compare("irfft2", lambda: irfft2(spectrum, size), images, repeats),
    ]
    for text in FILTERS:
        filter = build_filter(text, size)
        keep = functools.partial(filter.keep, spectrum, size, keys)
        rows.append(compare(f"keep of {text}", keep, images, repeats))
        rows.append(compare(f"forward of {text}", functools.partial(filter, images, keys), images, repeats))
    return rows


def selection_rows(images: Tensor, repeats: int) -> list[Row]:
    """Every way to select, over one rfft2, checked to give the same thresholds."""
    device, side = images.device, images.shape[-1]
    score = power(rfft2(images)[:, 1]).flatten(1).contiguous()
    FRACTION_COUNTS[:] = [max(1, round(fraction * side * side / 2)) for fraction in (0.005, 0.01, 0.05)]
    count = torch.tensor(FRACTION_COUNTS, device=device)[torch.arange(len(images), device=device) % 3]
    most = min(max(FRACTION_COUNTS), representatives((side, side)))
    expected, rows = by_sort(score, count, most), []
    for select in SELECTIONS:
        if not torch.equal(select(score, count, most), expected):
            raise RuntimeError(f"{select.__name__} is not exact")
        name = f"select {select.__name__.replace('_', ' ')}"
        rows.append(compare(name, functools.partial(select, score, count, most), images, repeats))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.device(options.device)
    images = natural_images(options.batch, options.side, device)
    rows = filter_rows(images, options.repeats) + selection_rows(images, options.repeats)
    about = write_record(options.out, rows, device, shape="x".join(map(str, images.shape)))
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for line in rows:
        print(f"{line['what']:<68}{line['milliseconds']:>10} ms {line['times_rfft2']:>8} x rfft2")


if __name__ == "__main__":
    main()
