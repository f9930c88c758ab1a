"""The shipped recipes: every one a set of options of pretrain, with its cost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from freqmask.commands.command import declared, given_values, read_words
from freqmask.commands.pretrain import pretrain
from freqmask.commands.show import recipes
from freqmask.errors import UserError
from freqmask.pretraining.resolve import check_options
from freqmask.recipes import STATES, read_recipe, recipe_names

ROWS = {
    *(f"{task}-{model}" for task in ("mfm", "sr", "deblur", "denoise") for model in ("vit-base", "resnet50")),
    *(f"folk-vit-{width}-{epochs}" for width in ("small", "base") for epochs in (300, 800)),
    *(f"{method}-{size}" for method in ("mfm", "folk") for size in (32, 64, 128)),
    "mfm-vit-small",
    "mfm-com-vit-base",
}
ON_ONE_CORE = {  # of docs/results.md
    *(f"{method}-32-{size}" for method in ("mfm", "mfm-com", "folk") for size in ("small", "cnn")),
    "words-32-small",
    "distill-32-cnn",
}
FIRST_LOOK = "photos"  # what `freqmask pretrain` runs without any argument; it names its own data


def test_every_published_row_and_every_small_size_has_a_recipe() -> None:
    assert set(recipe_names()) == ROWS | ON_ONE_CORE | {FIRST_LOOK}


@pytest.mark.parametrize("name", sorted(ROWS | ON_ONE_CORE))
def test_a_recipe_holds_options_of_pretrain_alone(name: str) -> None:
    options = read_recipe(name).options()
    assert set(options) <= set(declared(pretrain))
    assert not {"data", "out", "config"} & set(options)
    numbers_as_text = [
        value for value in options.values() if isinstance(value, str) and re.match(r"[\d.]+e", value)
    ]
    assert numbers_as_text == []  # YAML reads 1e-3 as text, 1.0e-3 as a number


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_recipes_first_line_says_cost_and_state(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.text.startswith("# ")
    assert recipe.state in STATES
    assert "FLOP" in recipe.cost


@pytest.mark.parametrize("name", sorted(ON_ONE_CORE))
def test_a_recipe_for_one_core_was_run(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.state == "measured"
    assert "minutes on one core" in recipe.cost


@pytest.mark.parametrize("name", recipe_names())
def test_pretrain_takes_the_recipe_from_the_command_line(name: str) -> None:
    known = declared(pretrain)
    given = given_values(read_words(known, ["builtin:photos", "--config", name]), known)
    options = {key: value for key, value in read_recipe(name).options().items() if key != "data"}
    assert {key: given[key] for key in options} == options
    check_options({key: given.get(key, option.default) for key, option in known.items()})


@pytest.mark.parametrize(
    ("name", "share"), [("mfm-vit-base", 0.5), ("mfm-vit-small", 0.5), ("mfm-resnet50", 0.3)]
)
def test_the_published_recipe_is_the_papers(name: str, share: float) -> None:
    options = read_recipe(name).options()
    published = {
        "epochs": 300,
        "batch_size": 2048,
        "warmup_epochs": 20,
        "weight_decay": 0.05,
        "betas": [0.9, 0.95],
        "clip_grad": 3.0,
        "radius": 16,
        "low_pass_share": share,
        "crop_scale": [0.2, 1.0],
    }
    assert {key: options[key] for key in published} == published


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'mfm-vit-base'"):
        recipes("mfm-vit-bas")


def test_a_recipe_is_listed_shown_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(recipes()) == ROWS | ON_ONE_CORE | {FIRST_LOOK}
    assert recipes("mfm-32") == read_recipe("mfm-32").text
    copied = recipes("mfm-32", copy=str(tmp_path))
    assert copied == tmp_path / "mfm-32.yaml"
    assert copied.read_text() == read_recipe("mfm-32").text
    assert f"--config {copied}" in capsys.readouterr().out


def test_a_copy_never_replaces_a_file(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("lr: 1.0")
    with pytest.raises(UserError, match="exists already"):
        recipes("mfm-32", copy=str(mine))
    assert mine.read_text() == "lr: 1.0"


def test_a_copy_needs_a_name_and_a_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs the name"):
        recipes(copy=str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        recipes("mfm-32", copy=str(tmp_path / "file" / "mfm.yaml"))
