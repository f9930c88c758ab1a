"""The options of a pre-training before any work: which belong to the method, and what is wrong between them.

What a single option may be is read from its declaration (:mod:`freqmask.options`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from freqmask import methods
from freqmask.errors import UserError, nearest
from freqmask.methods import METHODS, find_method
from freqmask.options.of_methods import FROM_DATA, MaskingOptions, options_of_class, typed_options

FILTERS_OPTIONS = {
    field.name: field.metadata["filter"]
    for field in dataclasses.fields(MaskingOptions)
    if "filter" in field.metadata
}


def check_options(options: Mapping[str, Any]) -> None:
    """What can be told to be wrong with options beside each other, before looking at a single image.

    Args:
        options: the options of ``pretrain``.

    Raises:
        UserError: all problems in one message.
    """
    problems = []
    try:
        problems += _unused(options)
        if options["init"] is not None:
            from freqmask.interop.weights import check_init

            check_init(options["init"])
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))


def method_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given for the method, by the names of its constructor."""
    settings = {}
    for name, own in options_of_class(find_method(options["method"])).items():
        typed = own.name if own.epochs is None else name.replace("_steps", "_epochs")
        if options.get(typed) is not None and name not in FROM_DATA:
            settings[name] = options[typed]
    return settings


def method_defaults(options: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a method has beside the options that were given: recorded, so that a changed default changes no repeat.

    Args:
        options: of the run.
        settings: the method's own, plain values.
    """
    chosen, found = filter_of(options), {}
    for name, own in options_of_class(find_method(options["method"])).items():
        typed = name if own.epochs is None else name.replace("_steps", "_epochs")
        value = settings.get(name) if own.epochs is None else own.epochs
        if options.get(typed) in (None, "auto") and value is not None and own.filter in (None, chosen):
            found[typed] = value
    return found


def in_steps(settings: Mapping[str, Any], method: str, steps_an_epoch: float | None) -> dict[str, Any]:
    """A method's settings whose epochs are turned into steps; left out where it is not known how many.

    Args:
        settings: those given.
        method: whose.
        steps_an_epoch: None where it is not known yet.
    """
    counted = {
        own.name: own.epochs
        for own in options_of_class(find_method(method)).values()
        if own.epochs is not None
    }
    found = {name: value for name, value in settings.items() if name not in counted}
    if steps_an_epoch is not None:
        found |= {
            name: round(settings.get(name, default) * steps_an_epoch) for name, default in counted.items()
        }
    return found


def accepted_by(method: str) -> set[str]:
    """The names that a method's constructor takes."""
    return methods.accepted_by(find_method(method))


def filter_of(options: Mapping[str, Any]) -> str:
    """The filter that a method gets when none is named."""
    if options.get("filter") is not None:
        return str(options["filter"])
    own = options_of_class(find_method(options["method"])).get("filter")
    return str(own.default) if own is not None else ""


def _unused(options: Mapping[str, Any]) -> list[str]:
    """Options that the chosen method or filter would pass over in silence."""
    method = str(options["method"])
    homes: dict[str, list[str]] = {}
    for name, known in METHODS.items():
        for option in typed_options(options_of_class(known)):
            homes.setdefault(option, []).append(name)
    accepted = {*typed_options(options_of_class(find_method(method)))}
    given = {name for name in homes if options.get(name) is not None} - {*FROM_DATA}
    unused = sorted(given - accepted)
    problems = [
        f"option --{name} is not used by method {method}; it belongs to {', '.join(homes[name])}"
        for name in unused
    ]
    chosen = filter_of(options)
    for name, home in sorted(FILTERS_OPTIONS.items()):
        if name in given - set(unused) and home != chosen:
            problems.append(f"option --{name} is not used by filter {chosen}; it belongs to --filter {home}")
    return problems


def parse_image_size(value: int | str | Sequence[int]) -> int | tuple[int, int]:
    """224, ``"96x160"`` (height x width), or both as a ``config.yaml`` has them.

    Raises:
        UserError: it is neither.
    """
    text = str(value).lower() if isinstance(value, (int, str)) else "x".join(map(str, value))
    try:
        sides = [int(side) for side in text.split("x")]
    except ValueError as error:
        raise UserError(f"image_size ({value}) must be a number of pixels, HEIGHTxWIDTH, or auto") from error
    if len(sides) == 1:
        return sides[0]
    if len(sides) == 2 and min(sides) > 0:
        return sides[0], sides[1]
    raise UserError(f"image_size ({value}) must be a number of pixels, HEIGHTxWIDTH, or auto")


def check_accelerator(name: str) -> None:
    """Raises a UserError for a device that is not known or not here."""
    import torch

    known = ("auto", "cpu", "cuda", "gpu", "mps")
    if name not in known:
        raise UserError(f"accelerator ({name}) is unknown; {nearest(name, known)}")
    if name in ("cuda", "gpu") and not torch.cuda.is_available():
        raise UserError(f"accelerator ({name}) is not here: torch sees no CUDA device; try --accelerator cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("accelerator (mps) is not here; try --accelerator cpu")
