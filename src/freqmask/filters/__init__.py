"""Which frequencies an image keeps: one class a filter, all of one shape (see ``Filter``), and the filters by name.

A text from the command line or a configuration becomes a filter; nothing in it is run.
"""

from __future__ import annotations

import ast
import inspect
from typing import Any, NamedTuple

from freqmask.errors import UserError, brief, nearest
from freqmask.filters.filter import Complement, Filter, Filtered, OneOf
from freqmask.filters.fixed import BandPass, BandStop, HighPass, LowPass, Rings
from freqmask.filters.selected import Com, Energy, RandomBins, RCom, REnergy
from freqmask.imports import blame, import_object

__all__ = [
    "FILTERS",
    "BandPass",
    "BandStop",
    "Com",
    "Complement",
    "Energy",
    "Filter",
    "Filtered",
    "HighPass",
    "LowPass",
    "OneOf",
    "RCom",
    "REnergy",
    "RandomBins",
    "Rings",
    "build_filter",
]

# a filter by its name: one of yours is added here; options of its own are written inside the text, unless
# options/of_methods.py declares them and masking_filter of methods/mfm.py hands them on
FILTERS: dict[str, type[Filter]] = {
    filter.name: filter
    for filter in (
        LowPass,
        HighPass,
        BandPass,
        BandStop,
        Rings,
        Com,
        RCom,
        Energy,
        REnergy,
        RandomBins,
        OneOf,
    )
}

# the two mixtures of the papers, by a bare word: which options they take
MIXTURES: dict[str, tuple[str, ...]] = {
    "fixed": ("radius", "second_radius", "low_pass_share", "softness", "edge"),
    "com": ("com_fractions", "low_pass_share", "magnitude"),
}

OPTIONS = tuple(dict.fromkeys(option for options in MIXTURES.values() for option in options))
_OPTION_OF_ARGUMENT = {"fractions": "com_fractions"}


def build_filter(
    text: str | Filter, image_size: int | tuple[int, int] | None = None, **defaults: Any
) -> Filter:
    """Makes a filter from its description.

    Args:
        text: ``"fixed"`` (low-pass and high-pass, with ``second_radius`` band-stop and band-pass, drawn per
            image), ``"com"`` (Com and RCom, drawn per image), a filter's name with arguments
            (``"com(fractions=[0.01])"`` is Com alone), ``"mylab.filters:Wedge(angle=30)"``, or a filter.
            Arguments are Python literals; nothing in the text is run, apart from importing the named module.
        image_size: side or (H, W) against which radii are checked; ``None``: unchecked.
        **defaults: of ``fixed`` and ``com`` (``radius``, ``second_radius``, ``low_pass_share``, ``com_fractions``,
            ``softness``, ``edge``, ``magnitude``), where the text does not say; those that the filter does not take
            and those that are ``None`` are left aside.

    Returns:
        A filter; ``describe`` gives a text back that makes an equal one.

    Raises:
        UserError: for a text that is no filter, with the nearest valid name.

    >>> build_filter("lowpass(radius=8)").describe()
    "lowpass(radius=8, softness=0.0, edge='sigmoid')"
    """
    if unknown := [name for name in defaults if name not in OPTIONS]:
        raise UserError(f"filter option ({unknown[0]!r}) must be a known one; {nearest(unknown[0], OPTIONS)}")
    given = {name: value for name, value in defaults.items() if value is not None}
    built = text if isinstance(text, Filter) else _from_call(_parse(text), given)
    if image_size is not None:
        built.check((image_size, image_size) if isinstance(image_size, int) else image_size)
    return built


class _Call(NamedTuple):  # ``name(positional, named=...)`` or the bare name
    name: str
    positional: list[Any]
    named: dict[str, Any]
    bare: bool


def _parse(text: str) -> _Call:
    is_import_path = ":" in text.partition("(")[0]  # a colon behind the bracket belongs to an argument
    module, colon, rest = text.partition(":") if is_import_path else ("", "", text)
    try:
        expression = ast.parse(rest.strip(), mode="eval").body
        if isinstance(expression, ast.Name):
            return _Call(module.strip() + colon + expression.id, [], {}, bare=True)
        if not (isinstance(expression, ast.Call) and isinstance(expression.func, ast.Name)):
            raise ValueError
        named = {str(item.arg): ast.literal_eval(item.value) for item in expression.keywords}
        positional = [ast.literal_eval(item) for item in expression.args]
    except (SyntaxError, ValueError) as error:
        raise UserError(
            f"filter ({text!r}) must be a name with plain arguments; try 'com', 'lowpass(radius=8)' or "
            "'mylab.filters:Wedge(angle=30)'"
        ) from error
    return _Call(module.strip() + colon + expression.func.id, positional, named, bare=False)


