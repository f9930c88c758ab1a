"""An option's value is the same, or the same sentence, from the command line, from YAML and from Python."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import freqmask
from freqmask.cli import COMMANDS, load
from freqmask.commands.command import declared, given_values, read_words
from freqmask.errors import ALIASES, UserError
from freqmask.filters import FILTERS
from freqmask.methods import METHODS
from freqmask.options import Auto, Option, Range, options_of
from freqmask.options.of_methods import MFMOptions

KNOWN = declared(freqmask.pretrain)


def outcome(named: dict[str, Any]) -> Any:
    """What is given, or the sentence."""
    try:
        return given_values(named, KNOWN)
    except UserError as error:
        return str(error)


def ways(name: str, text: str, folder: Path) -> list[Any]:
    """The same option typed, in a file, and as a text in Python."""
    (folder / "c.yaml").write_text(f"{name}: {text}\n", encoding="utf-8")
    from_file = outcome({"config": folder / "c.yaml"})
    return [outcome(read_words(KNOWN, [f"--{name}={text}"])), from_file, outcome({name: text})]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("lr", "1e-3", 0.001),
        ("lr", "1.0e-3", 0.001),
        ("lr", ".5", 0.5),
        ("lr", "auto", "auto"),
        ("epochs", "1e3", 1000.0),
        ("steps", "1e3", 1000),
        ("steps", "1_000", 1000),
        ("steps", "010", 10),  # YAML 1.1 says 8, a person 10
        ("seed", "9223372036854775807", 2**63 - 1),
        ("out", "2024-01-01", "2024-01-01"),
        ("out", "001", "001"),
        ("out", "1.10", "1.10"),
        ("out", "no", "no"),
        ("out", "null", None),
        ("clip_grad", "null", None),
        ("clip_grad", "None", None),
        ("flip", "false", False),
        ("flip", "off", False),
        ("flip", "Yes", True),
        ("image_size", "96", 96),
        ("image_size", "96x160", "96x160"),
        ("crop_scale", "[0.2, 1]", [0.2, 1.0]),
        (
            "model_args",
            "{depth: 4, rate: 1e-3, day: 2024-01-01}",
            {"depth": 4, "rate": 1e-3, "day": "2024-01-01"},
        ),
        ("data", "plain", ["plain"]),
        ("probe_data", "[a, 1]", ["a", "1"]),
    ],
)
def test_a_value_is_the_same_however_it_is_given(name: str, text: str, value: Any, tmp_path: Path) -> None:
    assert ways(name, text, tmp_path) == [{name: value}] * 3
    assert type(ways(name, text, tmp_path)[0][name]) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("lr", "fast", "lr (fast) must be a number above 0, or auto"),
        ("lr", "nan", "lr (nan) must be a number above 0, or auto"),
        ("lr", ".nan", "lr (.nan) must be a number above 0, or auto"),
        ("lr", "inf", "lr (inf) must be a number above 0, or auto"),
        ("lr", ".inf", "lr (.inf) must be a number above 0, or auto"),
        ("lr", "1e999", "lr (1e999) must be a number above 0, or auto"),
        ("epochs", "1:30", "epochs (1:30) must be a number above 0"),
        ("seed", "null", "seed (null) must be a whole number from 0 to below 2^63"),
        ("seed", "-1", "seed (-1) must be a whole number from 0 to below 2^63"),
        ("seed", "1.5", "seed (1.5) must be a whole number from 0 to below 2^63"),
        (
            "seed",
            "9223372036854775808",
            "seed (9223372036854775808) must be a whole number from 0 to below 2^63",
        ),
        ("seed", "true", "seed (true) must be a whole number from 0 to below 2^63"),
        ("flip", "maybe", "flip (maybe) must be true or false"),
        ("flip", "1", "flip (1) must be true or false"),
        ("crop", "round", "crop (round) must be one of 'resized', 'native', 'whole', 'center'"),
        (
            "crop_scale",
            "[0.2, big]",
            "crop_scale ([0.2, big]) must be auto, or 2 numbers above 0 and at most 1",
        ),
        ("model_args", "7", "model_args (7) must be a mapping such as '{depth: 4}'"),
        ("clip_grad", "much", "clip_grad (much) must be a number above 0, or null"),
    ],
)
def test_a_mistake_is_the_same_sentence_however_it_is_made(
    name: str, text: str, sentence: str, tmp_path: Path
) -> None:
    typed, from_file, from_python = ways(name, text, tmp_path)
    assert (typed, from_python) == (sentence, sentence)
    assert from_file.replace("0.2 big", "[0.2, big]") == sentence


@pytest.mark.parametrize("given", ["", " "])
@pytest.mark.parametrize("name", [name for name in KNOWN if name != "config"])
def test_an_empty_text_is_a_mistake_of_a_script_and_no_way_to_say_none(
    name: str, given: str, tmp_path: Path
) -> None:
    sentence = f"{name} ({given!r}) must be {KNOWN[name].rule()}; leave it out for its default"
    (tmp_path / "c.yaml").write_text(f"{name}: {given!r}\n")
    words = [f"--{name}={given}"] if name != "data" else [given]
    assert outcome(read_words(KNOWN, words)) == sentence
    assert outcome({"config": tmp_path / "c.yaml"}) == outcome({name: given}) == sentence


def test_what_a_file_leaves_empty_is_none(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("teacher:\nclip_grad:\nprobe_data:\nseed: 3\n")
    assert outcome({"config": tmp_path / "c.yaml"}) == {
        "teacher": None,
        "clip_grad": None,
        "probe_data": None,
        "seed": 3,
    }


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("lr", np.float32(0.5), 0.5),
        ("lr", 1, 1),
        ("steps", np.int64(3), 3),
        ("steps", 3.0, 3),
        ("flip", np.bool_(False), False),
        ("out", Path("a") / "b", str(Path("a") / "b")),
        ("crop_scale", (0.5, 1), [0.5, 1.0]),
        ("crop_scale", np.array([0.5, 1]), [0.5, 1.0]),
        ("value_range", (0, 4095), "0,4095"),
        ("value_range", [-0.5, np.float32(1.5)], "-0.5,1.5"),
    ],
)
def test_values_of_python_are_read_as_what_they_mean(name: str, value: Any, read: Any) -> None:
    found = outcome({name: value})
    assert found == {name: read}
    assert type(found[name]) is type(read)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", True),
        ("lr", float("nan")),
        ("flip", 1),
        ("out", True),
        ("out", date(2024, 1, 1)),
        ("seed", None),
        ("value_range", (0, 1, 2)),
        ("value_range", (0, "end")),
    ],
)
def test_values_of_python_that_cannot_be_are_sentences(name: str, value: Any) -> None:
    assert str(outcome({name: value})).startswith(f"{name} (")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (torch.zeros(2, 2), "tensor([[0., 0.], [0., 0.]])"),
        (np.zeros((2, 2)), "[[0. 0.] [0. 0.]]"),
        (np.zeros((9, 99)), "[[0. 0. 0. 0. 0. 0. 0. 0. 0. 0. 0. 0. 0. 0. 0. 0. 0. 0. 0..."),
        (torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ReLU()), "Sequential( (0): ReLU() (1): ReLU() )"),
    ],
)
def test_what_is_many_lines_as_a_text_is_shown_in_one(value: Any, shown: str) -> None:
    assert str(outcome({"steps": value})).startswith(f"steps ({shown}) must be")


def test_objects_pass_where_an_option_takes_them() -> None:
    source, method = object(), type("Mine", (), {})
    assert outcome({"data": [source], "method": method}) == {"data": [source], "method": method}


def test_a_quoted_boolean_mirrors_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("flip: 'false'\n")
    assert outcome({"config": str(tmp_path / "c.yaml")}) == {"flip": False}


def test_all_problems_come_in_one_message() -> None:
    told = outcome({"lr": "nan", "steps": "abc", "seed": 3})
    assert all(word in told for word in ("lr (nan)", "steps (abc)"))


def test_a_mapping_whose_space_was_forgotten_is_not_one_of_nothing(tmp_path: Path) -> None:
    """YAML reads ``{depth:4}`` as a name and no value, and timm leaves out what is None: all 12 blocks were trained."""
    assert yaml.safe_load("{depth:4, width: 3}") == {"depth:4": None, "width": 3}
    for sentence in ways("model_args", "{depth:4, width: 3}", tmp_path):
        assert sentence.startswith("model_args (") and "must be a mapping such as '{depth: 4}'" in sentence
    assert ways("model_args", "{act_layer: null}", tmp_path) == [{"model_args": {"act_layer": None}}] * 3


def test_an_unknown_option_of_the_twin_is_a_type_error_and_a_sentence() -> None:
    with pytest.raises(TypeError, match=r"option \(--stepz\) is unknown; did you mean 'steps'\?") as caught:
        freqmask.pretrain("x", stepz=3)  # type: ignore[call-arg]
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    ("typed", "name"), [("lerning_rate", "lr"), ("img_siz", "image_size"), ("archs", "backbone")]
)
def test_what_other_software_calls_an_option_counts_as_spelled_like_it(
    typed: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(f"{typed}: 1\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_words(KNOWN, [f"--{typed}=1"])
    for sentence in (outcome({"config": tmp_path / "c.yaml"}), outcome({typed: 1}), str(caught.value)):
        assert sentence.endswith(f"; did you mean {name!r}?")


def test_every_name_that_others_have_another_word_for_is_one_of_ours() -> None:
    parts = {name: parts for name, command in COMMANDS.items() if (parts := command.parts)}
    options = {
        option
        for name in COMMANDS
        for part in parts.get(name, [None])
        for option in declared(load(name, part))
    }
    protocols = {part for names in parts.values() for part in names}
    assert set(ALIASES) <= {*options, *COMMANDS, *protocols, *METHODS, *FILTERS}


def test_an_option_replaces_its_rivals_in_a_file_and_only_there(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("steps: 100\nlr: 0.5\n")
    assert outcome({"config": tmp_path / "c.yaml", "hours": "0.1"}) == {"lr": 0.5, "hours": 0.1}
    assert outcome({"config": tmp_path / "c.yaml", "hours": None}) == {"lr": 0.5, "steps": 100, "hours": None}
    assert outcome({"steps": 1, "hours": 1}) == "--hours and --steps exclude each other; give one of them"


def test_a_config_may_stand_on_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("config: mfm-32\nlr: 1e-3\nsteps: 5\n")
    (tmp_path / "top.yaml").write_text("config: base.yaml\nepochs: 2\n")
    found = outcome({"config": tmp_path / "top.yaml"})
    assert (found["lr"], found["epochs"], found["image_size"]) == (0.001, 2.0, 32)
    assert "steps" not in found
    (tmp_path / "base.yaml").write_text("config: top.yaml\n")
    assert "leads back to itself" in outcome({"config": tmp_path / "top.yaml"})


def test_several_configs_stand_on_each_other_in_their_order(tmp_path: Path) -> None:
    for name, rate in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.yaml").write_text(f"lr: {rate}\n{(name == 'a' and 'steps: 3') or ''}\n")
    words = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    assert outcome(read_words(KNOWN, words)) == {"lr": 2.0, "steps": 3}


@pytest.mark.parametrize("text", ["- a\n", "a", "lr: [", "\xff"])
def test_a_file_that_holds_no_options_is_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(text.encode("latin-1"))
    assert str(outcome({"config": tmp_path / "c.yaml"})).startswith("config (")


def test_every_default_is_a_value_of_its_option() -> None:
    for name, option in KNOWN.items():
        assert option.read(option.default) == option.default, name
    assert yaml.safe_dump({name: option.default for name, option in KNOWN.items()})


def test_a_range_is_kept_by_every_number_of_a_list() -> None:
    share = Option("share", list[float] | Auto, "auto", range=Range(least=0, most=1, length=2))
    assert share.read("[0, 1]") == [0.0, 1.0]
    for wrong in ([0.5], [0.5, 2], ["a", "b"]):
        with pytest.raises(UserError, match=r"share .* must be auto, or 2 numbers from 0 to 1"):
            share.read(wrong)


def test_the_numbers_that_a_sentence_proposes_are_taken() -> None:
    """Whole numbers (``--severities 6``) were said to be "numbers such as 0.5 1", of which the first is refused."""
    commands = [
        getattr(freqmask.evaluate, name) for name in ("knn", "fewshot", "bands", "segment", "robustness")
    ]
    options = [one for command in (*commands, freqmask.embed) for one in declared(command).values()]
    proposed = [one for one in options if "numbers such as" in one.rule()]
    assert {one.name for one in proposed} >= {"seeds", "severities", "k", "radii", "blocks", "ignore_label"}
    for one in proposed:
        example = re.search(r"such as ([\d.]+ [\d.]+)", one.rule())
        assert example and one.read(example[1].split()), one.rule()


def test_yaml_that_is_none_is_a_sentence_and_a_name_in_brackets_a_text():
    known = options_of(MFMOptions)
    with pytest.raises(UserError, match=r"model_args \({depth: 4\) must be a mapping such as '{depth: 4}'"):
        known["model_args"].read("{depth: 4")
    assert Option("data", list[str]).read("[2020] photos") == ["[2020] photos"]
    assert Option("data", list[str]).read("[a, b]") == ["a", "b"]
