"""A command and its twin in Python are one function: words, YAML and Python's values come in by the same door."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from freqmask.errors import CallError, UserError, nearest
from freqmask.imports import import_uncollected, named_by_user
from freqmask.options import (
    REQUIRED,
    Option,
    exclusions,
    options_of,
    overridden,
    parse_yaml,
    read_options,
    signature,
)

Function = Callable[..., Any]
Result = TypeVar("Result")
Group = type | Mapping[str, Option]
OPTIONS = "options"  # in the config.yaml of an evaluation that trains
_running: ContextVar[tuple[dict[str, Any], dict[str, Any]]] = ContextVar("running")


def given_options() -> dict[str, Any]:
    """The options that the running command was called with, those of its config file among them."""
    return dict(_running.get()[0])


def running_options() -> dict[str, Any]:
    """All options of the running command, with defaults for those that were not given."""
    return dict(_running.get()[1])


def command(
    *groups: Group, imports: str = "", more: Callable[[Any], Mapping[str, Option]] | None = None
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Let a function take texts as well as values, and options from a YAML file where it has a ``config``.

    Inside the function :func:`given_options` and :func:`running_options` tell them.

    Args:
        *groups: options beside those of the function's signature, for its ``**options``: dataclasses, or options by
            name. The function is called with all of them.
        imports: the module that does the work, where that takes seconds to import.
        more: what ``method`` names -> options that it brings along.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Result:
            named = {**inspect.signature(function).bind_partial(*args).arguments, **kwargs}
            with named_by_user(named, named.get("config") or ""):
                known = known_options(call, named)
                given = given_values(named, known)
                for option in known.values():
                    if option.default is REQUIRED and option.name not in given:
                        raise CallError(f"{option.title} is missing: {re.split('[.;]', option.help)[0]}")
                every = {name: option.default for name, option in known.items() if name != "config"} | given
                token = _running.set((given, every))
                try:
                    if imports:
                        import_uncollected(imports)
                    return function(**every)
                finally:
                    _running.reset(token)

        call.groups, call.more, call.imports = groups, more, imports  # type: ignore[attr-defined]
        if groups:
            describe(call, function)
        return call

    return decorate


def describe(call: Function, function: Function) -> None:
    """Give a command the signature and the docstring that its groups make, for ``help()``."""
    grouped = [
        option
        for option in declared(call).values()
        if option.name not in inspect.signature(function).parameters
    ]
    call.__signature__ = signature(function, grouped)  # type: ignore[attr-defined]
    lines = "".join(f"    {option.name}: {option.help}.\n" for option in grouped)
    head, _, tail = (inspect.getdoc(function) or "").partition("\n\nReturns:")
    call.__doc__ = f"{head}\n{lines.rstrip()}\n\nReturns:{tail}"


@functools.cache
def declared(command: Function) -> dict[str, Option]:
    """The options of a command by name: those of its signature, then those of its groups."""
    options = options_of(inspect.unwrap(command))
    for group in getattr(command, "groups", ()):
        for name, option in (group if isinstance(group, Mapping) else options_of(group)).items():
            own = options.setdefault(name, option)
            if not own.help:  # one that every command of a kind has, such as MODEL, is described once
                options[name] = replace(own, help=option.help)
    return options


def known_options(command: Function, named: Mapping[str, Any]) -> Mapping[str, Option]:
    """The options of a command, with those of a method of one's own that ``method`` or ``config`` names."""
    known = declared(command)
    more = getattr(command, "more", None)
    if more is None:
        return known
    method = named.get("method")
    if method is None and named.get("config") is not None:
        method = read_config(named["config"], None).get("method")
    return {**more(method), **known} if method is not None else known


def given_values(named: Mapping[str, Any], known: Mapping[str, Option]) -> dict[str, Any]:
    """What was given, each value by its option, those of ``config`` below those beside it.

    Raises:
        UserError: an option is unknown, is none of its kind, or excludes another.
    """
    below = {}
    if "config" in known and named.get("config") is not None:
        below = read_config(named["config"], known)
    typed = overridden(below, {name: value for name, value in named.items() if name != "config"}, known)
    given = read_options(typed, known)
    excluding = "; ".join(exclusions(given, known))
    if excluding:
        raise UserError(excluding)
    return given


def read_config(
    config: Any, known: Mapping[str, Option] | None, below: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """The options of a YAML file as texts, on top of those of the file that its own ``config`` names.

    Args:
        config: a path or the name of a recipe, or several: later ones go before earlier ones.
        known: the options that it may hold; None takes what comes.
        below: the files that led here.

    Raises:
        UserError: there is no such file, it is no YAML of options, or has one that is unknown.
    """
    if isinstance(config, (list, tuple)):
        several = (read_config(each, known, below) for each in config)
        return functools.reduce(lambda first, second: overridden(first, second, known or {}), several)
    path = config_path(config)
    if path.resolve() in below:
        raise UserError(f"config ({path}) leads back to itself; take one of the config: lines out")
    options, written_by = _read_texts(path)
    for name in options:
        if known is not None and name not in known:
            hint = f"it is of freqmask {written_by}" if written_by else nearest(str(name), known)
            raise UserError(f"config ({path}) has an unknown option {name!r}; {hint}")
    base = options.pop("config", None)
    if base in (None, "", "null"):
        return options
    beside = path.parent / str(base)
    inner = read_config(beside if beside.is_file() else base, known, (*below, path.resolve()))
    return overridden(inner, options, known or {})


def _read_texts(path: Path) -> tuple[dict[str, Any], str | None]:
    """The file's options, and the command that wrote them if it says so.

    Scalars stay texts, but within mappings, which no type describes, and where nothing is written.
    """
    from freqmask.training.run_folder import read_yaml

    whole = read_yaml(path)  # also its errors as sentences
    text = path.read_text(encoding="utf-8")
    texts, values = parse_yaml(text, texts=True), parse_yaml(text)
    if isinstance(whole.get(OPTIONS), dict):  # of an evaluation that trains: its numbers stand beside
        texts, values = texts[OPTIONS], values[OPTIONS]
    options = {
        name: values[name] if values[name] is None or isinstance(values[name], dict) else word
        for name, word in texts.items()
    }
    return options, whole.get("command")


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
