"""Figure 3: images a second and core that the loader delivers, against the plain way.

    python benchmarks/loader.py --data FOLDER [FOLDER ...]

Claim: the loader is at least 1.35 times as fast as the plain way on photographs of ImageNet's usual size and
at least 2.5 times as fast on photographs of 6 megapixels and more. From shards that `freqmask prepare` made with
its usual settings it is far more than 3 times as fast on the large ones; those of ImageNet's size are stored as they
are, and gain what opening files costs: what decoding alone would reach says how much there is to gain.

Method: all deliver batches of MFM's view (224 pixels, scale 0.2 to 1, bicubic, mirrored half of the time) of
the same files, through torch's DataLoader, in this one process with one thread. The plain way: Pillow opens
and converts, torchvision's RandomResizedCrop, flip, ToTensor, and a 224x224 int64 mask for each sample. Ours:
of the files, and of their shards (sides brought down to 448, reduced images as JPEG 95, the others as they
were), which the benchmark makes first; and nothing but opening and decoding the images of those shards, the floor
for any loader that reads them. After a warm-up they take turns; time is processor time, so that
other programs on the machine disturb little. The table gives the median and the range of the runs, and the
ratios of the medians.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from record import write_record
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import (
    Compose,
    InterpolationMode,
    RandomHorizontalFlip,
    RandomResizedCrop,
    ToTensor,
)

from freqmask import prepare
from freqmask.console import be_quiet
from freqmask.data.loader import TrainDataset, TrainSampler, make_loader
from freqmask.data.source import Source
from freqmask.data.sources import open_source
from freqmask.data.transforms import Geometry

SIZE, RADIUS, BATCH = 224, 16, 8
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
RESULTS = Path(__file__).parent / "results" / "loader.csv"


class PlainDataset(Dataset[Any]):
    """What a user writes first: the whole image decoded, torchvision's transforms, a mask a sample."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.transform = Compose(
            [
                RandomResizedCrop(SIZE, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC),
                RandomHorizontalFlip(),
                ToTensor(),
            ]
        )
        place = np.arange(SIZE) - SIZE // 2
        self.low_pass = place[:, None] ** 2 + place[None, :] ** 2 < RADIUS**2

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        with Image.open(self.files[index]) as picture:
            image = self.transform(picture.convert("RGB"))
        keep = self.low_pass if torch.rand(()) < 0.5 else ~self.low_pass
        return image, torch.from_numpy(keep.astype(np.int64))


def plain_batches(files: list[Path]) -> Iterator[Any]:
    """Batches of the plain way, without end."""
    loader = DataLoader(PlainDataset(files * BATCH), BATCH, shuffle=True)  # repeated: no batch is short
    while True:
        yield from loader


def our_batches(source: Source) -> Iterator[Any]:
    """Batches of freqmask's loader, without end in practice."""
    dataset = TrainDataset(source, [Geometry(SIZE, scale=(0.2, 1.0))], channels=3)
    return iter(make_loader(dataset, TrainSampler(len(source), 0, BATCH, total_steps=10**9), BATCH))


def decoded_batches(source: Source) -> Iterator[Any]:
    """Images of a source decoded whole and dropped, without end."""
    turns = itertools.cycle(range(len(source)))
    while True:
        yield [source.open(next(turns)).decode() for _ in range(BATCH)]


def speed(batches: Iterable[Any], seconds: float) -> float:
    """Images per second of processor time, over at least so many of them."""
    count, start = 0, time.process_time()
    for _ in batches:
        count += BATCH
        spent = time.process_time() - start
        if spent >= seconds:
            break
    return count / spent


def compare(folder: Path, runs: int, seconds: float) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as shards:
        prepare(str(folder), out=shards, workers=0)
        return measure(folder, Path(shards), runs, seconds)


def measure(folder: Path, shards: Path, runs: int, seconds: float) -> dict[str, Any]:
    """The speed of every way, in turns."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    ways: dict[str, Iterator[Any]] = {
        "plain": plain_batches(files),
        "freqmask": our_batches(open_source(folder)),
        "prepared": our_batches(open_source(shards)),
        "decoded": decoded_batches(open_source(shards)),
    }
    measured: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs + 1):
        for name, batches in ways.items():
            figure = speed(batches, seconds)
            if run > 0:  # the first one warms up
                measured[name].append(figure)
    row: dict[str, Any] = {"data": folder.name, "images": len(files), "runs": runs}
    for name, figures in measured.items():
        row[f"{name}_images_per_s"] = round(statistics.median(figures), 1)
        row[f"{name}_range"] = f"{min(figures):.1f}-{max(figures):.1f}"
    plain = statistics.median(measured["plain"])
    row["ratio"] = round(statistics.median(measured["freqmask"]) / plain, 2)
    row["prepared_ratio"] = round(statistics.median(measured["prepared"]) / plain, 2)
    row["decoded_ratio"] = round(statistics.median(measured["decoded"]) / plain, 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="folders of images, a row for each"
    )
    parser.add_argument("--runs", type=int, default=7, help="measured runs of each way")
    parser.add_argument("--seconds", type=float, default=3.0, help="processor time of a run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    be_quiet()  # the table is what this prints
    rows = [compare(folder, options.runs, options.seconds) for folder in options.data]
    for row in rows:
        print(
            f"{row['data']:<20} plain {row['plain_images_per_s']:>7} ({row['plain_range']})   freqmask "
            f"{row['freqmask_images_per_s']:>7} ({row['freqmask_range']})   ratio {row['ratio']}   prepared "
            f"{row['prepared_images_per_s']:>7} ({row['prepared_range']})   ratio {row['prepared_ratio']}   decoding "
            f"them alone {row['decoded_images_per_s']:>7} ({row['decoded_range']})   ratio {row['decoded_ratio']}"
        )
    write_record(RESULTS, rows, torchvision=torchvision.__version__, pillow=PIL.__version__)


if __name__ == "__main__":
    main()
