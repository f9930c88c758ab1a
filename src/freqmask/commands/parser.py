"""From words on a command line to a call of the command's function, by its signature."""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jsonargparse

from freqmask.commands.given import config_path
from freqmask.errors import UserError, nearest

Positional = str | tuple[str, ...] | None

_BOOLEANS = ("true", "false", "yes", "no", "null")


_KINDS = {
    r"list\[float\]|list\[int\]": "numbers such as 0.5 1",
    r"list\[str\]": "words",
    r"dict": "a mapping such as '{depth: 4}'",
    r"\bint\b(?!\])": "a whole number",
    r"\bfloat\b(?!\])": "a number",
    r"\bbool\b": "true or false",
    r"\bstr\b(?!\])(?!, Any)": "a word such as auto",
}


class Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are ours."""

    kinds: Mapping[str, str] = {}

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Turn the library's complaint into one sentence."""
        raise UserError(_sentence(message, self.kinds)) from ex


def call(program: str, function: Callable[..., Any], positional: Positional, words: Sequence[str]) -> Any:
    """Parse ``words`` by the function's signature and call it.

    Args:
        program: the name that help shows.
        function: a command.
        positional: the name of its argument that takes no option name, or the names of several in order.
        words: what was typed after the command's name.

    Raises:
        UserError: an unknown option or a value of the wrong kind.
    """
    parser = build_parser(program, function, positional)
    words = [_underscored(word) for word in words]
    _check_names(function, words)
    words = _with_config_first(_with_whole_values(function, words))
    try:
        given = parser.parse_args(words, defaults=False)
    except SystemExit as leaving:
        if leaving.code in (0, None):  # --help and --print_config have printed what was asked for
            return None
        raise
    options = {
        name: value for name, value in given.as_dict().items() if name not in ("config", "print_config")
    }
    for name in in_order(positional):
        if options.get(name) in (None, []):
            options.pop(name, None)
    return function(**options)


def in_order(positional: Positional) -> tuple[str, ...]:
    """The names of the arguments that take no option name."""
    if positional is None:
        return ()
    return (positional,) if isinstance(positional, str) else tuple(positional)


def build_parser(program: str, function: Callable[..., Any], positional: Positional) -> Parser:
    """The parser that a command's signature and docstring describe."""
    parameters = inspect.signature(function).parameters
    parser = Parser(
        prog=program,
        usage=_usage(program, function, positional),
        formatter_class=HelpFormatter,
        description=_description(function),
        default_env=False,
        add_help=True,
    )
    parser.kinds = _kinds(function)
    for name in in_order(positional):
        many = "list" in str(parameters[name].annotation)
        required = parameters[name].default is inspect.Parameter.empty
        count = ("+" if required else "*") if many else (None if required else "?")
        default = {} if required else {"default": parameters[name].default}
        argument = parser.add_argument(
            name, nargs=count, metavar=name.upper(), help=_argument_help(function, name), **default
        )
        argument.required = required  # or the help says so of every one
    if "config" in parameters:
        parser.add_argument("--config", action="config", help=_argument_help(function, "config"))
    skipped: set[str | int] = {name for name in (*in_order(positional), "config") if name in parameters}
    parser.add_function_arguments(function, skip=skipped, fail_untyped=True)
    return parser


class HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Options first, then what they mean, at a width that a terminal shows whole."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        """Leave room for the longest option."""
        super().__init__(prog, max_help_position=28, width=100, **kwargs)


def _kinds(function: Callable[..., Any]) -> dict[str, str]:
    parameters = inspect.signature(function).parameters
    return {name: str(parameter.annotation) for name, parameter in parameters.items()}


def _usage(program: str, function: Callable[..., Any], positional: Positional) -> str:
    parameters = inspect.signature(function).parameters
    words = [program]
    for name in in_order(positional):
        word = name.upper() + (" ..." if "list" in str(parameters[name].annotation) else "")
        required = parameters[name].default is inspect.Parameter.empty
        words.append(word if required else f"[{word}]")
    return " ".join([*words, "[OPTIONS]"])


def _description(function: Callable[..., Any]) -> str:
    text = inspect.getdoc(function) or ""
    return re.split(r"\n\n(?:Args|Returns|Raises):", text)[0]


def _argument_help(function: Callable[..., Any], name: str) -> str:
    text = inspect.getdoc(function) or ""
    found = re.search(rf"^    {name}: (.*?)(?=^    \w+: |^\w|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return " ".join(found.group(1).split()).replace("%", "%%") if found else argparse.SUPPRESS


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _check_names(function: Callable[..., Any], words: Sequence[str]) -> None:
    known = {*inspect.signature(function).parameters, "help", "print_config"}
    for word in words:
        if not word.startswith("--") or word == "--":
            continue
        name = word[2:].partition("=")[0]
        if name.split(".")[0] not in known:  # --model_args.depth 4 reaches into a dictionary
            raise UserError(f"option (--{name}) is unknown; {nearest(name, sorted(known))}")


def _with_whole_values(function: Callable[..., Any], words: Sequence[str]) -> list[str]:
    """``--dry_run`` alone means true; ``--crop_scale 0.5 1`` means a list."""
    kinds = _kinds(function)
    whole: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        whole.append(word)
        kind = kinds.get(word[2:], "") if word.startswith("--") else ""
        if kind.startswith("bool") and (not rest or rest[0].lower() not in _BOOLEANS):
            whole[-1] = f"{word}=true"
        elif "list[float]" in kind or "list[int]" in kind:
            numbers = list(itertools.takewhile(_is_number, rest))
            if numbers:
                whole[-1] = f"{word}=[{','.join(numbers)}]"
                rest = rest[len(numbers) :]
        elif "list[str]" in kind and rest and not rest[0].startswith("["):
            texts = list(itertools.takewhile(lambda text: not text.startswith("--"), rest))
            whole[-1] = f"{word}={json.dumps(texts)}"
            rest = rest[len(texts) :]
    return whole


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _with_config_first(words: Sequence[str]) -> list[str]:
    """``--config mfm-vit-base`` means the recipe's file, and what is typed before it counts as what is typed after."""
    configs: list[str] = []
    others: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--config" and rest:
            configs += [word, str(config_path(rest.pop(0)))]
        elif word.startswith("--config="):
            configs.append("--config=" + str(config_path(word.partition("=")[2])))
        else:
            others.append(word)
    return [*configs, *others]


def _sentence(message: str, kinds: Mapping[str, str]) -> str:
    """The library's complaint without its inner names: option, value, what it must be."""
    key = re.search(r"[Pp]arser key \"?'?([\w.]+)", message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if key and value and key.group(1).split(".")[0] in kinds:
        name = key.group(1)
        return f"{name} ({value.group(1).strip()}) must be {_rule(kinds[name.split('.')[0]])}"
    unknown = re.search(r"Option '([\w.]+)' is not accepted", message)
    if unknown:
        return f"option ({unknown.group(1)}) in the config is unknown; {nearest(unknown.group(1), kinds)}"
    unplaced = re.search(r"nrecognized arguments: (.*)", message)
    if unplaced:
        return f"{unplaced.group(1)!r} is more than this command takes; options begin with --"
    return " ".join(line.strip() for line in message.splitlines() if line.strip())


def _rule(kind: str) -> str:
    """An annotation in words.

    >>> _rule("int | str")
    'a whole number or a word such as auto'
    """
    literal = re.search(r"Literal\[(.*?)\]", kind)
    if literal:
        return "one of " + literal.group(1)
    words = [text for pattern, text in _KINDS.items() if re.search(pattern, kind)]
    return " or ".join(words) or kind