def _from_call(call: _Call, given: dict[str, Any]) -> Filter:
    is_mixture = call.name in MIXTURES and (call.bare or call.name not in FILTERS)
    kind = None if is_mixture else _class_of(call.name)
    try:
        return _mixture(call, given) if kind is None else _of_class(kind, call, given)
    except (TypeError, ValueError, AttributeError) as error:  # a number where a list belongs and the like
        if blame(error) is not None:  # code of the user's own, which is told elsewhere
            raise
        parameters = () if kind is None else inspect.signature(kind).parameters.values()
        takes = MIXTURES[call.name] if kind is None else [_shown(parameter) for parameter in parameters]
        raise UserError(
            f"filter {call.name!r} got an argument of a wrong kind ({brief(error)}); it takes {', '.join(takes)}"
        ) from error


def _shown(parameter: inspect.Parameter) -> str:
    is_required = parameter.default is parameter.empty
    return parameter.name if is_required else f"{parameter.name}={parameter.default!r}"


def _of_class(kind: type[Filter], call: _Call, given: dict[str, Any]) -> Filter:
    parameters = list(inspect.signature(kind).parameters)
    options = {
        name: given[_OPTION_OF_ARGUMENT.get(name, name)]
        for name in parameters[len(call.positional) :]
        if _OPTION_OF_ARGUMENT.get(name, name) in given
    }
    named = options | call.named
    if kind is OneOf:
        arguments = dict(zip(("filters", "weights"), call.positional, strict=False)) | named
        texts = arguments.get("filters")
        is_list = isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)
        if not is_list or not texts or set(arguments) - {"filters", "weights"}:
            raise UserError(
                "filter 'oneof' must list filters; try oneof(['com()', 'highpass()'], weights=[1, 1])"
            )
        return OneOf([build_filter(text, **given) for text in texts], arguments.get("weights"))
    try:
        inspect.signature(kind).bind(*call.positional, **named)
    except TypeError as error:
        wrong = next((name for name in named if name not in parameters), None)
        hint = nearest(wrong, parameters) if wrong else f"it takes {', '.join(parameters)}"
        raise UserError(f"filter {call.name!r} got wrong arguments ({error}); {hint}") from error
    return kind(*call.positional, **named)


def _mixture(call: _Call, given: dict[str, Any]) -> Filter:
    options = MIXTURES[call.name]
    wrong = [name for name in call.named if name not in options]
    if call.positional or wrong:
        name = wrong[0] if wrong else repr(call.positional[0])
        raise UserError(f"filter {call.name!r} got a wrong argument ({name}); {nearest(name, options)}")
    settings = {name: given[name] for name in options if name in given} | call.named
    share = settings.pop("low_pass_share", 0.5)
    if not 0 <= share <= 1:
        raise UserError(f"low_pass_share ({share}) must be in [0, 1]; 0.5 is the papers' for a ViT")
    weights = [share, 1.0 - share]
    if call.name == "com":
        settings = {"fractions" if name == "com_fractions" else name: settings[name] for name in settings}
        return OneOf([Com(**settings), RCom(**settings)], weights)
    if (outer := settings.pop("second_radius", None)) is None:
        return OneOf([LowPass(**settings), HighPass(**settings)], weights)
    inner = settings.pop("radius", "auto")
    if isinstance(inner, str):
        raise UserError(f"radius ({inner!r}) must be a number beside second_radius ({outer}); try radius=16")
    return OneOf([BandStop(inner, outer, **settings), BandPass(inner, outer, **settings)], weights)


def _class_of(name: str) -> type[Filter]:
    if ":" not in name:
        if name not in FILTERS:
            raise UserError(f"filter ({name!r}) must be a known one; {nearest(name, [*FILTERS, *MIXTURES])}")
        return FILTERS[name]
    try:
        kind = import_object(name, "filter")
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"filter ({name!r}) must be importable ({error}); is its folder in PYTHONPATH?"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Filter)):
        raise UserError(f"filter ({name!r}) must be a class derived from freqmask.filters.Filter")
    return kind
