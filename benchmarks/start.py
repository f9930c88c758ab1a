"""Claim: from typing to the first step on 100,000 files in at most 6 s, where files have been seen before (warm).

    python benchmarks/start.py                       # makes 100,000 small JPEGs in 100 folders
    python benchmarks/start.py --data FOLDER --repeats 5

Each start is a process of its own, `freqmask pretrain FOLDER --steps 1` on the CPU. Cold: the index's cache is empty
(the system's cache of files is not emptied, which needs root). Parts are processor time of the functions named beside
them, so that other programs disturb little.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from record import show, write_record

SMALL = ["--backbone", "resnet10t", "--image_size", "32", "--batch_size", "8"]
RESULTS = Path(__file__).parent / "results" / "start.csv"
PARTS = {  # what is timed: module and name; each includes no other
    "index": ("freqmask.pretraining.job", "part"),
    "survey of values": ("freqmask.pretraining.resolve", "survey"),
    "measuring an image": ("freqmask.training.auto", "measure_cost"),
    "plan.png": ("freqmask.pretraining.job", "_draw_plan"),
    "Trainer": ("freqmask.training.loop", "make_trainer"),
    "probe": ("freqmask.training.callbacks", "Measurement.on_train_batch_end"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--small", action="store_true", help="a small backbone, so that its step hardly counts"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        start(json.loads(arguments.child))
        return
    with tempfile.TemporaryDirectory() as work:
        data = arguments.data or make_files(Path(work) / "photos", arguments.files)
        rows = [row for kind in ("cold", "warm") for row in [measure(data, Path(work), kind, arguments)]]
    show(rows)
    files = arguments.files if arguments.data is None else str(arguments.data)
    load = " ".join(f"{value:.0f}" for value in os.getloadavg())
    write_record(
        RESULTS, rows, files=files, backbone="resnet10t" if arguments.small else "auto", load_average=load
    )


def make_files(folder: Path, count: int) -> Path:
    """Small JPEGs, sixteen different ones over and over."""
    random, contents = np.random.default_rng(0), []
    for _ in range(16):
        coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), np.uint8)).resize(
            (64, 64), Image.Resampling.BICUBIC
        )
        file = io.BytesIO()
        coarse.save(file, "JPEG", quality=80)
        contents.append(file.getvalue())
    for number in range(count):
        path = folder / f"class-{number % 100:02d}" / f"{number:07d}.jpg"
        if number < 100:
            path.parent.mkdir(parents=True)
        path.write_bytes(contents[number % 16])
    return folder


def measure(data: Path, work: Path, kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians over some starts."""
    found: list[dict[str, float]] = []
    for number in range(arguments.repeats):
        cache, out = work / "cache", work / "run"
        if kind == "cold":
            shutil.rmtree(cache, ignore_errors=True)
        told = work / f"{kind}-{number}.json"
        given = {
            "data": str(data),
            "out": str(out),
            "told": str(told),
            "more": SMALL if arguments.small else [],
        }
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
        command = [sys.executable, __file__, "--child", json.dumps(given)]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        found.append(json.loads(told.read_text()))
        shutil.rmtree(out)
    return {
        "start": kind,
        **{name: round(statistics.median(one[name] for one in found), 2) for name in found[0]},
    }


def start(given: dict[str, Any]) -> None:
    """In the process that is measured: begin a training, note when its parts and its first step end."""
    from freqmask.cli import main as freqmask

    seconds = dict.fromkeys(PARTS, 0.0)
    marks: dict[str, float] = {}
    before: dict[str, float] = {}

    def begun() -> None:
        import freqmask.pretraining.job as job

        marks["imports"] = time.process_time()
        for part, (module, name) in PARTS.items():
            owner: Any = importlib.import_module(module)
            if "." in name:
                owner, name = getattr(owner, name.partition(".")[0]), name.partition(".")[2]
            whole = getattr(owner, name)

            @functools.wraps(whole)
            def timed(*args: Any, _whole: Any = whole, _part: str = part, **more: Any) -> Any:
                began = time.process_time()
                result = _whole(*args, **more)
                seconds[_part] += time.process_time() - began
                return result

            setattr(owner, name, timed)
        from freqmask.training.callbacks import Monitor

        ended = Monitor.on_train_batch_end

        def first(self: Any, *rest: Any) -> None:
            if "first step" not in marks:
                marks["first step"] = time.process_time()
                before.update(seconds)  # what is measured at the end of the run is no part of its start
            ended(self, *rest)

        Monitor.on_train_batch_end = first  # type: ignore[method-assign]
        train = job.train

        def training(*args: Any, **more: Any) -> Any:
            marks["trainer"] = time.process_time()
            return train(*args, **more)

        job.train = training

    hook(begun)
    sys.argv = [
        "freqmask",
        "pretrain",
        given["data"],
        "--steps",
        "1",
        "--workers",
        "1",
        "--out",
        given["out"],
        "--accelerator",
        "cpu",
        *given["more"],
    ]
    try:
        freqmask()
    except SystemExit as ended:
        if ended.code:
            raise
    told = {"imports": marks["imports"], **before}
    told["first step"] = marks["first step"] - marks["trainer"] - before["Trainer"] - before["probe"]
    told["all"] = marks["first step"]
    told["rest"] = told["all"] - sum(value for name, value in told.items() if name != "all")
    Path(given["told"]).write_text(json.dumps(told))


def hook(begun: Any) -> None:
    """Call `begun` where the command has imported what it needs and starts its work."""
    import freqmask.commands.pretrain as command

    importing = command.uncollected

    @contextlib.contextmanager
    def noted() -> Any:
        with importing():
            yield
        begun()

    command.uncollected = noted


if __name__ == "__main__":
    main()
