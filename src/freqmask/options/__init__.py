"""Every option of the program, declared once, in a dataclass or a signature, and its value from wherever it comes.

A group of options is a dataclass: a line an option, with default, help and range. What the command line, YAML, the
twin in Python, the recorded config and the report say of it follows from that line. A word, a scalar in a YAML file
and a value given in Python are read by :meth:`Option.read` alone: they become the same value or the same sentence.
Nothing here imports torch: ``--help`` must answer at once.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeVar

from freqmask.console import shell_paths, shell_word
from freqmask.errors import CallError, UserError, nearest

Group = TypeVar("Group")
Auto = Literal["auto"]
REQUIRED = inspect.Parameter.empty

_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_NULL = ("null", "~")
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")
MOST_SEED = 2**63 - 1  # what torch, numpy and our 64-bit keys all take


@dataclass(frozen=True)
class Range:
    """What a number must keep to; a list's numbers each."""

    least: float | None = None  # at least this
    above: float | None = None  # more than this
    most: float | None = None  # at most this
    below: float | None = None  # less than this
    length: int | None = None  # how many values a list holds

    def holds(self, value: Any) -> bool:
        """Whether a value keeps to it; what is no number does."""
        if isinstance(value, (list, tuple)):
            return (self.length is None or len(value) == self.length) and all(map(self.holds, value))
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return True
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """The rule in words.

        >>> str(Range(least=0, below=1)), str(Range(length=2))
        ('from 0 to below 1', '2 numbers')
        """
        count = "" if self.length is None else f"{self.length} numbers "
        if self.below == MOST_SEED + 1:
            return "from 0 to below 2^63"
        if self.least is not None and (self.most is not None or self.below is not None):
            end = f"{self.most:g}" if self.most is not None else f"below {self.below:g}"
            return f"{count}from {self.least:g} to {end}"
        named = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        bounds = " and ".join(f"{word} {bound:g}" for word, bound in named.items() if bound is not None)
        return f"{count}{bounds}".strip()


Seed = Annotated[int, Range(least=0, below=MOST_SEED + 1)]
Seeds = Annotated[list[int] | None, Range(least=0, below=MOST_SEED + 1)]


