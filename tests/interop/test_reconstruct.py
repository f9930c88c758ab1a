"""What a model fills in is measured band by band, for runs and for converted checkpoints."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from freqmask.commands.sheets import draw_reconstructions
from freqmask.errors import UserError
from freqmask.interop.foreign_weights import convert_file
from freqmask.interop.formats import export_model
from freqmask.interop.models import open_method, open_model, psnr_by_band, read_image
from freqmask.interop.weight_files import write_timm_folder
from freqmask.methods.mfm import band_edges
from freqmask.pretraining import figures
from freqmask.spectrum import decibel

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_converted_mfm_checkpoint_reconstructs_as_its_run_does(vit_run, tmp_path):
    export_model(open_model(vit_run.path), tmp_path / "x.pth", "mfm-checkpoint")
    converted = convert_file(tmp_path / "x.pth")
    write_timm_folder(
        converted.model,
        tmp_path / "x",
        input_size=(3, 32, 32),
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.25, 0.3),
        metadata=converted.metadata,
        decoder=converted.decoder,
    )
    run, _ = open_method(str(vit_run.path))
    folder, _ = open_method(str(tmp_path / "x"))
    keys = torch.arange(2)
    expected, got = run.reconstruct(IMAGES, keys), folder.reconstruct(IMAGES, keys)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-5, rtol=0)


def test_an_exported_run_keeps_its_decoder(vit_run, tmp_path):
    export_model(open_model(vit_run.path), tmp_path / "x")
    run, _ = open_method(str(vit_run.path))
    folder, _ = open_method(str(tmp_path / "x"))
    torch.testing.assert_close(
        folder.reconstruct(IMAGES)["prediction"], run.reconstruct(IMAGES)["prediction"]
    )


def test_another_filter_can_be_asked_for(vit_run):
    method, _ = open_method(str(vit_run.path), "highpass(radius=6)")
    assert method.filter.describe().startswith("highpass(radius=6")
    with pytest.raises(UserError, match="lowpass"):
        open_method(str(vit_run.path), "lowpas(radius=6)")


def test_restoration_has_no_filter_to_choose(run_factory):
    run = run_factory(method="sr")
    method, _ = open_method(str(run.path))
    assert psnr_by_band(method.reconstruct(IMAGES))[0].hidden == 1
    with pytest.raises(UserError, match="no say in method sr"):
        open_method(str(run.path), "com")


def test_models_without_a_decoder_say_what_to_name_instead(resnet_run, tmp_path):
    with pytest.raises(UserError, match="no decoder"):
        open_method("random:resnet10t")


def full_spectrum_error(image, target, low, high):
    """Mean squared error of the bins of one ring, over the whole shifted spectrum in float64."""
    difference = np.fft.fft2(image.double().numpy() - target.double().numpy(), norm="ortho")
    size = image.shape[-1]
    k = np.fft.fftfreq(size) * size
    square = k[:, None] ** 2 + k**2
    ring = (square >= low**2) & (square < high**2)
    return (np.abs(difference) ** 2)[..., ring].mean()


def test_psnr_of_a_band_is_that_of_its_bins_in_the_full_spectrum(vit_run):
    method, _ = open_method(str(vit_run.path), "lowpass(radius=5)")
    pictures = method.reconstruct(IMAGES)
    bands = psnr_by_band(pictures)
    assert [(band.low, band.high) for band in bands] == list(pairwise(band_edges(32, 32)))
    for band in bands:
        for value, name in (
            (band.filtered, "filtered"),
            (band.predicted, "prediction"),
            (band.filled, "filled"),
        ):
            error = full_spectrum_error(pictures[name], pictures["target"], band.low, band.high)
            assert (math.isinf(value) and error < 1e-10) or value == pytest.approx(
                -10 * math.log10(error), abs=1e-6
            )
    assert bands[0].hidden == 0
    assert bands[-1].hidden == 1
    assert bands[-1].filled == pytest.approx(bands[-1].predicted, abs=1e-4)


def test_decibels():
    assert decibel(0.01) == pytest.approx(20)
    assert decibel(0) == math.inf


def test_images_are_read_as_the_model_takes_them(vit_run, photographs, tmp_path):
    opened = open_model(vit_run.path)
    image = read_image(photographs / "cats" / "1.png", opened)
    assert image.shape == (1, 3, 32, 32)
    assert image.dtype == torch.float32
    assert 0 <= float(image.min()) < float(image.max()) <= 1
    np.save(tmp_path / "sixteen.npy", np.full((40, 40), 32768, np.uint16))
    assert float(read_image(tmp_path / "sixteen.npy", opened).mean()) == pytest.approx(0.5, abs=1e-4)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "link.png").symlink_to(tmp_path / "away.png")
    for bad, words in {
        "text.png": "cannot be read: its content",
        "link.png": "cannot be read: it is a link to a file that is gone",
        "sixten.npy": r"does not exist; did you mean .*sixteen\.npy",
        "*.npy": "does not exist; quotes kept the shell",
    }.items():
        with pytest.raises(UserError, match=words):
            read_image(tmp_path / bad, opened)


def test_a_dark_image_is_said_to_be_brightened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    show = figures.show_image

    def listen(axis: Any, colors: Any, *lines: str, **scale: Any) -> None:
        said.append(" ".join(filter(None, lines)))
        show(axis, colors, *lines, **scale)

    monkeypatch.setattr(figures, "show_image", listen)
    image = torch.linspace(0, 1, 256).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    for factor in (1.0, 0.01):
        tensors = dict.fromkeys(("target", "filtered", "prediction", "filled"), factor * image)
        draw_reconstructions(tmp_path / "sheet.png", [("ramp", "lowpass", tensors)], "a model")
    assert [line.count("brightened") for line in said] == [0] * 4 + [1] * 4
    assert said[1] == "filtered lowpass the same"
    assert said[4] == f"original ramp brightened x{100 / np.percentile(image, 99):.1f}"
