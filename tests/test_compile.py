"""Compiled filters, degradations and losses: no graph break, no warning, the same numbers."""

import warnings

import pytest
import torch

from freqmask.degradations import Blur, Downscale, Noise
from freqmask.filters import build_filter
from freqmask.losses import SpectrumLoss
from freqmask.methods.folk import DistillationLoss
from freqmask.rng import normal, uniform

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


@pytest.mark.parametrize(
    "text", ["fixed", "bandpass(low=1, high=4)", "com", "rings(edges=[1, 2, 4])", "energy"]
)
def test_a_filter_and_its_loss_are_one_graph_with_several_constants(text):
    """Through the autograd compiler, which torch 2.14 refused while all constants had one name."""
    filter, loss = build_filter(text), SpectrumLoss()

    def step(images, prediction):
        return loss(prediction, images, filter(images, KEYS).keep)

    images, prediction = torch.rand(2, 4, 3, 12, 11)
    values, gradients = [], []
    for compute in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        mine = prediction.clone().requires_grad_()
        values.append(compute(images, mine))
        values[-1].backward()
        gradients.append(mine.grad)
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.slow
def test_inductor_gives_the_same_numbers_and_gradients_without_a_warning():
    """One graph of all that a step needs, because a compilation takes seconds."""
    filter, loss = build_filter("com"), SpectrumLoss(kept_weight=0.5)

    def step(images, prediction, keys):
        keep = filter(images, keys).keep
        # few numbers: compilers treat the remainder of a vector apart
        return (
            loss(prediction, images, keep),
            keep,
            uniform(keys, "numbers", (7,)),
            normal(keys, "numbers", (7,)),
        )

    images, prediction = torch.rand(2, 4, 3, 12, 11)
    results = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")  # other libraries' own
        warnings.filterwarnings("error", message="Torchinductor does not support code generation for complex")
        for compute in (step, torch.compile(step, fullgraph=True)):
            mine = prediction.clone().requires_grad_()
            value, *rest = compute(images, mine, KEYS)
            value.backward()
            results.append((value, mine.grad, rest[2], rest[:2]))
    torch.testing.assert_close(results[1][:3], results[0][:3])
    for compiled, eager in zip(results[1][3], results[0][3], strict=True):
        assert torch.equal(compiled, eager)
