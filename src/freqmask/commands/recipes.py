"""``freqmask recipes``: lists, shows and copies the shipped recipes."""

from __future__ import annotations

import textwrap
from pathlib import Path

from freqmask.commands.given import command
from freqmask.console import say
from freqmask.errors import UserError
from freqmask.recipes import Recipe, read_recipe, recipe_names
from freqmask.training.files import writing


@command()
def recipes(name: str | None = None, *, copy: str | None = None) -> list[str] | str | Path:
    """Lists the shipped recipes, shows one, or copies one for you to change.

    A recipe is a YAML file of options of ``pretrain``: the published rows of both papers and small ones
    for 32-, 64- and 128-pixel images. Its first line says what it costs and whether we ran it ourselves.
    Run one with ``freqmask pretrain DATA --config NAME``.

    Args:
        name: the recipe to show; without a name all are listed.
        copy: where the recipe is copied to: a file that does not exist yet, or a folder.

    Returns:
        The names, or the text of the recipe shown, or the path of the copy.

    Raises:
        UserError: no recipe of that name, ``copy`` without a name, or the file exists already.
    """
    if name is None:
        if copy is not None:
            raise UserError(f"--copy ({copy}) needs the name of a recipe; `freqmask recipes` lists them")
        return _list()
    recipe = read_recipe(name)
    if copy is not None:
        return _copy(recipe, Path(copy))
    say(recipe.text.rstrip())
    return recipe.text


def _list() -> list[str]:
    shipped = [read_recipe(name) for name in recipe_names()]
    width = max(len(recipe.name) for recipe in shipped)
    for recipe in shipped:
        say(f"{recipe.name:{width}}  {recipe.state}")
        say(textwrap.indent(textwrap.fill(recipe.cost, 98 - width), " " * (width + 2)))
    say("\nfreqmask recipes NAME shows one; freqmask recipes NAME --copy FILE copies it;")
    say("freqmask pretrain DATA --config NAME (or FILE) runs it.")
    return [recipe.name for recipe in shipped]


def _copy(recipe: Recipe, target: Path) -> Path:
    """Writes the copy, never over a file that is there: it may hold somebody's changes."""
    if target.is_dir():
        target = target / recipe.path.name
    if target.exists():
        raise UserError(f"--copy ({target}) exists already; name another file")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(recipe.text)
    say(f"{target} holds the recipe; run it with: freqmask pretrain DATA --config {target}")
    return target
