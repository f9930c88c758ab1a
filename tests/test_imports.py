"""The direction of imports, and what the commands load before they are called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from freqmask.cli import COMMANDS

ROOT = Path(__file__).parent.parent


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_imports_point_one_way() -> None:
    pytest.importorskip("importlinter", reason="import-linter comes with freqmask[dev]")
    result = run_python(
        "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_files_import_each_other_in_a_circle() -> None:
    """A file can be read, and tested, with nothing but those below it; imports inside functions count."""
    grimp = pytest.importorskip("grimp", reason="grimp comes with import-linter (freqmask[dev])")
    graph = grimp.build_graph("freqmask", exclude_type_checking_imports=True, cache_dir=None)
    below = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    while free := {module for module, imported in below.items() if not imported & below.keys()}:
        below = {module: imported for module, imported in below.items() if module not in free}
    while free := below.keys() - set().union(*below.values(), set()):  # what only stands above a circle
        below = {module: imported for module, imported in below.items() if module not in free}
    assert not below, f"these import each other: {', '.join(sorted(below))}"


def test_the_modules_of_all_commands_load_without_heavy_libraries() -> None:
    modules = sorted({command.module for command in COMMANDS.values()})
    heavy = "{'torch', 'matplotlib', 'timm', 'lightning', 'numpy'}"
    lines = [f"import {module}; print({module!r}, sorted({heavy} & set(sys.modules)))" for module in modules]
    result = run_python("\n".join(["import sys", *lines]))
    assert result.stdout.splitlines() == [f"{module} []" for module in modules], result.stdout + result.stderr


def test_a_training_on_plain_images_imports_no_pyarrow() -> None:
    """Tables, shards and files of features need it; a machine that trains on folders may be without."""
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "import freqmask.pretraining.job\nfrom freqmask.data.sources import open_source\n"
        "print(len(open_source('builtin:photos', split='all')) > 0)"
    )
    assert run_python(code).stdout == "True\n"


@pytest.mark.parametrize(
    "asked, spins",
    [({}, "10000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
)
def test_a_command_s_waiting_threads_leave_their_core_soon(asked: dict[str, str], spins: str) -> None:
    """What GNU OpenMP says that it read when torch loaded it; with its own 300,000 another program stops a training."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    told = subprocess.run(
        [sys.executable, "-m", "freqmask", "info"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=kept | asked | {"OMP_DISPLAY_ENV": "verbose"},
    )
    if "GOMP_SPINCOUNT" not in told.stderr:
        pytest.skip("torch has another OpenMP here")
    assert f"GOMP_SPINCOUNT = '{spins}'" in told.stderr


def test_evaluations_of_frozen_features_do_without_lightning() -> None:
    modules = ", ".join(f"freqmask.evaluation.{name}" for name in ("knn", "linear", "fewshot", "robustness"))
    told = run_python(f"import sys; import {modules}; print('lightning' in sys.modules)")
    assert told.stdout == "False\n", told.stderr
