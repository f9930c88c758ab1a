"""What is published: wheel and sdist hold what they must, and the wheel works where nothing else of us is."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from made_runs import make_run

import freqmask

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from hatchling import build; getattr(build, sys.argv[1])(sys.argv[2])"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="pip install hatchling builds the package")
    folder = tmp_path_factory.mktemp("dist")
    for kind in ("build_wheel", "build_sdist"):
        subprocess.run([sys.executable, "-c", BUILD, kind, str(folder)], cwd=ROOT, check=True)
    return folder


def test_the_wheel_holds_recipes_types_and_the_report_s_parts(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name.split("-")[1] == freqmask.__version__
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "src" / "freqmask"
    kinds = ("*.py", "*.yaml", "*.html", "*.css", "*.js", "py.typed")
    wanted = {f"freqmask/{path.relative_to(package)}" for kind in kinds for path in package.rglob(kind)}
    assert wanted - names == set()
    assert not any(name.startswith(("tests/", "docs/")) for name in names)


def test_the_sdist_holds_what_builds_tests_and_explains_it(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"README.md", "docs/images/preview.png", "CITATION.cff", "LICENSE", "CHANGELOG.md", "mkdocs.yml"}
    assert (wanted | {"tests/test_package.py", "src/freqmask/recipes/photos.yaml"}) - names == set()


def test_the_installed_wheel_lists_recipes_and_writes_a_report(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(
        tmp_path / "installed"
    )  # a wheel of pure Python is installed by unpacking it
    run = make_run(tmp_path / "run")
    code = (
        "import freqmask; from freqmask.cli import main; "
        f"assert freqmask.__file__.startswith({str(tmp_path)!r}), freqmask.__file__; "
        f"main(['--version']); main(['recipes']); main(['report', {str(run)!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"freqmask {freqmask.__version__}" in done.stdout
    assert "mfm-vit-base" in done.stdout
    assert (run / "report.html").is_file()
