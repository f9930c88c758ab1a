"""Mean IoU as a slow loop has it; windows that cover every pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from freqmask.evaluation.results import (
    bootstrap_interval,
    class_scores,
    image_margins,
    mean_iou,
    segmentation_score,
)
from freqmask.evaluation.upernet import resized, segment_windows, window_starts


def maps(count: int = 3, classes: int = 4) -> tuple[list[np.ndarray], list[np.ndarray]]:
    draw = np.random.default_rng(0)
    truths = [draw.integers(-1, classes - 1, (9, 7)) for _ in range(count)]  # the last class is never there
    return truths, [
        np.where(draw.random((9, 7)) < 0.6, np.abs(t), draw.integers(0, 2, (9, 7))) for t in truths
    ]


def slow_ious(truths: list[np.ndarray], answers: list[np.ndarray], classes: int) -> list[float]:
    ious = []
    for k in range(classes):
        both = either = 0
        for truth, answer in zip(truths, answers, strict=True):
            for there, said in zip(truth.ravel(), answer.ravel(), strict=True):
                if there >= 0:
                    both += there == k and said == k
                    either += there == k or said == k
        ious.append(both / either if either else float("nan"))
    return ious


def test_mean_iou_is_that_of_a_slow_loop_over_all_pixels_of_all_images() -> None:
    truths, answers = maps()
    counts = np.stack([image_margins(t, a, 4) for t, a in zip(truths, answers, strict=True)])
    ious = slow_ious(truths, answers, 4)
    found = segmentation_score(counts.sum(0))
    assert np.isnan(ious[3])
    assert found.mean_iou == pytest.approx(np.nanmean(ious))
    assert class_scores(counts.sum(0))["iou"] == pytest.approx(np.array(ious), nan_ok=True)
    counted = np.concatenate([t.ravel() for t in truths]) >= 0
    right = np.concatenate([(t == a).ravel() for t, a in zip(truths, answers, strict=True)])[counted]
    assert found.pixel_accuracy == pytest.approx(right.mean())


def test_pixels_that_do_not_count_change_no_score() -> None:
    truth, answer = np.array([[0, 1, -1], [1, 0, -1]]), np.array([[0, 1, 1], [0, 0, 0]])
    other = answer.copy()
    other[:, 2] = 0
    assert (image_margins(truth, answer, 2) == image_margins(truth, other, 2)).all()
    assert image_margins(truth, answer, 2).sum(1).tolist() == [3, 4, 4]


def test_the_interval_holds_the_score_and_vanishes_where_images_are_alike() -> None:
    truths, answers = maps(12)
    counts = np.stack([image_margins(t, a, 4) for t, a in zip(truths, answers, strict=True)])
    low, high = bootstrap_interval(counts, mean_iou)
    assert low < segmentation_score(counts.sum(0)).mean_iou < high
    low, high = bootstrap_interval(np.repeat(counts[:1], 5, axis=0), mean_iou)
    assert low == pytest.approx(high)


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(100, 40, 30), (101, 40, 17), (40, 40, 5), (7, 40, 30)]
)
def test_windows_cover_each_pixel_and_stay_inside(length: int, window: int, stride: int) -> None:
    starts = window_starts(length, window, stride)
    covered = np.zeros(max(length, window), int)
    for start in starts:
        covered[start : start + window] += 1
    assert covered.min() >= 1
    assert len(starts) == len(set(starts))
    assert starts[-1] + window == len(covered)


def pixelwise(images: Tensor) -> Tensor:
    """A network that looks at one pixel at a time, so that windows must not matter."""
    return torch.stack([images[:, 0], 1 - images[:, 0], images[:, 1]], dim=1)


@pytest.mark.parametrize("size", [(20, 33), (16, 16), (9, 12)])
def test_windows_give_a_pixel_what_the_whole_image_gives(size: tuple[int, int]) -> None:
    image = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    whole = resized(pixelwise(image[None]), size)[0]
    parts = segment_windows(pixelwise, image, 16, 11, 3, torch.tensor([0.5, 0.5]))
    assert torch.allclose(whole, parts, atol=1e-6)
    assert (resized(parts[None], size)[0].argmax(dim=0) == whole.argmax(0)).all()


def test_one_window_is_the_whole_image_whatever_the_network() -> None:
    def neighbours(images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, 4)

    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = resized(neighbours(image[None]), (16, 16))[0]
    assert torch.equal(segment_windows(neighbours, image, 16, 5, 1, torch.zeros(3)), whole)
