"""``--config RUN/config.yaml --out NEW`` repeats the run, for every command that writes a config."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from evaluation.segmentation_images import make_data
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import make_run

import freqmask
from freqmask.cli import main

TINY = {"depth": 1, "embed_dim": 48, "num_heads": 2}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photos(tmp_path: Path) -> str:
    """Two classes of colour images, some of them grey."""
    generator = np.random.default_rng(0)
    for number in range(24):
        shape = (40, 36) if number % 12 == 6 else (40, 36, 3)
        path = tmp_path / "photos" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = generator.integers(0, 100, shape) + 120 * (number % 2)
        Image.fromarray(noise.astype(np.uint8)).save(path)
    return str(tmp_path / "photos")


def config(path: Path) -> dict[str, Any]:
    """A run's options, without what belongs to the machine alone."""
    found: dict[str, Any] = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    return found


def losses(path: Path) -> list[str]:
    with (path / "metrics.csv").open(encoding="utf-8") as file:
        return [row["loss"] for row in csv.DictReader(file) if row["loss"]]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "mfm", "image_size": "32x24", "epochs": 0.3},
        {"method": "folk", "image_size": 32, "outputs": 64, "com_fractions": [0.1], "steps": 2, "seed": 7},
        {"method": "deblur", "hours": 0.0001, "crop": "native", "image_size": 32, "kernel_sizes": [3, 5]},
    ],
    ids=lambda options: options["method"],
)
def test_a_pretraining_is_repeated(options: dict[str, Any], photos: str, tmp_path: Path) -> None:
    machine = {
        "batch_size": 4,
        "workers": 0,
        "accelerator": "cpu",
        "model_args": TINY,
        "max_skipped_share": 1,
    }
    first = freqmask.pretrain(photos, **options, **machine, out="first")
    main(["pretrain", "--config", f"{first}/config.yaml", "--out", "again"])
    assert losses(tmp_path / "again") == losses(first) != []
    assert config(tmp_path / "again") == config(first)
    weights = [load_file(path / "backbone" / "model.safetensors") for path in (first, tmp_path / "again")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_what_is_typed_goes_before_the_run_s_own(photos: str, tmp_path: Path) -> None:
    first = freqmask.pretrain(
        photos,
        steps=2,
        batch_size=4,
        workers=0,
        image_size=32,
        model_args=TINY,
        max_skipped_share=1,
        out="first",
    )
    main(
        [
            "pretrain",
            photos + "/class1",
            "--config",
            f"{first}/config.yaml",
            "--epochs",
            "1",
            "--out",
            "again",
        ]
    )
    assert config(tmp_path / "again")["data"] == [photos + "/class1"]
    assert config(tmp_path / "again")["steps"] == 3


def test_a_fine_tuning_is_repeated(photos: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine", image_size=32, model_args={**TINY, "num_heads": 1}).path
    machine = {"batch_size": 4, "workers": 0, "accelerator": "cpu", "seeds": [3, 4]}
    freqmask.evaluate.finetune(run, data=photos, epochs=0.5, shots="50%", **machine, out="first")
    first, again = tmp_path / "first" / "mine-seed4", tmp_path / "again" / "mine-seed4"
    main(["evaluate", "finetune", "--config", f"{first}/config.yaml", "--out", "again"])
    assert not (tmp_path / "again" / "mine-seed3").exists()
    assert losses(again) == losses(first) != []
    assert config(again) == config(first)
    texts = [(tmp_path / name / "results.csv").read_text(encoding="utf-8") for name in ("first", "again")]
    rows = [list(csv.DictReader(text.splitlines())) for text in texts]
    assert rows[1][0]["accuracy"] == rows[0][1]["accuracy"]
    assert "evaluate finetune --config" in (first / "config.yaml").read_text().splitlines()[1]


def test_a_segmentation_is_repeated(tmp_path: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="pip install 'freqmask[seg]'")
    run = make_run(tmp_path / "mine").path
    machine = {"batch_size": 4, "workers": 0, "accelerator": "cpu", "decoder_channels": 8, "overlays": 0}
    data = str(make_data(tmp_path / "street"))
    freqmask.evaluate.segment(run, data=data, crop=32, epochs=1, **machine, out="first")
    first, again = tmp_path / "first" / "mine-seed0", tmp_path / "again" / "mine-seed0"
    main(["evaluate", "segment", "--config", f"{first}/config.yaml", "--out", "again"])
    assert losses(again) == losses(first) != []
    assert config(again) == config(first)


def test_a_config_of_another_command_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(
        "command: evaluate segment\noptions: {model: [x], decoder_channels: 8}\n"
    )
    with pytest.raises(SystemExit):
        main(["evaluate", "finetune", "--config", "c.yaml"])
    assert "it is of freqmask evaluate segment" in capsys.readouterr().err
