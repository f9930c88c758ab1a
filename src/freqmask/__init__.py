"""freqmask: frequency-masked self-supervised pre-training (MFM, FOLK) of any timm backbone.

Every command but ``recipes`` has a twin here: ``freqmask.pretrain("photos", method="folk")``. The pieces
(``freqmask.filters``, ``freqmask.losses``, ``freqmask.methods`` ...) are importable on their own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from freqmask.commands import evaluate
    from freqmask.commands.draw import reconstruct, spectra
    from freqmask.commands.embed import embed, predict
    from freqmask.commands.export import convert, export
    from freqmask.commands.prepare import prepare
    from freqmask.commands.pretrain import pretrain
    from freqmask.commands.show import info, report, runs
    from freqmask.errors import UserError
    from freqmask.interop.models import load_backbone
    from freqmask.interop.weights import load_method

_PIECES = {  # beside the commands
    "UserError": "freqmask.errors",
    "load_backbone": "freqmask.interop.models",
    "load_method": "freqmask.interop.weights",
}
__all__ = [
    "UserError",
    "convert",
    "embed",
    "evaluate",
    "export",
    "info",
    "load_backbone",
    "load_method",
    "predict",
    "prepare",
    "pretrain",
    "reconstruct",
    "report",
    "runs",
    "spectra",
]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: ``import freqmask`` must not wait for torch."""
    if name in _PIECES:
        value: Any = getattr(importlib.import_module(_PIECES[name]), name)
    elif name in __all__:
        command = importlib.import_module("freqmask.cli").COMMANDS[name]
        module = importlib.import_module(command.module)
        # freqmask.evaluate.knn(...), one function a protocol
        value = module if command.parts else getattr(module, name)
    else:
        raise AttributeError(f"module 'freqmask' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
