"""What a training says without a terminal."""

from __future__ import annotations

import pytest

from freqmask.console import Progress


def test_a_step_without_values_yet_ends_without_a_colon(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(20, 0, {"loss": "loss {:.4g}"})
    progress.update(1, {})
    progress.update(2, {"loss": 0.5})
    assert capsys.readouterr().out == "step 1 of 20\nstep 2 of 20: loss 0.5\n"
