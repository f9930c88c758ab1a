"""plan.png and the previews, drawn through the methods themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from freqmask.methods import build_method
from freqmask.pretraining import figures
from freqmask.pretraining.figures import draw_plan, draw_preview, filter_names
from freqmask.pretraining.watch import telling_keys
from freqmask.rng import combine, fresh_keys

TINY: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "backbone": "vit_tiny_patch16_224",
    "model_args": {"embed_dim": 32, "depth": 1, "num_heads": 2},
}


def tiny(name: str, **settings: Any) -> Any:
    heads = {"outputs": 64, "hidden_size": 32, "bottleneck_size": 16} if name == "folk" else {}
    return build_method(name, **{**TINY, **heads, **settings})


def photo_like(channels: int = 3, count: int = 9) -> torch.Tensor:
    noise = torch.rand(count, channels, 4, 4, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.interpolate(noise, size=(32, 32), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("name", ["mfm", "folk", "sr", "deblur", "denoise"])
def test_every_method_gets_its_plan_and_preview(tmp_path: Path, name: str) -> None:
    method, images = tiny(name), photo_like()
    views = [(images * 255).to(torch.uint8)] * method.n_views
    assert draw_plan(tmp_path / "plan.png", views, method, fresh_keys(9)).is_file()
    with torch.no_grad():
        reconstruction = method.reconstruct(images[:4], fresh_keys(4))
    with Image.open(draw_preview(tmp_path / "preview.png", reconstruction, "step 1")) as picture:
        assert picture.width > picture.height > 300


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_previews_show_any_number_of_channels(tmp_path: Path, channels: int) -> None:
    method = tiny("mfm", channels=channels)
    with torch.no_grad():
        reconstruction = method.reconstruct(photo_like(channels, 2), fresh_keys(2))
    assert draw_preview(tmp_path / "preview.png", reconstruction, "").is_file()


def test_a_plan_leaves_the_method_as_it_was(tmp_path: Path) -> None:
    method = tiny("mfm", backbone="resnet18", patch_size=None, model_args={"output_stride": 8}).train()
    method.backbone.eval()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    modes = [module.training for module in method.modules()]
    draw_plan(tmp_path / "plan.png", [photo_like()], method, fresh_keys(9))
    assert [module.training for module in method.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def test_a_plan_shows_the_filters_that_the_keys_draw() -> None:
    method, keys = tiny("mfm"), combine(torch.arange(40), 0)
    names = filter_names(method, keys)
    keep = method.reconstruct(photo_like(count=40), keys)["keep"]
    low_passed = keep[:, 0, 0, 0] == 1  # a low-pass keeps DC, a high-pass does not
    assert set(names) == {"lowpass", "highpass"}
    assert [name == "lowpass" for name in names] == low_passed.tolist()


@pytest.mark.parametrize("name", ["mfm", "words"])
def test_the_name_of_a_filter_fits_above_its_image_in_a_plan(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headings: list[str] = []
    draw = figures.show_image
    monkeypatch.setattr(
        figures,
        "show_image",
        lambda axis, image, *lines, **more: headings.append(lines[0]) or draw(axis, image, *lines, **more),
    )
    draw_plan(tmp_path / "plan.png", [photo_like()], tiny(name), fresh_keys(9))
    assert set(headings) & {"lowpass", "highpass"}
    assert all(len(text) <= 12 for text in headings)


def test_a_preview_of_a_large_photograph_stays_below_a_megabyte(tmp_path: Path) -> None:
    skimage = pytest.importorskip("skimage.data")
    photograph = (
        torch.from_numpy(np.ascontiguousarray(skimage.astronaut()[:224, :224])).permute(2, 0, 1) / 255
    )
    images = photograph.expand(4, -1, -1, -1)
    path = draw_preview(tmp_path / "preview.png", dict.fromkeys(("target", "filtered", "filled"), images), "")
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("share", [0.0, 0.003, 0.998, 1.0])
def test_a_filter_that_is_hardly_ever_drawn_ends_no_preview(share: float) -> None:
    keys = telling_keys(tiny("mfm", low_pass_share=share), 4)
    assert len(set(keys.tolist())) == 4
