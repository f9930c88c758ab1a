"""Images in memory give the batches that the loader gives: on a CPU bit for bit, on a device to two levels of 255."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from freqmask.data import in_memory
from freqmask.data.in_memory import (
    DoesNotFitError,
    InMemoryBatches,
    InMemoryImages,
    Limits,
    _with_content,
    cut_views,
    draw,
    has_flat_tile,
    make_plan,
    read_images,
)
from freqmask.data.loader import TrainDataset, TrainSampler, make_loader
from freqmask.data.pixels import ArrayPicture
from freqmask.data.sources import open_source
from freqmask.data.transforms import Geometry
from freqmask.data.values import ValueRange
from freqmask.errors import UserError
from freqmask.spectrum import rfft2

ENOUGH = 10**9
TWO_VIEWS = (Geometry(16, scale=(0.2, 1.0), vertical_flip=0.5, quarter_turns=True), Geometry((21, 12)))
SIZES = [(9, 14), (16, 16), (31, 23), (40, 64), (17, 90), (33, 33), (50, 20)]


def photograph(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Noise whose spectrum falls as that of photographs does, uint8 (channel, height, width)."""
    spectrum = np.fft.fft2(np.random.default_rng(seed).normal(size=(channels, height, width)))
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    image = np.fft.ifft2(spectrum / (radius + 0.02)).real
    low, high = image.min(), image.max()
    return np.uint8(255 * (image - low) / (high - low))


