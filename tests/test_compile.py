"""torch.compile takes filters, degradations and losses whole: no graph break, no warning, the same numbers."""

import warnings

import pytest
import torch

from freqmask.degradations import Blur, Downscale, Noise
from freqmask.draws import normal, uniform
from freqmask.filters import build_filter
from freqmask.losses import DistillationLoss, SpectrumLoss

FILTERS = [
    "fixed",
    "com",
    "lowpass(radius=3, softness=1)",
    "bandstop(low=2, high=4)",
    "rings(edges=[1, 2, 4])",
    "com(fractions=[0.1], magnitude='mean')",
    "rcom(magnitude='each')",
    "energy(share=0.9)",
    "randombins(fraction=0.3)",
]
KEYS = torch.tensor([1, 2, 3, 4])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("text", FILTERS)
def test_a_traced_filter_has_no_graph_break(text):
    filter, images = build_filter(text), torch.rand(4, 3, 12, 11)
    compiled = torch.compile(filter, fullgraph=True, backend="eager")
    for eager, traced in zip(filter(images, KEYS), compiled(images, KEYS), strict=True):
        assert torch.equal(eager, traced)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_traced_filter_takes_other_sizes(dynamic):
    filter = build_filter("com")
    compiled = torch.compile(filter, fullgraph=True, backend="eager", dynamic=dynamic)
    for size in [(12, 11), (9, 16), (16, 16)]:
        images = torch.rand(4, 3, *size)
        assert torch.equal(compiled(images, KEYS).keep, filter(images, KEYS).keep)


@pytest.mark.parametrize("degradation", [Downscale(), Blur(), Noise()], ids=repr)
def test_a_traced_degradation_has_no_graph_break(degradation):
    images = torch.rand(4, 3, 12, 11)
    compiled = torch.compile(degradation, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images, KEYS), degradation(images, KEYS))


def test_traced_distillation_has_no_graph_break():
    loss, logits = DistillationLoss(5), torch.randn(4, 5)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for temperature in (0.04, 0.05, torch.tensor(0.06)):
        torch.testing.assert_close(compiled(logits, logits, temperature), loss(logits, logits, temperature))


def test_a_filter_draws_its_own_keys_when_compiled():
    compiled = torch.compile(build_filter("com"), fullgraph=True, backend="eager")
    assert compiled(torch.rand(2, 3, 8, 8)).images.shape == (2, 3, 8, 8)


@pytest.mark.slow
def test_inductor_gives_the_same_numbers_without_a_warning():
    """One graph of everything, because a compilation takes seconds."""
    filters = [build_filter(text) for text in FILTERS]
    degradations, loss = [Downscale(), Blur([3, 5], 1.0), Noise()], SpectrumLoss(kept_weight=0.5)

    def everything(images, keys):
        filtered = [filter(images, keys) for filter in filters]
        degraded = [degradation(images, keys) for degradation in degradations]
        return (
            filtered,
            degraded,
            [loss(result.images, images, result.keep) for result in filtered],
            uniform(keys, "numbers", (7,)),
            normal(keys, "numbers", (7,)),
        )

    images = torch.rand(4, 3, 12, 11)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")  # other libraries' own
        warnings.filterwarnings("error", message="Torchinductor does not support code generation for complex")
        compiled = torch.compile(everything, fullgraph=True)(images, KEYS)
    expected = everything(images, KEYS)
    torch.testing.assert_close(compiled, expected, atol=2e-6, rtol=1e-5)
    for ours, other in zip(compiled[0], expected[0], strict=True):
        torch.testing.assert_close(ours.keep, other.keep, atol=1e-6, rtol=0)
    assert torch.equal(compiled[3], expected[3])


@pytest.mark.slow
def test_gradients_through_a_compiled_loss_are_the_same():
    loss, keep = SpectrumLoss(), build_filter("fixed")(torch.rand(4, 3, 12, 11), KEYS).keep
    target, prediction = torch.rand(2, 4, 3, 12, 11)
    gradients = []
    for compute in (loss, torch.compile(loss, fullgraph=True)):
        mine = prediction.clone().requires_grad_()
        compute(mine, target, keep).backward()
        gradients.append(mine.grad)
    torch.testing.assert_close(*gradients)
