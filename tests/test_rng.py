"""Draws: one number for one (key, stream, place), wherever and however it is asked for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import splitmix64

from freqmask.errors import UserError
from freqmask.filters import build_filter
from freqmask.rng import (
    combine,
    fresh_keys,
    identity_of,
    normal,
    sample_key,
    sample_keys,
    torch_seeded,
    uniform,
    uniform_numbers,
)

KNOWN = (0.2609267234802246, 0.06978362798690796, -8634215444751041720, 5701195407040762926)
INT64 = st.integers(-(2**63), 2**63 - 1)


@given(key=INT64, stream=st.one_of(st.text(max_size=8), INT64), count=st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_the_python_twin_draws_the_very_same_numbers(key, stream, count):
    assert uniform_numbers(key, stream, count) == uniform(torch.tensor([key]), stream, (count,))[0].tolist()


@given(seed=INT64, epoch=st.integers(0, 1000), identity=INT64, view=st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_a_views_key_is_the_images_key_combined_with_the_view(seed, epoch, identity, view):
    key = torch.tensor([sample_key(seed, epoch, identity)])
    assert combine(key, view).item() == sample_key(seed, epoch, identity, view)


@given(seed=INT64, pairs=st.lists(st.tuples(st.integers(0, 1000), INT64), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_the_keys_of_a_batch_are_those_of_its_images(seed, pairs):
    epochs, identities = torch.tensor(pairs).unbind(1)
    assert sample_keys(seed, epochs, identities).tolist() == [sample_key(seed, *pair) for pair in pairs]


def test_the_bits_are_splitmix64s_of_key_and_place():
    key = combine(torch.tensor([123]), "stream").item() % 2**64
    states = [(key ^ place) * 0x9E3779B97F4A7C15 % 2**64 for place in range(6)]
    expected = [(splitmix64(state, 1)[0] >> 40) / 2**24 for state in states]
    assert uniform(torch.tensor([123]), "stream", (2, 3)).flatten().tolist() == expected


def test_known_numbers_stay_forever():
    # a run that is resumed with a later version must go on with the same draws
    assert uniform_numbers(0, "flip", 2) == [KNOWN[0], KNOWN[1]]
    assert sample_key(1, 2, 3) == KNOWN[2]
    assert identity_of("cat.png") == identity_of(b"cat.png") == KNOWN[3]


def test_a_samples_numbers_do_not_depend_on_its_batch():
    keys = fresh_keys(7)
    together = uniform(keys, "crop", (3,))
    assert torch.equal(together[4:5], uniform(keys[4:5], "crop", (3,)))
    assert torch.equal(together, uniform(keys.flip(0), "crop", (3,)).flip(0))


def test_streams_and_keys_are_independent():
    keys = torch.arange(4000)
    first, second = uniform(keys, "a"), uniform(keys, "b")
    for one, other in [(first, second), (first[:-1], first[1:])]:
        assert abs(torch.corrcoef(torch.stack((one, other)))[0, 1]) < 0.06


def test_uniform_numbers_are_uniform():
    numbers = uniform(torch.tensor([5]), "histogram", (64_000,))
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.histc(numbers, 64, 0, 1)
    assert ((counts - 1000).square() / 1000).sum() < 120  # chi-squared with 63 degrees of freedom: p < 2e-5


@pytest.mark.parametrize("count", [1, 2, 99_999])
def test_normal_numbers_fill_any_shape(count):
    assert normal(torch.tensor([1, 2]), "noise", (count,)).shape == (2, count)


def test_normal_numbers_are_normal():
    numbers = normal(torch.tensor([1, 2]), "noise", (3, 200, 200)).double()
    assert abs(numbers.mean()) < 0.01
    assert abs(numbers.std() - 1) < 0.01
    for z in (-2.0, -1.0, 0.0, 1.0, 2.0):
        assert abs((numbers < z).double().mean() - 0.5 * (1 + math.erf(z / math.sqrt(2)))) < 0.004
    halves = numbers.flatten(1).chunk(2, dim=1)  # cosine and sine of one angle
    assert abs(torch.corrcoef(torch.stack([half.flatten() for half in halves]))[0, 1]) < 0.01


def test_fresh_keys_follow_the_global_seed_and_nothing_else_does():
    torch.manual_seed(0)
    first = fresh_keys(3)
    state = torch.get_rng_state()
    uniform(first, "x", (10,))
    normal(first, "x", (10,))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(0)
    assert torch.equal(first, fresh_keys(3))
    assert first.dtype == torch.int64


def test_seeded_draws_leave_the_global_generator_as_it_was():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with torch_seeded(5):
        inside = torch.rand(4)
    with pytest.raises(RuntimeError), torch_seeded(6):
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(inside, torch.rand(4, generator=torch.Generator().manual_seed(5)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_draws_the_same_numbers():
    keys = fresh_keys(5)
    assert torch.equal(uniform(keys, "x", (1000,)), uniform(keys.cuda(), "x", (1000,)).cpu())
    torch.testing.assert_close(normal(keys, "x", (999,)), normal(keys.cuda(), "x", (999,)).cpu())


def test_the_room_s_old_name_still_works():
    from freqmask import draws, rng

    assert draws.uniform is rng.uniform
    assert draws.sample_key is rng.sample_key


@pytest.mark.parametrize(
    "keys",
    [
        torch.tensor([7]),  # all images would be filtered alike
        torch.arange(8),  # those of a whole batch beside a last, smaller one
        torch.arange(4)[:, None],
        torch.arange(4, dtype=torch.int32),
        torch.rand(4),
        [0, 1, 2, 3],
    ],
)
@pytest.mark.parametrize("text", ["fixed(radius=3)", "lowpass(radius=3)"])
def test_keys_are_whole_numbers_of_64_bits_one_an_image(keys, text):
    with pytest.raises(
        UserError, match=r"keys .* must be a tensor of an int64 an image \(4\); leave them out"
    ):
        build_filter(text)(torch.rand(4, 3, 8, 8), keys)