class Pair:
    """The two ways to the same batches."""

    def __init__(self, source: Any, geometries: Any = TWO_VIEWS, **settings: Any) -> None:
        self.source, self.geometries = source, geometries
        self.range = settings.pop("value_range", ValueRange())
        self.channels, self.settings = settings.pop("channels", 3), settings
        self.images = read_images(source, geometries, Limits(99, ENOUGH), self.channels)

    def sampler(self, **settings: Any) -> TrainSampler:
        return TrainSampler(len(self.source), 0, **{"batch_size_per_process": 8, "total_steps": 4} | settings)

    def kept(self, **settings: Any) -> list[dict[str, Any]]:
        sampler = self.sampler(**settings)
        return list(InMemoryBatches(self.images, self.source, sampler, self.geometries, self.range, seed=5))

    def loaded(self, **settings: Any) -> list[dict[str, Any]]:
        dataset = TrainDataset(self.source, self.geometries, self.range, self.channels, seed=5)
        sampler = self.sampler(**settings)
        return list(make_loader(dataset, sampler, sampler.batch_size_per_process))

    def views(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of views of all batches; all else in them is the same."""
        loaded, kept = self.loaded(), self.kept()
        assert len(loaded) == len(kept)
        for one, other in zip(loaded, kept, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in ("keys", "labels", "indices"))
            assert one["skipped"] == other["skipped"]
            for first, second in zip(one["views"], other["views"], strict=True):
                assert first.dtype == second.dtype
                assert first.shape == second.shape
                assert second.is_contiguous() or self.geometries[0].quarter_turns
                yield first, second


@pytest.fixture
def photographs_of_all_sizes(memory_source: Any) -> Any:
    images: list[Any] = [photograph(*size, seed=seed) for seed, size in enumerate(3 * SIZES)]
    images[4] = "cut off"
    images[9] = np.full((3, 20, 30), 7, np.uint8)
    images[10] = photograph(20, 30, channels=1)
    return memory_source(images, labels=[*range(20), None])


@pytest.fixture
def as_on_a_device(monkeypatch: Any) -> None:
    """The CPU cuts windows as a GPU does."""
    monkeypatch.setattr(in_memory, "_cut_on_host", in_memory.cut_on_device)


def test_views_are_the_loaders_bit_for_bit(photographs_of_all_sizes: Any) -> None:
    assert all(torch.equal(first, second) for first, second in Pair(photographs_of_all_sizes).views())


@pytest.mark.usefixtures("as_on_a_device")
def test_views_on_a_device_are_the_loaders_to_two_levels(photographs_of_all_sizes: Any) -> None:
    differences = [
        (first.int() - second.int()).abs().flatten()
        for first, second in Pair(photographs_of_all_sizes).views()
    ]
    assert torch.cat(differences).max() <= 2
    assert (torch.cat(differences) == 0).float().mean() > 0.98


def log_spectrum(views: torch.Tensor) -> torch.Tensor:
    """Mean log magnitude of views (batch, channel, side, side) in six bands of the radius."""
    magnitude = (rfft2(views.float() / 255).abs() + 1e-4).log().mean(dim=(0, 1))
    side = views.shape[-1]
    radius = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side))
    bands = (radius * 12).long().clamp(max=5)
    return torch.stack([magnitude[bands == band].mean() for band in range(6)])


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize(
    ("side", "picture"), [(17, (40, 61)), (32, (40, 37)), (33, (21, 18)), (16, (16, 16))]
)
def test_log_spectra_are_the_loaders_band_by_band(
    side: int, picture: tuple[int, int], memory_source: Any
) -> None:
    images = [photograph(picture[0] + seed % 3, picture[1] - seed % 5, seed=seed) for seed in range(32)]
    pair = Pair(memory_source(images), [Geometry(side, scale=(0.5, 1.0))])
    first, second = (torch.cat(views) for views in zip(*pair.views(), strict=True))
    torch.testing.assert_close(log_spectrum(second), log_spectrum(first), atol=0.005, rtol=0)


def test_a_resampling_without_smoothing_would_show_in_the_spectrum(memory_source: Any) -> None:
    image = torch.from_numpy(photograph(64, 64))[None].float()
    plain = torch.nn.functional.interpolate(image, size=(24, 24), mode="bicubic", antialias=False)
    smooth = torch.nn.functional.interpolate(image, size=(24, 24), mode="bicubic", antialias=True)
    assert (log_spectrum(plain) - log_spectrum(smooth)).abs().max() > 0.1


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "uint8"])
def test_other_types_and_ranges_are_the_loaders(
    dtype: str, on_device: bool, memory_source: Any, request: Any
) -> None:
    if on_device:
        request.getfixturevalue("as_on_a_device")
    scale = 200 if dtype in ("uint16", "int16") else 1
    images = [
        (photograph(*size, channels=5, seed=1).astype(np.float32) * scale).astype(dtype) for size in SIZES
    ]
    pair = Pair(memory_source(images), channels=5, value_range=ValueRange(9.0, 201.0 * scale))
    assert pair.images.bytes == sum(image.nbytes for image in images)
    for first, second in pair.views():
        assert first.dtype == torch.float32
        torch.testing.assert_close(second, first, atol=3e-6 if on_device else 0, rtol=0)


def test_windows_without_content_are_drawn_again_as_the_loader_does(memory_source: Any) -> None:
    images = []
    for seed in range(12):  # a small photograph in a black field: most windows are black, at times all four
        image = np.zeros((3, 40 + seed, 50), np.uint8)
        top, left = 3 * seed % 30, 7 * seed % 40
        image[:, top : top + 8, left : left + 8] = photograph(8, 8, seed=seed)
        images.append(image)
    geometries = [Geometry(8, crop="native"), Geometry(10, scale=(0.05, 0.3))]
    pair = Pair(memory_source(images), geometries)
    assert pair.images.flat.all()
    for first, second in pair.views():
        assert torch.equal(first, second)
        assert (second != second[:, :, :1, :1]).flatten(1).any(dim=1).all()
    drawn = draw(pair.images, geometries, torch.arange(12), torch.arange(12))
    plan = make_plan(pair.images, geometries, drawn)
    attempts = [_with_content(pair.images.pixels, plan, at_once) for at_once in (0, 2**19, 2**26)]
    assert all(torch.equal(found, attempts[0]) for found in attempts), "a GPU looks at several together"
    assert not torch.equal(attempts[0], plan.boxes)


def test_tiles_tell_whether_a_window_may_be_empty() -> None:
    image = photograph(20, 30)
    assert not has_flat_tile(image, 4)
    image[:, 8:12, 4:8] = 50
    assert has_flat_tile(image, 4)
    assert not has_flat_tile(image, 5)
    image[1, 9, 5] = 51
    assert not has_flat_tile(image, 4)


@pytest.mark.parametrize("place", range(10))
def test_an_image_in_which_a_window_may_be_empty_is_marked(place: int, memory_source: Any) -> None:
    images = [photograph(40, 40), photograph(40, 40)]
    images[1][:, place : place + 9, 13 : 13 + 9] = 80
    assert Pair(memory_source(images), [Geometry(9, crop="native")]).images.flat.tolist() == [False, True]


def test_a_restart_and_two_processes_cut_the_same_views(photographs_of_all_sizes: Any) -> None:
    pair = Pair(photographs_of_all_sizes)
    whole, rest = pair.kept(), pair.kept(start_step=2)
    halves = [pair.kept(batch_size_per_process=4, rank=rank, world_size=2) for rank in (0, 1)]
    assert len(rest) == 2
    for view in range(2):
        assert torch.equal(rest[0]["views"][view], whole[2]["views"][view])
        both = torch.cat([half[1]["views"][view] for half in halves])
        assert torch.equal(both, whole[1]["views"][view])


def test_workers_decode_the_same_images(photographs_of_all_sizes: Any) -> None:
    limits = Limits(99, ENOUGH)
    counts: list[int] = []
    alone = read_images(photographs_of_all_sizes, TWO_VIEWS, limits)
    helped = read_images(photographs_of_all_sizes, TWO_VIEWS, limits, workers=2, report=counts.append)
    for name in ("pixels", "starts", "sizes", "identities", "labels", "flat"):
        assert torch.equal(getattr(alone, name), getattr(helped, name)), name
    assert alone.bad == helped.bad == {4: "cut off", 9: "every pixel has the same value"}
    assert counts[-1] == 21


def test_a_source_of_bad_images_ends_with_the_loaders_sentence(memory_source: Any) -> None:
    pair = Pair(memory_source([photograph(9, 9), "cut off"]))
    pair.images.bad = {0: "gone", 1: "cut off"}
    with pytest.raises(UserError, match="2 images in a row cannot be used; the first, image-"):
        pair.kept()


@pytest.mark.parametrize(
    ("second", "limits", "reason"),
    [
        (
            photograph(20, 101),
            Limits(100, ENOUGH),
            "image-1 has 20x101 pixels, more than 100 a side",
        ),
        (
            photograph(9, 9).astype(np.uint16),
            Limits(99, ENOUGH),
            "image-1 holds uint16, others uint8",
        ),
        (photograph(30, 30), Limits(99, 2_000), "they take more than the 2 kB"),
    ],
)
def test_what_cannot_be_kept_is_said(second: Any, limits: Limits, reason: str, memory_source: Any) -> None:
    with pytest.raises(DoesNotFitError, match=reason):
        read_images(memory_source([photograph(9, 9), second]), TWO_VIEWS, limits)


def test_images_with_gaps_are_left_to_the_loader(memory_source: Any) -> None:
    image = photograph(12, 12).astype(np.float32)
    image[0, 3, 3] = np.nan
    marked = ArrayPicture(np.ascontiguousarray(photograph(12, 12).transpose(1, 2, 0)))
    marked.nodata = float(marked.array[5, 5, 0])
    for source in (memory_source([image]), memory_source([marked])):
        with pytest.raises(DoesNotFitError, match="image-0 has missing values"):
            read_images(source, TWO_VIEWS, Limits(99, ENOUGH))


def test_transparent_images_are_left_to_the_loader(memory_source: Any) -> None:
    icon = np.zeros((4, 20, 20), np.uint8)
    icon[3] = photograph(20, 20, channels=1)
    with pytest.raises(DoesNotFitError, match=r"image-0 loses channels \(4 to 3\)"):
        read_images(memory_source([icon]), TWO_VIEWS, Limits(99, ENOUGH))


def test_jpegs_are_those_that_the_loader_decodes(tmp_path: Any) -> None:
    for number, size in enumerate(SIZES):
        image = Image.fromarray(photograph(*size, seed=number).transpose(1, 2, 0))
        image.save(tmp_path / f"{number}.jpg", quality=90)
    for first, second in Pair(open_source(tmp_path), [Geometry(24)]).views():
        assert torch.equal(first, second)


def test_the_device_is_not_waited_for(photographs_of_all_sizes: Any) -> None:
    """On the meta device there are no values, and whatever looks at one raises."""
    pair = Pair(photographs_of_all_sizes)
    pair.images.flat[:3] = True
    drawn = draw(pair.images, TWO_VIEWS, torch.arange(4), torch.arange(4))
    plan = make_plan(pair.images, TWO_VIEWS, drawn)
    assert plan.flat.tolist() == [0, 1, 2]
    meta = pair.images.to(torch.device("meta"))
    views = cut_views(meta, plan.to(torch.device("meta")), TWO_VIEWS, ValueRange())
    assert [tuple(view.shape) for view in views] == [(4, 3, 16, 16), (4, 3, 21, 12)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_cuts_the_same_views_without_waiting(photographs_of_all_sizes: Any) -> None:
    pair = Pair(photographs_of_all_sizes)
    here = pair.kept()
    pair.images.to(torch.device("cuda"))
    pair.kept()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = pair.kept()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(here, there, strict=True):
        for first, second in zip(one["views"], other["views"], strict=True):
            assert (first.int() - second.cpu().int()).abs().max() <= 1


def test_images_take_their_own_bytes_and_no_more(photographs_of_all_sizes: Any) -> None:
    images: InMemoryImages = Pair(photographs_of_all_sizes).images
    assert images.bytes == 3 * sum(
        int(height) * int(width)
        for index, (height, width) in enumerate(images.sizes.tolist())
        if index not in images.bad
    )
