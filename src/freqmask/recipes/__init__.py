"""The shipped recipes: YAML files in this folder whose keys are options of ``pretrain``.

The first line of each is a comment that says what it costs and whether we ran it: ``# COST; STATE``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freqmask.errors import UserError, nearest

FOLDER = Path(__file__).parent
STATES = ("measured", "never run to the end by us")


@dataclass(frozen=True)
class Recipe:
    """A recipe as it lies in its file."""

    name: str  # the file's, without its suffix
    path: Path  # ``--config`` takes it
    text: str  # the whole file
    cost: str  # what it takes, in words
    state: str  # one of ``STATES``

    def options(self) -> dict[str, Any]:
        """The options of ``pretrain`` that the recipe sets."""
        import yaml  # here, because listing the recipes needs no parser

        return dict(yaml.safe_load(self.text))


def recipe_names() -> list[str]:
    """The names of all shipped recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_recipe(name: str) -> Recipe:
    """Reads a shipped recipe by its name, with or without ``.yaml``.

    Raises:
        UserError: there is no recipe of that name.
    """
    stem = name.removesuffix(".yaml")
    if stem not in recipe_names():
        raise UserError(f"recipe ({name}) must be a shipped one; {nearest(stem, recipe_names())}")
    path = FOLDER / f"{stem}.yaml"
    text = path.read_text(encoding="utf-8")
    cost, _, state = text.partition("\n")[0].lstrip("# ").rpartition(";")
    return Recipe(stem, path, text, cost.strip(), state.strip())
