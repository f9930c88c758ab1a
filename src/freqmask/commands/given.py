"""Which options were given, as against left at their defaults: a restart and a config file need to know."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from freqmask.errors import UserError, nearest

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
_given: ContextVar[dict[str, Any]] = ContextVar("given", default={})  # noqa: B039 - never changed in place


def given_options() -> dict[str, Any]:
    """The options that the running command was called with, those of its config file among them."""
    return dict(_given.get())


def remember_given(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Note which options a command is called with, and let its ``config`` fill those that it is not.

    Args:
        command: a function with keyword options, one of them ``config``.

    Returns:
        The same function; inside it :func:`given_options` tells.
    """
    signature = inspect.signature(command)

    @functools.wraps(command)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        given = dict(signature.bind(*args, **kwargs).arguments)
        config = given.pop("config", None)
        if config is not None:
            given = {**_read_config(config, list(signature.parameters)), **given}
        token = _given.set(given)
        try:
            return command(**given)  # type: ignore[call-arg]
        finally:
            _given.reset(token)

    return call


def _read_config(config: str | Path, known: list[str]) -> dict[str, Any]:
    from freqmask.training.runs import read_yaml

    options = read_yaml(config_path(config))
    for name in options:
        if name not in known:
            raise UserError(f"config ({config}) has an unknown option {name!r}; {nearest(str(name), known)}")
    return options


def config_path(config: str | Path) -> Path:
    """A config file's path; the bare name of a shipped recipe stands for its file.

    Raises:
        UserError: neither a file nor a recipe.
    """
    from freqmask.recipes import read_recipe, recipe_names

    if Path(config).is_file():
        return Path(config)
    if str(config) in recipe_names():
        return read_recipe(str(config)).path
    hint = nearest(str(config), recipe_names())
    raise UserError(f"config ({config}) is neither a file nor a shipped recipe; {hint}")
