"""Declaring options, in a dataclass or a function's signature, and reading sets of them.

A group of options is a dataclass: a line an option, with default, help and range. What the command line, YAML, the
twin in Python, the recorded config and the report say of it follows from that line.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, TypeVar

from freqmask.console import shell_word
from freqmask.errors import CallError, UserError, nearest
from freqmask.options.option import Option, Range, as_typed, parse_yaml

Group = TypeVar("Group")
_MORE = ("rivals", "filter", "epochs")  # of an option's metadata, beside help and range


class Rivals(str):
    """Names a group of options that exclude each other: ``Annotated[int | None, Rivals("length")]``."""


def option(default: Any, help: str, **more: Any) -> Any:
    """One line of a group of options; its name and type stand before it, as for any field of a dataclass.

    Args:
        default: what a newcomer can live with.
        help: what it does, in a few words; the unit, and what ``auto`` is.
        **more: ``least``, ``above``, ``most``, ``below`` and ``length`` as in :class:`Range`; ``rivals``,
            ``filter`` and ``epochs`` as in :class:`Option`.
    """
    kept = {name: more.pop(name) for name in _MORE if name in more}
    return dataclasses.field(default=default, metadata={"help": help, "range": Range(**more), **kept})


def options_of(declaration: Callable[..., Any]) -> dict[str, Option]:
    """Name to option of a dataclass of :func:`option` fields, or of a callable by its signature and ``Args:``."""
    if dataclasses.is_dataclass(declaration):
        return _options_of_group(declaration)
    signed = vars(declaration).get("__init__", declaration) if isinstance(declaration, type) else declaration
    hints = typing.get_type_hints(signed, include_extras=True)
    _, _, tail = (inspect.getdoc(declaration) or "").partition("Args:\n")
    section = re.split(r"^\S", tail, maxsplit=1, flags=re.MULTILINE)[0]
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section, re.MULTILINE | re.DOTALL)
    helps = {name: " ".join(text.split()) for name, text in entries}
    options = {}
    for name, parameter in inspect.signature(declaration).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            hint = hints.get(name, type(parameter.default) if parameter.default is not None else Any)
            kind, more = _taken_apart(hint)
            positional = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            options[name] = Option(
                name, kind, parameter.default, helps.get(name, ""), positional=positional, **more
            )
    return options


def _options_of_group(group: Any) -> dict[str, Option]:
    hints = typing.get_type_hints(group, include_extras=True)
    options = {}
    for field in dataclasses.fields(group):
        kind, more = _taken_apart(hints[field.name])
        more |= {name: value for name, value in field.metadata.items() if name != "range" or str(value)}
        home = next(
            cls for cls in reversed(group.__mro__) if field.name in vars(cls).get("__annotations__", {})
        )
        title = (home.__doc__ or "").partition("\n")[0].rstrip(".")
        options[field.name] = Option(field.name, kind, field.default, group=title, **more)
    return options


def _taken_apart(hint: Any) -> tuple[Any, dict[str, Any]]:
    """``Annotated[kind, Range(...), Rivals(...)]`` as a type and what else an option holds."""
    if typing.get_origin(hint) is not Annotated:
        return hint, {}
    kind, *extras = typing.get_args(hint)
    names = {Range: "range", Rivals: "rivals"}
    return kind, {names[type(extra)]: extra for extra in extras if type(extra) in names}


def read_group(group: type[Group], values: Mapping[str, Any]) -> Group:
    """A group of options with values by name, its defaults for those that are not given.

    Raises:
        UserError: a name is unknown, or a value is none of its option; all in one message.
    """
    return group(**read_options(values, options_of(group)))


def signature(function: Callable[..., Any], options: Iterable[Option]) -> inspect.Signature:
    """A function's signature whose ``**options`` are spelled out, for ``help()`` and editors."""
    own = inspect.signature(function).parameters
    kept = [parameter for parameter in own.values() if parameter.kind is not parameter.VAR_KEYWORD]
    more = (
        inspect.Parameter(
            option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=option.kind
        )
        for option in options
        if option.name not in own
    )
    return inspect.Signature([*kept, *more])


def read_options(values: Mapping[str, Any], known: Mapping[str, Option]) -> dict[str, Any]:
    """Values, or texts, by the declaration of their options.

    Raises:
        UserError: a name is unknown or a value is none of its option; all problems in one message.
    """
    unknown = [name for name in values if name not in known]
    if unknown:
        sentences = (f"option (--{name}) is unknown; {nearest(str(name), known)}" for name in unknown)
        raise CallError("; ".join(sentences))
    problems, read = [], {}
    for name, value in values.items():
        try:
            read[name] = known[name].read(value)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    return read


def overridden(
    below: Mapping[str, Any], above: Mapping[str, Any], known: Mapping[str, Option]
) -> dict[str, Any]:
    """Options of a file with those that were typed: these replace the same names, and their rivals.

    Args:
        below: name to value of the file.
        above: name to value as typed; ``NAME.KEY`` sets one key of a mapping.
        known: all options.
    """
    typed = {name for name, value in above.items() if name in known and value is not None}
    groups = {known[name].rivals for name in typed} - {None}
    gone = {name for name, option in known.items() if option.rivals in groups}
    merged = {name: value for name, value in below.items() if name not in gone}
    for name, value in above.items():
        whole, dot, key = name.partition(".")
        if dot and whole in known:
            merged[whole] = {**parse_yaml(merged.get(whole) or {}), key: parse_yaml(value)}
        else:
            merged[name] = value
    return merged


def exclusions(values: Mapping[str, Any], known: Mapping[str, Option]) -> Iterator[str]:
    """A sentence for each pair of options that were both given and exclude each other."""
    groups: dict[str, list[str]] = {}
    for name, option in known.items():
        if option.rivals and values.get(name) is not None:
            groups.setdefault(option.rivals, []).append(name)
    for names in groups.values():
        if len(names) > 1:
            yield f"--{' and --'.join(names)} exclude each other; give one of them"


def command_words(values: Mapping[str, Any], first: str) -> str:
    """Options as they would be typed; what was made in Python is its name in capitals.

    Args:
        values: name to value.
        first: the argument that takes no option name.

    >>> command_words({"lr": 0.5, "data": ["my photos"], "model_args": {"depth": 4}}, first="data")
    "'my photos' --lr 0.5 --model_args '{depth: 4}'"
    """
    words = _value_words(first, values.get(first) or [])
    for name, value in values.items():
        if name != first:
            words += [f"--{name}", *_value_words(name, value)]
    return " ".join(words)


def _value_words(name: str, value: Any) -> list[str]:
    if isinstance(value, Mapping):
        import yaml

        return [shell_word(yaml.safe_dump(dict(value), default_flow_style=True, width=10_000).strip())]
    if isinstance(value, (list, tuple)):
        return [word for item in value for word in _value_words(name, item)]
    if value is not None and not isinstance(value, (str, os.PathLike, int, float)):
        return [name.upper()]
    return [shell_word(as_typed(value))]
