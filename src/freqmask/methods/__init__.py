"""The methods by name, and methods of your own by import path."""

from __future__ import annotations

from typing import Any

from torch import nn

from freqmask.errors import UserError, nearest
from freqmask.imports import import_object
from freqmask.methods.distill import Distill
from freqmask.methods.folk import FOLK
from freqmask.methods.method import Method
from freqmask.methods.mfm import MFM
from freqmask.methods.restoration import Deblur, Denoise, SuperResolution
from freqmask.methods.words import Words
from freqmask.options.of_methods import BUILT_FROM, check_method, options_of_class

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (MFM, FOLK, Words, Distill, SuperResolution, Deblur, Denoise)
}

__all__ = [
    "FOLK",
    "METHODS",
    "MFM",
    "Deblur",
    "Denoise",
    "Distill",
    "Method",
    "SuperResolution",
    "Words",
    "accepted_by",
    "build_method",
    "find_method",
]


def find_method(name: str) -> type[Method]:
    """The class of a method.

    Args:
        name: one of ``METHODS``, or an import path such as ``mylab.methods:Mine``.

    Raises:
        UserError: if there is none of that name, with the nearest.
    """
    if ":" not in name:
        check_method(name)
        return METHODS[name]
    try:
        found = import_object(name, "method")
    except (ImportError, AttributeError) as error:
        raise UserError(f"method ({name}) could not be imported ({error}); is it on PYTHONPATH?") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(f"method ({name}) must be a class that derives from torch.nn.Module")
    return found  # type: ignore[return-value]  # whoever keeps the contract need not derive from Method


def build_method(name: str, **settings: Any) -> Method:
    """A method by name or import path, from its options.

    Args:
        name: as for :func:`find_method`.
        **settings: the options of its constructor.

    Returns:
        The method on the CPU, in training mode, freshly initialized.

    Raises:
        UserError: for an unknown name or option, or a value out of range.
    """
    method = find_method(name)
    accepted = accepted_by(method)
    unknown = sorted(set(settings) - accepted)
    if unknown:
        hints = "; ".join(f"{option}: {nearest(option, sorted(accepted))}" for option in unknown)
        raise UserError(f"{', '.join(unknown)} is no option of method {name}; {hints}")
    return method(**settings)


def accepted_by(method: type) -> set[str]:
    """The names of the arguments that a method takes."""
    return {*BUILT_FROM, *options_of_class(method)}
