"""CONTRIBUTING's example is code that runs, and docs/architecture.md is the map of what is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import freqmask
from freqmask.cli import main
from freqmask.errors import UserError
from freqmask.filters import build_filter
from freqmask.interop.weights import load_method
from freqmask.methods import build_method
from freqmask.reporting.reading import read_run
from freqmask.reporting.summary import metadata

TINY = "vit_tiny_patch16_224"
ROOT = Path(__file__).parent.parent


def code(word: str) -> str:
    """The example that holds a word."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (found,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if word in block]
    return str(found)


def test_a_protocol_is_a_class_and_a_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from freqmask.commands import evaluate

    monkeypatch.setattr(evaluate, "PARTS", dict(evaluate.PARTS))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meanlab.py").write_text(code("class ClassMeans"), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(evaluate, "means", importlib.import_module("meanlab").means, raising=False)
    main(["evaluate", "--help"])
    assert "  means       the nearest mean of a class" in capsys.readouterr().out
    labels = np.arange(24) % 2
    images = np.random.default_rng(0).integers(0, 60, (24, 8, 8, 3)) + 120 * labels[:, None, None, None]
    arrays = {"images": images.astype(np.uint8), "labels": labels}
    np.savez(
        "two.npz",
        **{f"{split}_{name}": value for split in ("train", "test") for name, value in arrays.items()},
    )
    main(["evaluate", "means", "pixels", "--data", "two.npz", "--workers", "0", "--feature", "class_token"])
    row = Path("results.csv").read_text()
    assert "freqmask evaluate means pixels " in row and " --feature class_token" in row
    assert Path("means.png").is_file()
    (summary,) = freqmask.evaluate.means("pixels", data="two.npz", workers=0)
    assert summary.variant == "means" and summary.mean == 1


@pytest.fixture
def wedge() -> Any:
    names: dict[str, Any] = {"__name__": "mylab_filters"}
    exec(code("class Wedge"), names)
    return names["Wedge"]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "dimlab.py").write_text(code("class Dimmed"), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_option_of_one_line_is_in_help_config_and_report(
    lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["pretrain", "--method", "dimlab:Dimmed", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Dimmed: --dimming X share of the brightness that is taken away (default: 0.25)" in shown
    words = [
        "--steps",
        "1",
        "--batch_size",
        "4",
        "--workers",
        "0",
        "--accelerator",
        "cpu",
        "--image_size",
        "16",
    ]
    tiny = ["--model_args", "{depth: 1, embed_dim: 48, num_heads: 2}", "--method", "dimlab:Dimmed"]
    main(["pretrain", "builtin:digits", *words, *tiny, "--dimming", "0.5", "--radius", "3", "--out", "run"])
    assert yaml.safe_load((lab / "run" / "config.yaml").read_text())["dimming"] == 0.5
    settings = metadata(read_run(lab / "run"))["Method"]["Settings"]
    assert settings.startswith("filter fixed; radius 3; low_pass_share 0.5; softness 0; clamp yes")
    assert settings.endswith("; dimming 0.5")
    assert "dimming 0.5" in (lab / "run" / "report.html").read_text(encoding="utf-8")
    assert load_method("run").dimming == 0.5
    again = ["pretrain", "--config", "run/config.yaml", "--out", "again", "--dry_run"]
    with pytest.raises(SystemExit):  # code that a file names is imported where the user names it, too
        main(again)
    main([*again, "--method", "dimlab:Dimmed"])


def test_it_is_read_and_checked_as_every_other(lab: Path) -> None:
    for given in ({"dimming": "1e-1"}, {"dimming": 0.1}):
        method = build_method("dimlab:Dimmed", image_size=16, patch_size=4, backbone=TINY, **given)
        assert method.settings["dimming"] == 0.1
    with pytest.raises(UserError, match=r"dimming \(2\) must be a number from 0 to below 1"):
        freqmask.pretrain("builtin:digits", method="dimlab:Dimmed", dimming=2)
    (lab / "c.yaml").write_text("method: dimlab:Dimmed\ndimming: .nan\n")
    with pytest.raises(UserError, match=r"dimming \(.nan\) must be a number from 0 to below 1"):
        freqmask.pretrain("builtin:digits", method="dimlab:Dimmed", config="c.yaml")
    with pytest.raises(UserError, match=r"option \(--dimming\) is unknown"):
        freqmask.pretrain("builtin:digits", dimming=0.5)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 12)])
def test_the_filter_that_contributing_shows_hides_its_wedge(wedge: Any, height: int, width: int) -> None:
    images = torch.rand(2, 3, height, width)
    filtered = build_filter(wedge(angle=20), (height, width))(images)
    ky, kx = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    kept = np.degrees(np.arctan2(np.abs(kx), np.abs(ky))) >= 20
    kept[0, 0] = True
    expected = np.fft.ifft2(np.fft.fft2(images.double().numpy()) * kept).real
    np.testing.assert_allclose(filtered.images.numpy(), expected, atol=1e-5)


def test_its_mistakes_are_sentences(wedge: Any) -> None:
    with pytest.raises(UserError, match=r"angle \(120\)"):
        wedge(angle=120)


def test_the_map_names_every_module_and_none_that_is_gone() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = ROOT / "src" / "freqmask"
    named = {path for path in re.findall(r"`([\w/]+\.py)`", text) if not path.startswith("tests/")}
    assert {path for path in named if not (package / path).is_file()} == set()
    there = {str(path.relative_to(package).as_posix()) for path in package.rglob("[!_]*.py")}
    assert len(there) > 80
    assert there - named == set(), "give each a line in docs/architecture.md"
