"""A source that an import path names: ``mylab.data:Scans``."""

from __future__ import annotations

import importlib

from freqmask.data.source import Source
from freqmask.errors import UserError, nearest


def import_source(text: str) -> Source:
    """The source that an import path names: an object, or a class or function that returns one.

    Args:
        text: ``package.module:name``.

    Raises:
        UserError: it cannot be imported, or is no `Source`.
    """
    module_name, _, name = text.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"DATA ({text}) is neither a folder nor importable ({error}); check its spelling or PYTHONPATH"
        ) from error
    if not hasattr(module, name):
        hint = nearest(name, [known for known in vars(module) if not known.startswith("_")])
        raise UserError(f"DATA ({text}): {module_name} has no {name}; {hint}")
    found = getattr(module, name)
    source = found() if not isinstance(found, Source) and callable(found) else found
    if not isinstance(source, Source):
        raise UserError(f"DATA ({text}) must be a freqmask.data.sources.Source, or return one when called")
    return source
