"""Images parted among devices: the numbers of several processes are those of one, to the bit."""

import contextlib
import csv
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_runs import make_run, spawned

import freqmask
from freqmask.cli import main
from freqmask.data.sources import open_source
from freqmask.data.values import survey
from freqmask.errors import UserError
from freqmask.evaluation import features, linear
from freqmask.evaluation.bands_and_attacks import Band, make_attacks
from freqmask.evaluation.corruptions import Corruption, strengths_for
from freqmask.evaluation.eval_model import open_eval_model
from freqmask.evaluation.features import (
    UNCHANGED,
    ComputeConfig,
    check_started_once,
    compute_features,
    part_images,
)
from freqmask.evaluation.labelled import open_labelled
from freqmask.evaluation.linear import fit_head
from freqmask.evaluation.protocol import prepare_context
from freqmask.evaluation.robustness import Robustness, RobustnessEval
from freqmask.training.worker_pool import WorkerPool

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def two() -> Iterator[WorkerPool]:
    with contextlib.closing(WorkerPool([CPU, CPU])) as replicas:
        yield replicas


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_run(tmp_path_factory.mktemp("runs") / "vit").path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of noise, red and blue; the second test image cannot be read."""
    folder = tmp_path_factory.mktemp("data")
    for part, count in (("train", 6), ("test", 5)):
        for number, name in enumerate(("blue", "red")):
            (folder / part / name).mkdir(parents=True)
            for image in range(count):
                generator = np.random.default_rng([count, number, image])
                pixels = generator.integers(60, 100, (32, 32, 3), dtype=np.uint8)
                pixels[..., 2 - 2 * number] += 30
                Image.fromarray(pixels).save(folder / part / name / f"{image}.png")
    (folder / "test" / "blue" / "1.png").write_bytes(b"no image")
    return folder


@given(st.integers(1, 500), st.integers(1, 70), st.integers(1, 9))
def test_parts_are_whole_batches_of_all_images_once(images: int, size: int, parts: int) -> None:
    found = part_images(images, size, parts)
    assert [image for part in found for image in part] == list(range(images))
    assert all(part.start % size == 0 and len(part) for part in found)
    assert len(found) == min(parts, -(-images // size))


@pytest.mark.parametrize("workers", [0, 1])
def test_features_of_two_processes_are_those_of_one(
    two: WorkerPool, run: str, data: Path, workers: int
) -> None:
    source = open_source(data / "test")
    subject = open_eval_model(run, survey(source))
    subject.prepare(source, CPU)
    fog, half = Corruption("fog", 3, strengths_for(32)), Band("low", 0, 8)
    for what, change in (("blocks", UNCHANGED), ("end", half), ("end", fog)):
        tables = [
            compute_features(
                subject,
                source,
                what,
                ComputeConfig(CPU, 2, workers, cache=False, replicas=replicas),
                change,
                quiet=True,
            )
            for replicas in (None, two)
        ]
        assert tables[0].values.keys() == tables[1].values.keys()
        for name, values in tables[0].values.items():
            assert np.array_equal(values, tables[1].values[name]), name
        assert tables[0].read.tolist() == tables[1].read.tolist() == [True, False] + [True] * 8
        assert tables[0].skipped == tables[1].skipped and tables[0].skipped[0][0].endswith("1.png")


def test_attacked_answers_of_two_processes_are_those_of_one(
    two: WorkerPool, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "LEAST_STEPS", 40)
    opened = open_labelled(str(data))
    results = []
    for replicas in (None, two):
        place = ComputeConfig(CPU, 2, cache=False, replicas=replicas)
        context = prepare_context(
            open_eval_model("random:resnet10t", survey(opened.source), image_size=32), opened, place
        )
        heads = [fit_head(context, "linear", one, 0) for one in context.data.rounds]
        (pgd,) = make_attacks(["pgd"], "linf", "4/255", 2, "auto", True)
        results.append(RobustnessEval(Robustness(), context, heads).attacked(pgd))
    assert np.array_equal(results[0].predicted, results[1].predicted)
    assert results[0].metadata == results[1].metadata  # losses and the largest change, to the bit
    assert results[0].metadata["adversarial_loss"] > results[0].metadata["loss"]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_command_on_two_processes_says_and_writes_what_it_does_on_one(
    two: WorkerPool,
    run: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "knn", run, "--data", str(data), "--k", "3", "--batch_size", "2", "--cache", "false"]
    words += ["--workers", "0", "--accelerator", "cpu"]
    asked: list[int] = []

    def pool(devices: list[torch.device]) -> WorkerPool:
        asked.append(len(devices))
        return two if len(devices) == 2 else WorkerPool(devices)  # the two are there

    monkeypatch.setattr(features, "WorkerPool", pool)
    said = []
    for count in ("1", "2"):
        main([*words, "--devices", count, "--out", count])
        shown = capfd.readouterr()
        assert shown.err == ""
        ignored = ("results", "figures", "features", "devices     2 x cpu: each sees a part")
        said.append([line for line in shown.out.splitlines() if not line.startswith(ignored)])
    assert [count for count in asked if count > 1] == [2]
    assert said[0] == said[1]
    one, other = (rows(tmp_path / count / "results.csv") for count in ("1", "2"))
    assert [row["accuracy"] for row in one] == [row["accuracy"] for row in other]


def started(run: str, data: Path, folder: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A command on two processes, at the moment when both of them are importing."""
    words = [run, "--data", str(data), "--batch_size", "2", "--workers", "1", "--accelerator", "cpu"]
    command = subprocess.Popen(
        [sys.executable, "-m", "freqmask", "evaluate", "knn", *words, "--devices", "2"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell starts what goes on in its background deaf to Ctrl-C, and that is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    found: list[psutil.Process] = []
    while len(found) < 2:
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert command.wait(0.05) is None, command.communicate()
        found = spawned(psutil.Process(command.pid), 50e6)
    return command, found


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_with_one_word(run: str, data: Path, tmp_path: Path) -> None:
    command, processes = started(run, data, tmp_path)
    os.killpg(command.pid, signal.SIGINT)  # as a terminal does: to all of them
    assert command.communicate(timeout=60)[1] == "interrupted\n"
    assert command.returncode == 130
    assert not any(one.is_running() for one in processes)
    assert not (tmp_path / "results.csv").exists()


@pytest.mark.slow
def test_a_killed_process_is_one_sentence_and_nothing_is_written(
    run: str, data: Path, tmp_path: Path
) -> None:
    command, processes = started(run, data, tmp_path)
    processes[1].kill()
    complaint = command.communicate(timeout=60)[1]
    assert command.returncode == 2
    assert (
        complaint.startswith("error: process 2 of 2 (cpu) was killed by signal 9")
        and complaint.count("\n") == 1
    )
    assert not any(one.is_running() for one in processes)
    assert not (tmp_path / "results.csv").exists()


@pytest.mark.slow
def test_processes_end_when_the_one_that_started_them_is_killed(run: str, data: Path, tmp_path: Path) -> None:
    command, processes = started(run, data, tmp_path)
    command.kill()
    command.communicate()
    assert psutil.wait_procs(processes, timeout=60)[1] == []


def test_more_devices_than_there_are_is_one_sentence_before_any_work(
    run: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("knn", "linear", "fewshot", "bands", "robustness"):
        with pytest.raises(UserError, match=r"devices \(10000\) must be at most"):
            getattr(freqmask.evaluate, name)(run, data=str(data), devices=10_000, accelerator="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "started"),
    [({"WORLD_SIZE": "2", "RANK": "0"}, 2), ({"SLURM_PROCID": "3"}, 4), ({"SLURM_STEP_NUM_TASKS": "8"}, 8)],
)
def test_a_command_that_a_launcher_starts_several_times_says_so(
    environment: dict[str, str], started: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_started_once("evaluate")
    monkeypatch.setenv("SLURM_NTASKS", "8")  # a batch script has it without being started eight times
    check_started_once("evaluate")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"evaluate was started {started} times .* with --devices {started}"):
        check_started_once("evaluate")