@dataclass(frozen=True)
class Option:
    """One option of a command or a method."""

    name: str  # with underscores, everywhere
    kind: Any  # its type
    default: Any = REQUIRED  # ``REQUIRED`` where it has none
    help: str = ""  # what it does, in a few words
    range: Range = field(default_factory=Range)  # what its numbers must keep to
    rivals: str | None = None  # the name of a group of options that exclude each other
    group: str = ""  # the heading in ``--help``
    positional: bool = False  # whether its values are typed without its name
    filter: str | None = None  # the one filter that uses it, of an option of a method
    # its default where a person counts in epochs (``NAME_epochs``) and the code in steps (``NAME_steps``)
    epochs: float | None = None
    shown: str | None = None  # its default in words, where that is not the same for all

    @property
    def typed(self) -> str:
        """Its name as a person types it, who counts in epochs."""
        return self.name if self.epochs is None else self.name.replace("_steps", "_epochs")

    @property
    def title(self) -> str:
        """What it is called on a command line."""
        return self.name.upper() if self.positional else f"--{self.name}"

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types that it may have, the most particular first."""
        union = typing.get_origin(self.kind) in (typing.Union, types.UnionType)
        order = [type(None), bool, int, float, Literal, list, dict, str, Any]
        kinds = typing.get_args(self.kind) if union else (self.kind,)
        return tuple(sorted(kinds, key=lambda kind: order.index(_sort(kind))))

    def of_kind(self, *kinds: Any) -> bool:
        """Whether one of its types is one of these, or a list of one of these."""
        return any(kind in kinds or _element(kind) in kinds for kind in self.kinds)

    @property
    def words(self) -> list[str]:
        """The words that it may be, such as auto."""
        values = (value for kind in self.kinds for value in typing.get_args(kind))
        return [value for value in values if isinstance(value, str)]

    @property
    def many(self) -> bool:
        """Whether it takes several values."""
        return any(typing.get_origin(kind) is list for kind in self.kinds)

    def read(self, value: Any) -> Any:
        """A value of this option.

        Args:
            value: a text, as a command line or a YAML file has it, or a value of Python's.

        Raises:
            UserError: it is none, with what it must be.
        """
        if isinstance(value, (list, tuple)) and len(value) == 1 and {int, float} & set(self.kinds):
            (value,) = value  # one word of a command line that takes several is the number itself
        for kind in self.kinds:
            try:
                result = _READERS[_sort(kind)](value, kind, self)
            except (ValueError, TypeError, OverflowError):
                continue
            if self.range.holds(result):
                return result
            break
        raise UserError(f"{self.name} ({_shown(value)}) must be {self.rule()}{self._hint(value)}")

    def _hint(self, value: Any) -> str:
        """The choice that is spelled most like a value; how to give none."""
        items = value if isinstance(value, (list, tuple)) else [value]
        if self.default is not REQUIRED and any(isinstance(item, str) and not item.strip() for item in items):
            return "; leave it out for its default"
        kinds = (_element(kind) or kind for kind in self.kinds)
        choices = [word for kind in kinds for word in typing.get_args(kind) if isinstance(word, str)]
        hint = nearest(_shown(value), choices) if len(choices) > 1 else ""
        return f"; {hint}" if hint.startswith("did you mean") else ""

    def rule(self) -> str:
        """What a value must be, in words.

        >>> Option("lr", float | Auto, "auto", range=Range(above=0)).rule()
        'a number above 0, or auto'
        """
        bounds, words = str(self.range), []
        for kind in self.kinds:
            if kind is not type(None):
                word = _words(kind)
                if bounds and _sort(kind) in (int, float, list):
                    word = bounds if self.range.length else f"{word} {bounds}"
                words.append(word)
        if type(None) in self.kinds and self.default is not None:
            words.append("null")
        return ", or ".join(dict.fromkeys(words))


def parse_yaml(text: Any, texts: bool = False) -> Any:
    """YAML whose numbers may be written 1e-3; what is no text passes.

    With ``texts`` scalars stay as they are written, so that an option's type decides what they mean.
    """
    import yaml

    if not isinstance(text, str):
        return text

    class Loader(yaml.SafeLoader):
        """Safe, without dates, and 1e-3 is a number."""

    Loader.yaml_implicit_resolvers = {
        first: [pair for pair in pairs if not pair[0].endswith(":timestamp")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    exponent = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+0123456789"))
    try:
        return yaml.load(text, yaml.BaseLoader if texts else Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _sort(kind: Any) -> Any:
    """The reader's key of a type."""
    return sort if (sort := typing.get_origin(kind) or kind) in _READERS else Any


def _element(kind: Any) -> Any:
    return (typing.get_args(kind) or (Any,))[0] if typing.get_origin(kind) is list else None


def _read_null(value: Any, kind: Any, option: Option) -> None:
    words = _NULL if str in option.kinds else (*_NULL, "none")
    if value is not None and not (isinstance(value, str) and value.strip().lower() in words):
        raise ValueError


def _read_bool(value: Any, kind: Any, option: Option) -> bool:
    if isinstance(value, str) and value.lower() in (*_TRUE, *_FALSE):
        return value.lower() in _TRUE
    if type(value).__name__ in ("bool", "bool_"):  # Python's and numpy's
        return bool(value)
    raise ValueError


def _read_float(value: Any, kind: Any, option: Option) -> float:
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        raise ValueError
    if isinstance(value, bool) or not isinstance(value, (str, Real)) or not math.isfinite(float(value)):
        raise ValueError
    return int(value) if isinstance(value, Integral) else float(value)


def _read_int(value: Any, kind: Any, option: Option) -> int:
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d[\d_]*\s*", value):
        return int(value)
    number = _read_float(value, kind, option)
    if number != int(number):
        raise ValueError
    return int(number)


