"""``freqmask spectra``: pictures and shares that add up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from freqmask.commands.draw import default_filters, spectra
from freqmask.errors import UserError
from freqmask.filters import FILTERS, build_filter
from freqmask.pretraining import figures
from freqmask.pretraining.figures import apply_filter


@pytest.fixture
def photo(tmp_path: Path) -> str:
    path = tmp_path / "a photo $é.png"
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC).save(path)
    return str(path)


def filtering(text: str, size: int = 32):
    image = torch.rand(3, size, size, generator=torch.Generator().manual_seed(0))
    return image, apply_filter(text, build_filter(text, size), image, torch.tensor([5]))


def test_one_filter_of_every_kind_is_drawn_by_default() -> None:
    assert {text.partition("(")[0] for text in default_filters(224)} == set(FILTERS) - {"oneof"}


@pytest.mark.parametrize("size", [16, 32, 224])
def test_the_default_filters_fit_every_size(size: int) -> None:
    for text in default_filters(size):
        build_filter(text, size)


def test_kept_and_removed_make_the_image() -> None:
    image, result = filtering("lowpass(radius=4)")
    torch.testing.assert_close(result.kept + result.removed, image)


def test_shares_are_of_the_whole_spectrum_without_the_mean() -> None:
    image, result = filtering("lowpass(radius=4)")
    spectrum = torch.fft.fftshift(torch.fft.fft2(image.double()), dim=(-2, -1))
    ky, kx = torch.meshgrid(torch.arange(-16, 16), torch.arange(-16, 16), indexing="ij")
    kept = (ky**2 + kx**2 < 16).double()
    energy = spectrum.abs().square()
    energy[:, 16, 16] = 0
    assert result.bins == pytest.approx(kept.mean().item(), abs=1e-6)
    assert result.energy == pytest.approx(((energy * kept).sum() / energy.sum()).item(), abs=1e-5)
    torch.testing.assert_close(result.keep.double(), kept)


@pytest.mark.parametrize("pair", [("com(fractions=[0.1])", "rcom(fractions=[0.1])"), ("lowpass", "highpass")])
def test_opposite_filters_share_the_energy(pair: tuple[str, str]) -> None:
    assert sum(filtering(text)[1].energy for text in pair) == pytest.approx(1, abs=1e-5)


def test_spectra_draws_and_tells(photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = spectra([photo], out=str(tmp_path / "out.png"), image_size=32)
    printed = capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.format == "PNG"
    assert all(text in printed for text in default_filters(32))


def test_images_of_any_kind_stand_side_by_side(photo: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tifffile.imwrite(
        tmp_path / "bands.tif", rng.random((12, 40, 40), dtype=np.float32), planarconfig="separate"
    )
    tifffile.imwrite(tmp_path / "grey.tif", (rng.random((40, 40)) * 4000).astype(np.uint16))
    files = [photo, str(tmp_path / "bands.tif"), str(tmp_path / "grey.tif")]
    assert spectra(files, out=str(tmp_path / "out.png"), filters=["com", "lowpass(radius=3)"]).is_file()


def test_a_mixture_gives_a_row_for_each_of_its_filters(photo: str, tmp_path: Path, capsys) -> None:
    """What ``com`` drew for an image had stood under that name: RCom's 99 % of the bins as Com's."""
    half = "oneof(['lowpass(radius=3)', 'com'])"
    spectra([photo], out=str(tmp_path / "out.png"), filters=["com", "rcom", "fixed", half])
    rows = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[3:-2]]
    assert rows == [
        "com",
        "rcom",
        "lowpass",
        "highpass",
        f"lowpass of {half}",
        f"oneof of {half}",
    ]  # a mixture in a mixture


@pytest.mark.parametrize("color", [0, 77, 255])
def test_a_single_color_has_no_energy_to_share(color: int, photo: str, tmp_path: Path, capsys) -> None:
    """Resampled, too: what that rounds is no energy."""
    Image.new("RGB", (300, 250), (color, color, 200 * (color > 0))).save(tmp_path / "one.png")
    spectra([str(tmp_path / "one.png"), photo], out=str(tmp_path / "out.png"), filters=["lowpass", "com"])
    *table, _, note, _, _ = capsys.readouterr().out.splitlines()
    for line in table[3:]:
        assert (line.split()[2:4] == ["–", "–"]) == line.endswith("one.png")
    assert note == "–: the image is of a single color, it has no energy beside its mean"
    spectra([photo], out=str(tmp_path / "out.png"), filters=["lowpass"])
    assert "–" not in capsys.readouterr().out


def test_one_pixel_beside_a_single_color_is_energy() -> None:
    image = torch.zeros(3, 224, 224)
    image[0, 5, 5] = 1 / 255
    shares = [
        apply_filter(t, build_filter(t, 224), image, torch.tensor([5])).energy
        for t in ("lowpass", "highpass")
    ]
    assert sum(shares) == pytest.approx(1, abs=1e-4)


def test_the_picture_names_no_share_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions: list[str] = []
    monkeypatch.setattr(figures, "show_image", lambda axis, colors, *lines, **scale: captions.extend(lines))
    Image.new("L", (16, 16), 9).save(tmp_path / "one.png")
    spectra([str(tmp_path / "one.png")], out=str(tmp_path / "out.png"), filters=["lowpass"])
    assert any(text.endswith("no energy beside its mean") for text in captions)
    shares = [text.partition(",")[0] for text in captions if text.startswith(("kept", "removed"))]
    assert shares == ["kept –", "removed –"]


@pytest.mark.parametrize("size", [(1, 1), (7, 1000), (1000, 7)])
def test_an_image_without_room_for_a_spectrum_is_refused_by_name(
    size: tuple[int, int], tmp_path: Path
) -> None:
    Image.new("L", size).save(tmp_path / "thin.png")
    width, height = size
    with pytest.raises(
        UserError, match=rf"thin.png, {height}x{width} pixels\) must have at least 8 pixels on"
    ):
        spectra([str(tmp_path / "thin.png")], out=str(tmp_path / "out.png"))


@pytest.mark.parametrize(("size", "said"), [((8, 33), True), ((33, 8), True), ((8, 32), False)])
def test_a_square_that_is_a_small_part_of_its_image_is_said(
    size: tuple[int, int], said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", size).save(tmp_path / "thin.png")
    spectra([str(tmp_path / "thin.png")], out=str(tmp_path / "out.png"), filters=["lowpass"])
    assert ("only the middle square of 8x8 is used" in capsys.readouterr().out) == said


def test_a_pattern_in_quotes_is_called_one(photo: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist; quotes kept the shell .* matches 1 path;"):
        spectra([str(tmp_path / "a*.png")], out=str(tmp_path / "out.png"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"filters": ["lowpas"]}, "did you mean 'lowpass'"),
        ({"filters": ["lowpass(radius=400)"]}, "radius"),
        ({"image_size": 2}, "image_size"),
        ({"out": "picture.jpg"}, "--out picture.png"),
        ({"image": []}, "1 to 4"),
        ({"image": ["no-such.png"]}, r"image \(no-such.png\) does not exist; the folder"),
    ],
)
def test_a_mistake_is_a_sentence_and_leaves_nothing(
    photo: str, tmp_path: Path, options, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        spectra(**{"image": [photo], "out": str(tmp_path / "out.png"), **options})
    assert not (tmp_path / "out.png").exists()
    before = Path(photo).read_bytes()
    with pytest.raises(UserError, match="which would be lost"):
        spectra([photo], out=photo)
    assert Path(photo).read_bytes() == before
