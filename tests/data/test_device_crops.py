"""Resampling by matrices against torch's own bicubic, which is Pillow's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from freqmask.data.transforms import cubic, resample, resampling_matrices, resize

NOT_TURNED = torch.zeros(3, 3, dtype=torch.bool)
SIZES = torch.tensor([[9, 31], [24, 17], [13, 13]])


def framed(images: list[torch.Tensor], height: int, width: int) -> torch.Tensor:
    """Images (channel, height, width) as lines of all channels in frames; beyond them lies what would disturb."""
    frames = torch.full((len(images), height, images[0].shape[0], width), 9.0)
    for frame, image in zip(frames, images, strict=True):
        frame[: image.shape[1], :, : image.shape[2]] = image.transpose(0, 1)
    return frames


def noise(channels: int, sizes: torch.Tensor) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(channels, *size, generator=generator) for size in sizes.tolist()]


def test_the_kernel_is_keys_cubic_of_a_half() -> None:
    x = torch.linspace(-2.5, 2.5, 501, dtype=torch.float64)
    near, far = 1.5 * x.abs() ** 3 - 2.5 * x**2 + 1, -0.5 * x.abs() ** 3 + 2.5 * x**2 - 4 * x.abs() + 2
    expected = torch.where(x.abs() < 1, near, torch.where(x.abs() < 2, far, 0))
    torch.testing.assert_close(cubic(x.clone()), expected, atol=1e-14, rtol=0)
    assert cubic(torch.tensor([0.0, 1.0, -1.0, 2.0])).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("size", [(7, 5), (16, 16), (40, 33), (1, 1)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_windows_of_differing_sizes_come_out_as_torchs_bicubic(size: tuple[int, int], channels: int) -> None:
    images = noise(channels, SIZES)
    views = resample(framed(images, 24, 32), SIZES, size, NOT_TURNED, levels=False)
    for image, view in zip(images, views, strict=True):
        expected = functional.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0]
        torch.testing.assert_close(view, expected.clamp(0, 1), atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [(7, 5), (16, 16), (40, 33)])
def test_levels_are_rounded_as_pillow_rounds_them(size: tuple[int, int]) -> None:
    images = [(255 * image).round().to(torch.uint8) for image in noise(3, SIZES)]
    views = resample(framed(images, 24, 32), SIZES, size, NOT_TURNED, levels=True)
    assert views.dtype == torch.uint8
    differences = torch.stack(
        [view.int() - resize(image, size) for image, view in zip(images, views, strict=True)]
    )
    assert differences.abs().max() <= 2
    assert (differences == 0).float().mean() > 0.98


def test_a_window_of_the_asked_size_stays_as_it_is() -> None:
    image = torch.rand(2, 13, 13)
    views = resample(
        framed([image], 16, 16), torch.tensor([[13, 13]]), (13, 13), NOT_TURNED[:1], levels=False
    )
    assert torch.equal(views[0], image)


def test_mirrors_and_turns_are_those_of_the_finished_view() -> None:
    flips = torch.tensor([[i & 4 > 0, i & 2 > 0, i & 1 > 0] for i in range(8)])
    images = noise(2, torch.tensor([[11, 14]])) * 8
    sizes = torch.tensor([[11, 14]]).expand(8, 2)
    views = resample(framed(images, 16, 16), sizes, (6, 6), flips, levels=False, turned=True)
    for view, (mirrored, upside_down, exchanged) in zip(views, flips.tolist(), strict=True):
        expected = views[0].flip(-1) if mirrored else views[0]
        expected = expected.flip(-2) if upside_down else expected
        torch.testing.assert_close(view, expected.mT if exchanged else expected, atol=1e-6, rtol=0)


def test_every_row_of_a_matrix_sums_to_one_within_the_line() -> None:
    lengths = torch.tensor([1, 5, 20])
    matrices = resampling_matrices(lengths, 24, 9, torch.tensor([False, True, False]))
    torch.testing.assert_close(matrices.sum(dim=2), torch.ones(3, 9))
    for matrix, length in zip(matrices, lengths, strict=True):
        assert not matrix[:, length:].any()
