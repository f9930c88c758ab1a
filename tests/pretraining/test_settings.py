"""Options that cannot be, before any work."""

from typing import Any

import pytest

import freqmask
from freqmask.commands.command import declared, given_values
from freqmask.errors import UserError
from freqmask.methods import METHODS
from freqmask.options.of_methods import method_settings, options_of_class
from freqmask.pretraining.resolve import (
    check_options,
    choose_method,
    method_defaults,
    parse_image_size,
)

KNOWN = declared(freqmask.pretrain)


def check(**changes: Any) -> None:
    check_options({name: option.default for name, option in KNOWN.items()} | given_values(changes, KNOWN))


def test_the_defaults_are_fine() -> None:
    for method in METHODS:
        check(method=method)


def test_what_a_method_has_beside_the_options_given_is_recorded_as_the_filter_uses_it() -> None:
    options = {"method": "mfm", "filter": None, "radius": "auto", "softness": 1.0, "mean": "auto"}
    settings = {
        "filter": "fixed",
        "radius": 4.6,
        "softness": 1.0,
        "com_share": 0.5,
        "focal": None,
        "mean": [0.5],
    }
    assert method_defaults(options, settings) == {"filter": "fixed", "radius": 4.6, "mean": [0.5]}
    assert method_defaults({"method": "folk"}, {"com_share": 0.5}) == {
        "com_share": 0.5,
        "freeze_last_layer_epochs": 1.0,
    }


def test_a_method_counts_in_steps_and_a_person_in_epochs() -> None:
    folk, mfm = (options_of_class(METHODS[name]) for name in ("folk", "mfm"))
    options = {"freeze_last_layer_epochs": 2.0, "outputs": 64, "lr": 0.1}
    assert method_settings(folk, options, 50.5) == {"outputs": 64, "freeze_last_layer_steps": 101}
    assert method_settings(folk, options) == {"outputs": 64}
    assert method_settings(folk, {}, 50.0) == {"freeze_last_layer_steps": 50}
    assert method_settings(mfm, {}, 50.0) == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "fokl"}, "did you mean 'folk'"),
        ({"epochs": 3, "steps": 5}, "exclude each other"),
        ({"steps": 0}, r"steps \(0\) must be a whole number at least 1"),
        ({"batch_size": -4}, r"batch_size \(-4\) must be a whole number at least 1, or auto"),
        ({"lr": "fast"}, r"lr \(fast\) must be a number above 0, or auto"),
        ({"max_skipped_share": 1.5}, r"max_skipped_share \(1.5\) must be a number from 0 to 1"),
        ({"clip_grad": 0.0}, r"clip_grad \(0.0\) must be a number above 0, or null"),
        ({"precision": "bf61"}, r"precision \(bf61\) must be one of 'auto', '32-true'"),
        (
            {"method": "folk", "precision": "bf16-true"},
            r"precision \(bf16-true\) would lose .* try --precision bf16-mixed",
        ),
        ({"strategy": "dpd"}, "did you mean 'ddp'"),
        ({"devices": 0}, r"devices \(0\) must be a whole number at least 1, or auto"),
        ({"crop_scale": [0.5]}, r"crop_scale \(0.5\) must be auto, or 2 numbers above 0 and at most 1"),
        ({"colour_jitter": [0.4]}, "5 numbers"),
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
        check(**changes)


def test_an_option_of_a_filter_belongs_to_methods_that_use_it_otherwise() -> None:
    check(method="words", radius=8)


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({}, "words"),
        ({"word_grid": 4, "lr": 0.1}, "words"),
        ({"token_share": 0.25}, "words"),
        ({"teacher": "timm:resnet18"}, "distill"),
        ({"teacher": "timm:resnet18", "token_share": 0.25}, "distill"),
        ({"gamma": 1.5}, "mfm"),
        ({"filter": "com"}, "mfm"),
        ({"radius": 8}, "mfm"),
        ({"gamma": 1.5, "outputs": 128}, "folk"),
        ({"factor": 4}, "sr"),
    ],
)
def test_who_names_no_method_gets_words_or_the_method_of_the_options(
    changes: dict[str, Any], method: str
) -> None:
    options = {name: option.default for name, option in KNOWN.items()} | given_values(changes, KNOWN)
    assert options["method"] == "auto" and choose_method(options).value == method
    check(**changes)


def test_options_of_no_one_method_are_refused() -> None:
    with pytest.raises(UserError, match="--words is not used by method mfm"):
        check(gamma=1.5, words=9)


def test_all_problems_come_in_one_message() -> None:
    with pytest.raises(UserError) as caught:
        check(steps=-1, lr=-1)
    assert all(word in str(caught.value) for word in ("steps (-1)", "lr (-1)"))
    with pytest.raises(UserError) as caught:
        check(method="mfm", outputs=3, com_share=0.5)
    assert all(word in str(caught.value) for word in ("--outputs", "--com_share"))


@pytest.mark.parametrize(
    ("text", "size"), [(224, 224), ("64", 64), ("96x160", (96, 160)), ([96, 160], (96, 160))]
)
def test_image_sizes_are_sides_or_height_by_width(text: Any, size: object) -> None:
    assert parse_image_size(text) == size


@pytest.mark.parametrize("text", ["big", "1x2x3", "64x", 0, "64x0", -4])
def test_other_image_sizes_are_refused(text: Any) -> None:
    with pytest.raises(UserError, match="image_size"):
        parse_image_size(text)
