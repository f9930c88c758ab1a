"""Options that cannot be, before any work."""

import inspect
from typing import Any

import pytest

import freqmask
from freqmask.errors import UserError
from freqmask.methods import METHODS
from freqmask.pretraining.settings import (
    METHOD_OPTIONS,
    RENAMED,
    accepted_by,
    check_options,
    parse_image_size,
)


def options(**changes: Any) -> dict[str, Any]:
    parameters = inspect.signature(freqmask.pretrain).parameters
    assert set(changes) <= set(parameters)
    return {name: p.default for name, p in parameters.items()} | changes


def test_the_defaults_are_fine() -> None:
    for method in METHODS:
        check_options(options(method=method))


def test_every_method_option_is_an_option_of_pretrain_and_used_by_some_method() -> None:
    parameters = set(inspect.signature(freqmask.pretrain).parameters)
    used = set().union(*(accepted_by(method) for method in METHODS))
    for name in METHOD_OPTIONS:
        assert name in parameters, name
        assert RENAMED.get(name, name) in used, name


def test_every_option_of_a_method_can_be_given() -> None:
    from freqmask.pretraining.settings import FROM_THE_DATA

    reachable = {RENAMED.get(name, name) for name in METHOD_OPTIONS} | FROM_THE_DATA
    for method in METHODS:
        assert accepted_by(method) <= reachable, accepted_by(method) - reachable


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "fokl"}, "did you mean 'folk'"),
        ({"epochs": 3, "steps": 5}, "exclude each other"),
        ({"steps": 0}, r"steps \(0\) must be above 0"),
        ({"batch_size": -4}, r"batch_size \(-4\) must be above 0; try auto"),
        ({"lr": "fast"}, r"lr \(fast\) must be a number; try auto"),
        ({"max_skipped_share": 1.5}, "max_skipped_share"),
        ({"clip_grad": 0.0}, "clip_grad"),
        ({"precision": "bf61"}, r"precision \(bf61\) is unknown"),
        ({"strategy": "dpd"}, "did you mean 'ddp'"),
        ({"devices": 0}, r"devices \(0\) must be 1 or more"),
        ({"crop_scale": [0.5]}, "crop_scale .* two numbers"),
        ({"colour_jitter": [0.4]}, "five numbers"),
        ({"method": "mfm", "outputs": 128}, "--outputs is not used by method mfm; it belongs to folk"),
        ({"method": "sr", "radius": 8}, "--radius is not used by method sr"),
        (
            {"method": "mfm", "filter": "com", "radius": 8},
            "--radius is not used by filter com; it belongs to --filter fixed",
        ),
        ({"method": "mfm", "com_fractions": [0.1]}, "--com_fractions is not used by filter fixed"),
        ({"method": "folk", "radius": 8}, "--radius is not used by filter com"),
    ],
)
def test_what_cannot_be_is_named_with_the_way_out(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_options(options(**changes))


def test_all_problems_come_in_one_message() -> None:
    with pytest.raises(UserError) as caught:
        check_options(options(steps=-1, lr=-1, method="folk", radius=3))
    assert all(word in str(caught.value) for word in ("steps (-1)", "lr (-1)", "--radius"))


@pytest.mark.parametrize(("text", "size"), [(224, 224), ("64", 64), ("96x160", (96, 160))])
def test_image_sizes_are_sides_or_height_by_width(text: int | str, size: object) -> None:
    assert parse_image_size(text) == size


@pytest.mark.parametrize("text", ["big", "1x2x3", "64x"])
def test_other_image_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="image_size"):
        parse_image_size(text)
