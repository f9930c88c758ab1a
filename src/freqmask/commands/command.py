"""A command and its twin in Python are one function: words, YAML and Python's values come in by the same door.

First what makes a command of a function, then its options from YAML, then from words, then its help.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from freqmask.errors import CallError, UserError, nearest
from freqmask.imports import named_by_user
from freqmask.options import (
    REQUIRED,
    Option,
    as_typed,
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
FIRST_GROUP = "Options"  # the heading of those that stand in a command's signature
_HELP = ("-h", "--help")
_BOOLEANS = ("true", "false", "yes", "no", "on", "off", "null")
_INDENT, _WIDTH = 28, 100  # of the help
_running: ContextVar[tuple[dict[str, Any], dict[str, Any]]] = ContextVar("running")


def given_options() -> dict[str, Any]:
    """The options that the running command was called with, those of its config file among them."""
    return dict(_running.get()[0])


def running_options() -> dict[str, Any]:
    """All options of the running command, with defaults for those that were not given."""
    return dict(_running.get()[1])


def command(
    *groups: Group, more: Callable[[Any], Mapping[str, Option]] | None = None
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Let a function take texts as well as values, and options from a YAML file where it has a ``config``.

    Inside the function :func:`given_options` and :func:`running_options` tell them.

    Args:
        *groups: options beside those of the function's signature, for its ``**options``: dataclasses, or options by
            name. The function is called with all of them.
        more: what ``method`` names -> options that it brings along.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Result:
            named = {**inspect.signature(function).bind_partial(*args).arguments, **kwargs}
            with running(call, named) as options, _torch_of_its_own():
                return function(**options)

        call.groups, call.more = groups, more  # type: ignore[attr-defined]
        if groups:
            describe(call, function)
        return call

    return decorate


@contextlib.contextmanager
def _torch_of_its_own() -> Iterator[None]:
    """Within, torch as a new process has it; a program that calls us finds its settings and generators as they were.

    A default of float64 made weights of float64, or ended in a traceback; after each training all that the caller
    drew was the same.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    with contextlib.ExitStack() as settings:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        settings.enter_context(torch.random.fork_rng(devices))
        settings.enter_context(torch.inference_mode(False))
        settings.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            settings.enter_context(torch.device("cpu"))
        settings.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        yield


