"""The progress bar; where there is no terminal, a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from tqdm import tqdm

from freqmask.console import is_quiet, rank, say

LINES_A_RUN = 20  # how often a run without a terminal speaks


class Progress:
    """Shows how far a training is.

    Args:
        total: optimiser steps of the training.
        done: steps made before this start.
        shown: names of the values to show, in order, with their words.
        unit: what is counted.
        lines: how often a whole run speaks where there is no terminal.
    """

    def __init__(
        self,
        total: int,
        done: int,
        shown: Mapping[str, str],
        unit: str = "step",
        lines: int = LINES_A_RUN,
    ) -> None:
        """Nothing is drawn before :meth:`start`."""
        self.lines = lines
        self.unit = unit
        self.total = total
        self.done = done
        self.shown = dict(shown)
        self._spoken = done
        self._bar: tqdm | None = None

    def start(self) -> None:
        """Draw the bar, where there is a terminal to draw on."""
        if rank() == 0 and not is_quiet() and sys.stdout.isatty():
            self._bar = tqdm(
                total=self.total,
                initial=self.done,
                unit=self.unit,
                file=sys.stdout,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} left {remaining} {postfix}",
            )

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Move to ``step`` and show the newest values."""
        text = self._text(values)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self.done)
        elif step == self.total or step - self._spoken >= max(self.total // self.lines, 1):
            self._spoken = step
            say(f"{self.unit} {step:,} of {self.total:,}" + (f": {text}" if text else ""))
        self.done = step

    def note(self, text: str) -> None:
        """Say something without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            say(text)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _text(self, values: Mapping[str, float]) -> str:
        parts = []
        for name, words in self.shown.items():
            if name in values:
                parts.append(words.format(values[name]))
        return ", ".join(parts)
