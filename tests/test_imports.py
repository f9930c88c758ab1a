"""The direction of imports, and what the commands load before they are called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = ["prepare", "spectra", "info", "recipes"]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_imports_point_one_way() -> None:
    pytest.importorskip("importlinter", reason="import-linter comes with freqmask[dev]")
    result = run_python(
        "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_loads_without_heavy_libraries(name: str) -> None:
    heavy = "{'torch', 'matplotlib', 'timm', 'lightning', 'numpy'}"
    result = run_python(f"import freqmask.commands.{name}, sys; print(sorted({heavy} & set(sys.modules)))")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
