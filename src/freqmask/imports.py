"""What is imported when: code of one's own where the user named it, not because a file does; libraries quickly."""

from __future__ import annotations

import gc
import importlib
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from freqmask.errors import UserError

TRUST = "FREQMASK_TRUST"  # in the environment: import paths that files may name, with commas between them
IMPORT_PATH = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")
own_process = False  # whether this process is a command's alone, no program that calls us


class _Named(NamedTuple):
    """What the user has named, and the file whose options are read."""

    paths: frozenset[str]
    file: str
    imported_too: bool  # whether what the program has imported already counts as named


_IMPORTED: dict[str, str] = {}  # file of a module -> the import path that it was named by
_named: ContextVar[_Named | None] = ContextVar("named", default=None)


class NotNamedError(UserError):
    """A file names code that the user did not name; nothing was imported."""


@contextmanager
def named_by_user(given: Any, file: object = "", imported_too: bool = False) -> Iterator[None]:
    """Within, import paths count only where the user named them; of nested blocks the outermost tells what he named.

    Args:
        given: texts, alone or in lists and mappings: the words of a command line, or a call's arguments.
        file: whose options are read within.
        imported_too: whether modules that are imported already count, too, as for a program that imports its method.
    """
    outer = _named.get()
    if outer is None:
        paths = frozenset(path for text in _texts(given) for path in IMPORT_PATH.findall(text))
        inner = _Named(paths, str(file), imported_too)
    else:
        inner = outer._replace(file=str(file) or outer.file)
    token = _named.set(inner)
    try:
        yield
    finally:
        _named.reset(token)


def _texts(given: Any) -> Iterator[str]:
    if isinstance(given, str):
        yield given
    elif isinstance(given, type):
        yield f"{given.__module__}:{given.__qualname__}"
    elif hasattr(given, "describe"):  # a filter
        yield str(given.describe())
    elif isinstance(given, Mapping):
        yield from _texts(list(given.values()))
    elif isinstance(given, Sequence):
        for one in given:
            yield from _texts(one)


def import_object(path: str, what: str) -> Any:
    """What an import path names.

    Args:
        path: ``package.module:name``.
        what: the option that it is the value of.

    Raises:
        NotNamedError: a file names it, and the user did not.
        ImportError: there is no such module.
        AttributeError: the module has no such name.
        UserError: its code raises.
    """
    module, _, name = path.partition(":")
    named = _named.get()
    allowed = named is None or path in {*named.paths, *os.environ.get(TRUST, "").split(",")}
    if named is not None and not allowed and not (named.imported_too and module in sys.modules):
        raise NotNamedError(
            f"{what} ({path}) is code that {named.file or 'a file'} names and you did not, so it was not imported; "
            f"if you trust it, name it yourself (--{what} {path}), or set {TRUST}={path}"
        )
    try:
        found = importlib.import_module(module)
    except ImportError:
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    if not module.startswith("freqmask."):
        _IMPORTED[str(getattr(found, "__file__", module))] = path
    return getattr(found, name)


@contextmanager
def uncollected() -> Iterator[None]:
    """For imports: in a command's own process no garbage is collected within, nor what is made there sought in later.

    torch, timm and Lightning make 850,000 objects that all stay; to find that out again and again takes the
    collector a second of five, and as much later; forked loader workers would copy the pages that it touches.
    """
    if own_process:
        gc.disable()
    try:
        yield
    finally:
        if own_process:
            gc.freeze()
            gc.enable()


def blame(error: BaseException) -> str | None:
    """A sentence for what code of the user's own raised, here or in a loader worker; None where it is not to blame."""
    trace = "".join(traceback.format_exception(error))
    path = next((path for file, path in _IMPORTED.items() if f'File "{file}"' in trace), None)
    last = (str(error).strip().splitlines() or [""])[-1].removeprefix(f"{type(error).__name__}: ")
    return path and f"{path} raised {type(error).__name__}: {last} (FREQMASK_DEBUG=1 shows where)"