def _read_literal(value: Any, kind: Any, option: Option) -> Any:
    choices = {str(choice): choice for choice in typing.get_args(kind)}
    if isinstance(value, bool) or str(value) not in choices:
        raise ValueError
    return choices[str(value)]


def _read_list(value: Any, kind: Any, option: Option) -> list[Any]:
    element = _element(kind)
    if isinstance(value, str) and value.strip()[:1] + value.strip()[-1:] == "[]":
        value = parse_yaml(value, texts=True)
    if isinstance(value, (str, bytes, os.PathLike, Mapping)) or not isinstance(value, Iterable):
        if value is None or (isinstance(value, str) and value.lower() in _NULL):
            raise ValueError
        value = [value]
    return [_READERS[_sort(element)](item, element, option) for item in value]


def _read_dict(value: Any, kind: Any, option: Option) -> dict[Any, Any]:
    mapping = parse_yaml(value)
    # YAML takes {depth:4}, without a space, for the name "depth:4" and nothing
    if not isinstance(mapping, Mapping) or any(":" in str(name) for name in mapping):
        raise ValueError
    return dict(mapping)


def _read_text(value: Any, kind: Any, option: Option) -> str:
    with suppress(ValueError):  # (0, 4095) of Python and [0, 4095] of YAML are the word 0,4095
        if isinstance(value, (list, tuple)) and len(value) == 2:
            value = ",".join(as_typed(_read_float(end, float, option)) for end in value)
    is_text = isinstance(value, (str, os.PathLike, Real)) and not isinstance(value, bool)
    if not is_text or not str(value).strip():  # blank: a variable of a script that was never set
        raise ValueError
    return str(value)


def _read_anything(value: Any, kind: Any, option: Option) -> Any:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError
    return value


_READERS: dict[Any, Callable[[Any, Any, Option], Any]] = {
    type(None): _read_null,
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    Literal: _read_literal,
    list: _read_list,
    dict: _read_dict,
    str: _read_text,
    Any: _read_anything,
}


def _words(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        return str(choices[0]) if len(choices) == 1 else "one of " + ", ".join(map(repr, choices))
    if typing.get_origin(kind) is list:
        if typing.get_origin(_element(kind)) is Literal:
            return "one or more of " + ", ".join(map(repr, typing.get_args(_element(kind))))
        examples = {int: "whole numbers such as 1 2", float: "numbers such as 0.5 1"}
        return examples.get(_element(kind), "words")
    numbers = {int: "a whole number", float: "a number"}
    named = {**numbers, bool: "true or false", str: "a word", dict: "a mapping such as '{depth: 4}'"}
    return named.get(typing.get_origin(kind) or kind, "an object")


def _shown(value: Any) -> str:
    # as it was written, cut where it is long
    if value is None:
        return "null"
    text = " ".join(map(_shown, value)) if isinstance(value, (list, tuple)) else str(value)
    text = text if isinstance(value, str) else " ".join(text.split())  # arrays and modules are many lines
    text = text if text.strip() else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def as_typed(value: Any) -> str:
    """A value as it would be typed.

    >>> as_typed((0.5, 1)), as_typed(True), as_typed(None)
    ('0.5 1', 'true', 'null')
    """
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, (list, tuple)):
        return " ".join(map(as_typed, value))
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def option(default: Any, help: str, **more: Any) -> Any:
    """One line of a group of options; its name and type stand before it, as for any field of a dataclass.

    Args:
        default: what a newcomer can live with.
        help: what it does, in a few words; the unit, and what ``auto`` is.
        **more: ``least``, ``above``, ``most``, ``below`` and ``length`` as in :class:`Range`; ``rivals``,
            ``filter`` and ``epochs`` as in :class:`Option`.
    """
    kept: dict[str, Any] = {name: more.pop(name) for name in ("rivals", "filter", "epochs") if name in more}
    return field(default=default, metadata={"help": help, "range": Range(**more), **kept})