@contextlib.contextmanager
def running(command: Function, named: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Within, a command runs: all its options, for the function that it was made of.

    Args:
        command: made by :func:`command`.
        named: texts or values by the names of the options.

    Raises:
        UserError: an option is missing, unknown, or none of its kind.
    """
    config = named.get("config") or ""
    files = config if isinstance(config, (list, tuple)) else [config]
    with named_by_user(named, " ".join(map(str, files))):
        known = known_options(command, named)
        given = given_values(named, known)
        for option in known.values():
            if option.default is REQUIRED and option.name not in given:
                first = re.split(r"[.;](?=\s|$)", option.help)[0]  # of a .csv file the dot is no end
                raise CallError(f"{option.title} is missing: {first}{_taken(option, given, known)}")
        every = {name: option.default for name, option in known.items() if name != "config"} | given
        token = _running.set((given, every))
        try:
            yield every
        finally:
            _running.reset(token)


def _taken(missing: Option, given: Mapping[str, Any], known: Mapping[str, Option]) -> str:
    """Which options may have taken what was meant for a positional one."""
    greedy = [known[name] for name, value in given.items() if isinstance(value, list) and len(value) > 1]
    titles = [option.title for option in greedy if not option.positional]
    if not missing.positional or not titles:
        return ""
    return f"; name it before {' and '.join(titles)}: an option of several values takes every word up to the next one"


def describe(call: Function, function: Function) -> None:
    """Give a command the signature and the docstring that its groups make, for ``help()``."""
    own = inspect.signature(function).parameters
    grouped = [option for option in declared(call).values() if option.name not in own]
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
    method = named.get("method")
    if more is not None and method is None and named.get("config") is not None:
        method = read_config(named["config"], None).get("method")
    return known if more is None or method is None else {**more(method), **known}


def given_values(named: Mapping[str, Any], known: Mapping[str, Option]) -> dict[str, Any]:
    """What was given, each value by its option, those of ``config`` below those beside it.

    Raises:
        UserError: an option is unknown, is none of its kind, or excludes another.
    """
    has_config = "config" in known and named.get("config") is not None
    below = read_config(named["config"], known) if has_config else {}
    typed = overridden(below, {name: value for name, value in named.items() if name != "config"}, known)
    given = read_options(typed, known)
    if str(given.get("out")).startswith("~"):  # no shell stands before YAML, Python, and --out=~/runs
        given["out"] = str(Path(given["out"]).expanduser())
    rivals: dict[str, list[str]] = {}
    for name, option in known.items():
        if option.rivals and given.get(name) is not None:
            rivals.setdefault(option.rivals, []).append(name)
    if clashes := [" and --".join(names) for names in rivals.values() if len(names) > 1]:
        raise UserError("; ".join(f"--{names} exclude each other; give one of them" for names in clashes))
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
    from freqmask.recipes import read_recipe, recipe_names

    path = Path(config)
    if not path.is_file():
        if str(config) not in recipe_names():
            hint = nearest(str(config), recipe_names())
            raise UserError(f"config ({config}) is neither a file nor a shipped recipe; {hint}")
        path = read_recipe(str(config)).path
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


def read_call(program: str, command: Function, words: Sequence[str]) -> tuple[dict[str, Any] | None, str]:
    """What the words after a command's name ask: texts by option to call it with, or None and what is only shown.

    Raises:
        UserError: an unknown option or a value of the wrong kind.
    """
    peeked = _peeked(words)
    with named_by_user(words, " ".join(peeked.get("config", []))):
        if any(word in _HELP for word in words):
            return None, help_text(program, command, peeked)
        known = known_options(command, peeked)
        given = read_words(known, words)
        if given.pop("print_config", None) is None:
            return given, ""
        import yaml

        every = {option.name: option.default for option in known.values()} | given_values(given, known)
        shown = {name: every[name] for name in known if name != "config" and every[name] is not REQUIRED}
        return None, yaml.safe_dump(shown, sort_keys=False)


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
        UserError: an option is unknown or lacks its value, one of several values is given twice, or a word is more
            than the command takes.
    """
    given: dict[str, Any] = {}
    loose: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            loose, rest = loose + rest, []
        elif re.match("-[A-Za-z]", word):  # a folder of such a name is ./-o
            raise UserError(f"option ({word}) is unknown; options begin with --, such as --out")
        elif not word.startswith("--"):
            loose.append(word)
        else:
            name, equals, text = word[2:].partition("=")
            name = name.replace("-", "_")
            option = _known(name, known)
            value = text if equals else _values(name, option, rest)
            # where several values are all that it takes, not one of them alone, the last would hide the first
            is_list = all(kind is type(None) or typing.get_origin(kind) is list for kind in option.kinds)
            if name in given and name != "config" and is_list:
                raise UserError(f"--{name} is given twice; give all its values after one --{name}")
            given[name] = [*given.get(name, []), value] if name == "config" else value
    beside = ""
    for option in known.values():
        if option.positional and loose and option.name not in given:
            given[option.name], loose = (loose, []) if option.many else (loose[0], loose[1:])
        elif option.positional and loose:
            beside += f" beside --{option.name}"
    if loose:
        raise UserError(f"{loose[0]!r} is more than this command takes{beside}; options begin with --")
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
    if option.of_kind(bool) and (not rest or rest[0].lower() not in (*_BOOLEANS, *option.words)):
        return "true"
    taken: list[str] = []
    if option.many and rest and not rest[0].startswith("["):
        is_one = _is_number if option.of_kind(int, float) else lambda word: not word.startswith("--")
        taken = list(itertools.takewhile(is_one, rest))
        del rest[: len(taken)]
    if taken:
        return taken
    if not rest or rest[0].startswith("--"):
        raise UserError(f"--{name} needs a value: {option.rule()}")
    return rest.pop(0)


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
        return [*option.words, *(_BOOLEANS[:2] if option.of_kind(bool) else ())]
    return [f"--{name}" for name in (*known, "help")]
