"""Losses: against the slow reference, over processes, at the edges."""

import math
import os

import numpy as np
import pytest
import reference
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from torch.nn.functional import softmax

from freqmask.errors import UserError
from freqmask.filters import Com, LowPass
from freqmask.losses import SpectrumLoss
from freqmask.methods.folk import DistillationLoss, collapse_number

SETTINGS = [
    {},
    {"reduce": "image"},
    {"masked_weight": 2.0, "kept_weight": 1.0},
    {"gamma": 1.5, "reduce": "image"},
    {"focal": 1.0},
    {"focal": 0.5, "gamma": 2.0, "masked_weight": 0.0, "kept_weight": 1.0},
]


def batch(size, channels=3, each=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    prediction, target = torch.randn(2, 3, channels, *size, generator=generator, dtype=dtype)
    keep = Com([0.05, 0.4], "each" if each else "luma")(target, torch.tensor([1, 2, 3])).keep
    return prediction, target, keep


@pytest.mark.parametrize("size", [(32, 32), (15, 20), (9, 9)])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_loss_agrees_with_the_full_spectrum_reference(settings, each, size):
    prediction, target, keep = batch(size, each=each)
    names = {"masked_weight": "masked", "kept_weight": "kept"}
    expected = reference.spectrum_loss(
        prediction,
        target,
        reference.full_mask(keep, size[1]),
        **{names.get(name, name): value for name, value in settings.items()},
    )
    loss = SpectrumLoss(**settings)
    np.testing.assert_allclose(loss(prediction, target, keep), expected, rtol=1e-12)
    single = loss(prediction.float(), target.float(), keep.float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, expected, rtol=1e-5)


def test_without_keep_every_frequency_counts_alike():
    prediction, target, _ = batch((16, 11))
    expected = reference.spectrum_loss(prediction, target, np.zeros((3, 1, 16, 11)))
    np.testing.assert_allclose(SpectrumLoss()(prediction, target, None), expected, rtol=1e-12)


def test_only_hidden_frequencies_are_learnt():
    prediction, target, _ = batch((16, 16))
    filtered, keep = LowPass(4)(target)
    right = filtered + (target - filtered)
    assert SpectrumLoss()(right, target, keep) < 2e-6  # sqrt(1e-12) is what remains
    wrong_where_kept = target - LowPass(4)(prediction).images
    assert SpectrumLoss()(wrong_where_kept, target, keep) < 2e-6
    assert SpectrumLoss(0.0, 1.0)(wrong_where_kept, target, keep) > 0.5


@pytest.mark.parametrize("settings", [{}, {"reduce": "image", "gamma": 1.5}, {"kept_weight": 0.5}])
def test_gradients_are_right(settings):
    prediction, target, keep = batch((6, 5), channels=2)
    prediction.requires_grad_()
    loss = SpectrumLoss(**settings)
    assert torch.autograd.gradcheck(lambda prediction: loss(prediction, target, keep), (prediction,))


def test_the_focal_weight_is_constant_in_the_backward_pass():
    prediction, target, keep = batch((8, 8))
    prediction.requires_grad_()
    distance = (torch.fft.fft2(prediction - target, norm="ortho").abs().square() + 1e-12).sqrt()
    weight = distance.detach() / distance.detach().amax((-2, -1), keepdim=True)
    hidden = 1 - torch.fft.ifftshift(torch.tensor(reference.full_mask(keep, 8)), dim=(-2, -1))
    expected = (hidden * weight * distance).sum() / hidden.expand_as(distance).sum()
    (one,) = torch.autograd.grad(expected, prediction)
    (other,) = torch.autograd.grad(SpectrumLoss(focal=1.0)(prediction, target, keep), prediction)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reduce", ["batch", "image"])
def test_nothing_hidden_or_nothing_wrong_gives_numbers_not_nan(reduce):
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    for keep in (torch.ones(2, 1, 8, 5), torch.zeros(2, 1, 8, 5)):
        loss = SpectrumLoss(reduce=reduce, focal=1.0)(images, images.detach(), keep)
        loss.backward()
        assert loss.isfinite() and loss < 1e-5
    assert images.grad.isfinite().all()


def test_the_loss_is_single_precision_under_autocast():
    prediction, target, keep = batch((16, 16), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = SpectrumLoss()(prediction, target, keep)
    assert torch.equal(loss, SpectrumLoss()(prediction, target, keep))
    half = SpectrumLoss()(prediction.bfloat16() * 1000, target.bfloat16() * 1000, keep)
    assert half.dtype == torch.float32 and half.isfinite()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"masked_weight": 0.0}, "not both 0"),
        ({"kept_weight": -1.0}, "at least 0"),
        ({"reduce": "images"}, "did you mean 'image'"),
        ({"gamma": 0.0}, "gamma"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(UserError, match=words):
        SpectrumLoss(**settings)


def test_distillation_agrees_with_the_reference():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    loss = DistillationLoss(7, 0.1, 0.04).double()
    loss.center += torch.linspace(-1, 1, 7)
    center = loss.center.numpy()
    for given, used in [(None, 0.04), (0.07, 0.07), (torch.tensor(0.05, dtype=torch.float64), 0.05)]:
        expected = reference.distillation_loss(student.numpy(), teacher.numpy(), center, 0.1, float(used))
        np.testing.assert_allclose(loss(student, teacher, given), expected, rtol=1e-12)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda student: loss(student, teacher), (student,))


