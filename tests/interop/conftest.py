"""Fixtures over the tiny runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import make_photographs, make_run

from freqmask.training.run_folder import RunFolder


@pytest.fixture(scope="session")
def vit_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """An MFM run of a tiny ViT."""
    return make_run(tmp_path_factory.mktemp("runs") / "mfm-vit")


@pytest.fixture(scope="session")
def resnet_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """An MFM run of a small ResNet."""
    return make_run(
        tmp_path_factory.mktemp("runs") / "mfm-resnet",
        backbone="resnet18",
        image_size=64,
        patch_size=None,
        model_args={"layers": [1, 1, 1, 1]},
    )


@pytest.fixture(scope="session")
def folk_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A FOLK run, whose teacher and student differ."""
    return make_run(
        tmp_path_factory.mktemp("runs") / "folk-vit",
        method="folk",
        outputs=16,
        hidden_size=8,
        bottleneck_size=4,
    )


@pytest.fixture
def run_factory(tmp_path: Path) -> Callable[..., RunFolder]:
    """Makes runs of other options."""
    return lambda **options: make_run(tmp_path / "run", **options)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven small images in two classes, one of them broken."""
    return make_photographs(tmp_path_factory.mktemp("photographs"))
