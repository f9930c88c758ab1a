"""CONTRIBUTING's example is code that runs, and docs/architecture.md is the map of what is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from freqmask.errors import UserError
from freqmask.filters import build_filter

ROOT = Path(__file__).parent.parent


@pytest.fixture
def wedge() -> Any:
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL
    )
    names: dict[str, Any] = {"__name__": "mylab_filters"}
    exec(code, names)
    return names["Wedge"]


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
    assert len(there) > 100
    assert there - named == set(), "give each a line in docs/architecture.md"
