"""The output is ours: banners, tips and warnings of the libraries underneath stay out of it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOUD = ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero", "timm")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the libraries inside the block, unless FREQMASK_DEBUG is set, and put all back afterwards."""
    if os.environ.get("FREQMASK_DEBUG"):
        yield
        return
    loggers = [logging.getLogger(name) for name in LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
