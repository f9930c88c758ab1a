"""From words on a command line to a call of the command's function; its help, and what completes a word."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from freqmask.commands.given import declared, given_values, known_options
from freqmask.console import say
from freqmask.errors import UserError, nearest
from freqmask.imports import named_by_user
from freqmask.options import REQUIRED, Option, as_typed

_HELP = ("-h", "--help")
_BOOLEANS = ("true", "false", "yes", "no", "on", "off", "null")
FIRST_GROUP = "Options"  # the heading of those that stand in a command's signature
_INDENT, _WIDTH = 28, 100  # of the help


def call(program: str, function: Callable[..., Any], words: Sequence[str]) -> Any:
    """Read the words that were typed after a command's name, by its function's declaration, and call it.

    Raises:
        UserError: an unknown option or a value of the wrong kind.
    """
    with named_by_user(words, " ".join(_peeked(words).get("config", []))):
        return _call(program, function, words)


def _call(program: str, function: Callable[..., Any], words: Sequence[str]) -> Any:
    if any(word in _HELP for word in words):
        say(help_text(program, function, _peeked(words)))
        return None
    import yaml

    known = known_options(function, _peeked(words))
    given = read_words(known, words)
    if given.pop("print_config", None) is not None:
        every = {option.name: option.default for option in known.values()} | given_values(given, known)
        shown = {name: every[name] for name in known if name != "config" and every[name] is not REQUIRED}
        say(yaml.safe_dump(shown, sort_keys=False))
        return None
    return function(**given)


def _peeked(words: Sequence[str]) -> dict[str, Any]:
    """What ``--method`` and ``--config`` say, which decides what other options there are."""
    peeked: dict[str, Any] = {}
    for word, after in itertools.zip_longest(words, words[1:]):
        name, equals, text = word.partition("=")
        value = text if equals else after
        if name == "--method":
            peeked["method"] = value
        elif name == "--config" and value is not None:
            peeked["config"] = [*peeked.get("config", []), value]
    return peeked


def read_words(known: Mapping[str, Option], words: Sequence[str]) -> dict[str, Any]:
    """Name to text, or to several texts; what they mean is the options' to say.

    Raises:
        UserError: an option is unknown or lacks its value, or a word is more than the command takes.
    """
    given: dict[str, Any] = {}
    loose: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            loose, rest = loose + rest, []
        elif not word.startswith("--"):
            loose.append(word)
        else:
            name, equals, text = word[2:].partition("=")
            name = name.replace("-", "_")
            option = _known(name, known)
            value = text if equals else _values(name, option, rest)
            given[name] = [*given.get(name, []), value] if name == "config" else value
    for option in known.values():
        if option.positional and loose:
            given[option.name], loose = (loose, []) if option.many else (loose[0], loose[1:])
    if loose:
        raise UserError(f"{loose[0]!r} is more than this command takes; options begin with --")
    return given


def _known(name: str, known: Mapping[str, Option]) -> Option:
    base = name.split(".")[0]  # --model_args.depth 4 reaches into a mapping
    if base == "print_config" and "config" in known:
        return Option(base, bool)
    if base not in known:
        raise UserError(f"option (--{name}) is unknown; {nearest(name, sorted({*known, 'help'}))}")
    return known[base]


def _values(name: str, option: Option, rest: list[str]) -> str | list[str]:
    """Takes the value of an option, or its values, from the words after it."""
    if option.of_kind(bool) and (not rest or rest[0].lower() not in _BOOLEANS):
        return "true"
    taken: list[str] = []
    if option.many and rest and not rest[0].startswith("["):
        taken = list(itertools.takewhile(_is_number if option.of_kind(int, float) else _is_value, rest))
        del rest[: len(taken)]
    if taken:
        return taken
    if not rest or not _is_value(rest[0]):
        raise UserError(f"--{name} needs a value: {option.rule()}")
    return rest.pop(0)


def _is_value(word: str) -> bool:
    return not word.startswith("--")


def _is_number(word: str) -> bool:
    with contextlib.suppress(ValueError):
        float(word)
        return True
    return False


def help_text(program: str, function: Callable[..., Any], named: Mapping[str, Any] | None = None) -> str:
    """What ``--help`` prints: usage, what the command does, every option."""
    known = known_options(function, named or {})
    places = [option for option in known.values() if option.positional]
    options = [option for option in known.values() if not option.positional]
    usage = [program]
    for option in places:
        word = option.title + (" ..." if option.many else "")
        usage.append(word if option.default is REQUIRED else f"[{word}]")
    description = re.split(r"\n\n(?:Args|Returns|Raises):", inspect.getdoc(function) or "")[0]
    lines = [f"usage: {' '.join(usage)} [OPTIONS]", "", description, ""]
    for option in places:
        lines += _entry(option.title, option)
    for group in dict.fromkeys(option.group or FIRST_GROUP for option in options):
        lines += ["", f"{group}:"]
        for option in options:
            if (option.group or FIRST_GROUP) == group:
                lines += _entry(f"{option.title} {'|'.join(filter(None, map(_short, option.kinds)))}", option)
    lines += _entry("--help", Option("help", bool, None, "show this"))
    if "config" in known:
        lines += _entry("--print_config", Option("print_config", bool, None, "print the options and stop"))
    return "\n".join(lines)


def _entry(title: str, option: Option) -> list[str]:
    """An option's name, and beside or below it what it means."""
    plain = option.default
    shown = option.shown if plain is None else "required" if plain is REQUIRED else as_typed(plain)
    if shown and plain is not REQUIRED:
        shown = f"default: {shown}"
    text = option.help.rstrip(".") + (f" ({shown})" if shown else "")
    wrapped = textwrap.wrap(text, _WIDTH - _INDENT, break_on_hyphens=False)
    start = f"  {title}"
    if len(start) < _INDENT - 1 and wrapped:
        return [start.ljust(_INDENT) + wrapped[0], *(" " * _INDENT + line for line in wrapped[1:])]
    return [start, *(" " * _INDENT + line for line in wrapped)]


def _short(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "|".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is list:
        return f"{_short(typing.get_args(kind)[0]) or 'TEXT'} ..."
    names = {bool: "true|false", int: "N", float: "X", str: "TEXT", dict: "MAPPING"}
    return names.get(typing.get_origin(kind) or kind, "")


def completions(function: Callable[..., Any], words: Sequence[str]) -> list[str]:
    """What may stand where the last of the words after a command's name is typed: options, or one option's values."""
    known = declared(function)
    before = words[-2] if len(words) > 1 else ""
    option = known.get(before[2:].replace("-", "_")) if before.startswith("--") else None
    if option is not None:
        values = [
            str(word) for kind in option.kinds for word in typing.get_args(kind) if isinstance(word, str)
        ]
        return values or (list(_BOOLEANS[:2]) if option.of_kind(bool) else [])
    return [f"--{name}" for name in (*known, "help")]