def options_of(declaration: Callable[..., Any]) -> dict[str, Option]:
    """Name to option of a dataclass of :func:`option` fields, or of a callable by its signature and ``Args:``."""
    options = {}
    if dataclasses.is_dataclass(declaration):
        group: Any = declaration
        hints = typing.get_type_hints(group, include_extras=True)
        for line in dataclasses.fields(group):
            kind, more = _taken_apart(hints[line.name])
            more |= {name: value for name, value in line.metadata.items() if name != "range" or str(value)}
            homes = [cls for cls in group.__mro__ if line.name in vars(cls).get("__annotations__", {})]
            title = (homes[-1].__doc__ or "").partition("\n")[0].rstrip(".")
            options[line.name] = Option(line.name, kind, line.default, group=title, **more)
        return options
    signed = vars(declaration).get("__init__", declaration) if isinstance(declaration, type) else declaration
    hints = typing.get_type_hints(signed, include_extras=True)
    _, _, tail = (inspect.getdoc(declaration) or "").partition("Args:\n")
    section = re.split(r"^\S", tail, maxsplit=1, flags=re.MULTILINE)[0]
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section, re.MULTILINE | re.DOTALL)
    helps = {name: " ".join(text.split()) for name, text in entries}
    for name, parameter in inspect.signature(declaration).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            hint = hints.get(name, type(parameter.default) if parameter.default is not None else Any)
            kind, more = _taken_apart(hint)
            more["positional"] = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            options[name] = Option(name, kind, parameter.default, helps.get(name, ""), **more)
    return options


def _taken_apart(hint: Any) -> tuple[Any, dict[str, Any]]:
    """``Annotated[kind, Range(...)]`` as a type and what else an option holds."""
    if typing.get_origin(hint) is not Annotated:
        return hint, {}
    kind, *extras = typing.get_args(hint)
    ranges = [extra for extra in extras if isinstance(extra, Range)]
    return kind, {"range": ranges[0]} if ranges else {}


def read_group(group: type[Group], values: Mapping[str, Any]) -> Group:
    """A group of options with values by name, its defaults for those that are not given.

    Raises:
        UserError: a name is unknown, or a value is none of its option; all in one message.
    """
    return group(**read_options(values, options_of(group)))


def group_among(group: type[Group], options: Mapping[str, Any]) -> Group:
    """A group of options as all options of a command have them; its defaults for those that are not among them."""
    return group(**{name: options[name] for name in options_of(group) if name in options})


def signature(function: Callable[..., Any], options: Iterable[Option]) -> inspect.Signature:
    """A function's signature whose ``**options`` are spelled out, for ``help()`` and editors."""
    own = inspect.signature(function).parameters
    parameters = [parameter for parameter in own.values() if parameter.kind is not parameter.VAR_KEYWORD]
    for option in options:
        if option.name not in own:
            more = {"default": option.default, "annotation": option.kind}
            parameters.append(inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, **more))
    return inspect.Signature(parameters)


def read_options(values: Mapping[str, Any], known: Mapping[str, Option]) -> dict[str, Any]:
    """Values, or texts, by the declaration of their options.

    Raises:
        UserError: a name is unknown or a value is none of its option; all problems in one message.
    """
    if unknown := [name for name in values if name not in known]:
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
        if dot and whole in known and dict in map(_sort, known[whole].kinds):
            rest = (known[whole].read(merged[whole]) if merged.get(whole) else None) or {}
            try:
                merged[whole] = {**rest, key: parse_yaml(value)}
            except ValueError:
                raise UserError(f"{name} ({_shown(value)}) must be YAML, such as 4 or '[1, 2]'") from None
        else:
            merged[name] = value
    return merged


def command_words(values: Mapping[str, Any], first: str) -> str:
    """Options as they would be typed; what was made in Python is its name in capitals.

    Args:
        values: name to value.
        first: the argument that takes no option name.

    >>> command_words({"lr": 0.5, "data": ["my photos"], "model_args": {"depth": 4}}, first="data")
    "'my photos' --lr 0.5 --model_args '{depth: 4}'"
    """
    words = [text] if (text := shell_paths(values.get(first), first.upper())) else []
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