def test_no_gradient_reaches_the_teacher_and_forward_leaves_the_centre_alone():
    loss = DistillationLoss(4)
    student, teacher = torch.randn(2, 3, 4, requires_grad=True)
    teacher = teacher.detach().requires_grad_()
    before = loss.center.clone()
    (gradient,) = torch.autograd.grad(loss(student, teacher), teacher, allow_unused=True)
    assert gradient is None
    assert torch.equal(before, loss.center)


def test_the_centre_is_a_moving_mean_and_travels_with_the_state():
    loss, logits = DistillationLoss(4, center_momentum=0.9), torch.randn(6, 4)
    for part in logits.split([4, 2]):  # of one step
        loss.collect(part)
    loss.update_center()
    torch.testing.assert_close(loss.center, 0.1 * logits.mean(0, keepdim=True))
    loss.update_center()  # nothing was collected since
    torch.testing.assert_close(loss.center, 0.1 * logits.mean(0, keepdim=True))
    loss.collect(logits)
    loss.update_center()
    torch.testing.assert_close(loss.center, 0.19 * logits.mean(0, keepdim=True))
    assert "center" in loss.state_dict()


@pytest.mark.parametrize(
    ("settings", "words"),
    [((1,), "outputs"), ((4, 0.0), "student_temperature"), ((4, 0.1, 0.04, 1.5), "center_momentum")],
)
def test_wrong_distillation_settings_are_named(settings, words):
    with pytest.raises(UserError, match=words):
        DistillationLoss(*settings)


def test_the_collapse_number_tells_collapse_from_diversity():
    same = softmax(torch.randn(1, 9), -1).expand(8, 9)
    apart = torch.eye(8)
    assert abs(collapse_number(same)) < 1e-6
    torch.testing.assert_close(collapse_number(apart), torch.tensor(math.log(8)))


def _one_of_two_processes(rank, folder, share):
    """Trains one step on its part of the batch and checks against the whole batch in one process."""
    torch.set_num_threads(1)
    prediction, target, keep = batch((8, 9))
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = prediction.clone().requires_grad_()
    SpectrumLoss(kept_weight=0.25)(whole, target, keep).backward()
    alone = DistillationLoss(4).double()
    alone.collect(logits)
    alone.update_center()

    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mine = slice(0, share) if rank == 0 else slice(share, None)
    part = prediction[mine].clone().requires_grad_()
    loss = SpectrumLoss(kept_weight=0.25)
    for compute in (loss, torch.compile(loss, fullgraph=True, backend="eager")):
        part.grad = None
        compute(part, target[mine], keep[mine]).backward()
        # DDP would divide the sum over processes by two
        torch.testing.assert_close(part.grad / 2, whole.grad[mine])
    together = DistillationLoss(4).double()
    together.collect(logits[mine])
    together.update_center()
    torch.testing.assert_close(together.center, alone.center)
    distributed.barrier()
    os._exit(
        0
    )  # gloo aborts now and then while it is taken apart ("terminate called without an active exception")


def test_two_processes_with_uneven_batches_equal_one(tmp_path):
    multiprocessing.spawn(_one_of_two_processes, (str(tmp_path), 2), nprocs=2)
