"""What is published: wheel and sdist hold what they must, and the wheel works where nothing else of us is."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from made_runs import make_run

import freqmask

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# where a distribution's name is not that of its module
MODULES = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "scikit-image": "skimage",
}
# for DATA behind URLs: fsspec imports them by the URL's first word
THROUGH_FSSPEC = {"s3fs", "gcsfs"}
# for what a run is exported to or logged with: transformers reads it, Lightning's loggers write it
THROUGH_OTHERS = {"transformers", "tensorboard", "wandb", "onnxscript"}
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


def modules_of(requirements: list[str]) -> set[str]:
    names = {re.match(r"[A-Za-z0-9_.-]+", text)[0].lower() for text in requirements}
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


def imported_modules() -> set[str]:
    """Every other package's top-level module that the source names in an import, inside functions too."""
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"freqmask"}


def test_what_is_declared_is_what_is_imported() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    declared = modules_of(PYPROJECT["project"]["dependencies"])
    optional = modules_of([text for name in ("log", "data", "export", "seg") for text in extras[name]])
    imported = imported_modules()
    assert declared - imported == set(), "declared, but never imported"
    assert imported - declared - optional == set(), "imported, but not declared"
    assert optional - imported - THROUGH_FSSPEC - THROUGH_OTHERS == set(), "an extra that nothing imports"


def test_every_dependency_names_the_oldest_version_that_works() -> None:
    unbounded = [text for text in PYPROJECT["project"]["dependencies"] if ">=" not in text]
    assert unbounded == []


def test_no_private_name_of_timm_is_imported() -> None:
    private = re.compile(
        r"^\s*(from timm[\w.]*\._|from timm[\w.]* import _|import timm[\w.]*\._)", re.MULTILINE
    )
    assert [str(path) for path in (ROOT / "src").rglob("*.py") if private.search(path.read_text())] == []


def test_ci_installs_as_the_readme_says_and_runs_the_quick_checks_first() -> None:
    readme = (ROOT / "README.md").read_text()
    install, test = re.search(r"^(pip install .*) && (pytest .*)$", readme, re.MULTILINE).groups()
    lines = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line and line[0] != "#"]
    lines = [line.replace("--quiet --disable-pip-version-check ", "") for line in lines]
    order = [install, "ruff format --check .", "ruff check .", "mypy", test, "make lowest"]
    assert [line for line in lines if line in order] == order


def test_every_marker_is_declared_once_and_used() -> None:
    markers = [text.partition(":")[0] for text in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]]
    text = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    used = set(re.findall(r"pytest\.mark\.(\w+)", text)) - {
        "parametrize",
        "skipif",
        "skip",
        "xfail",
        "timeout",
    }
    assert sorted(markers) == sorted(used - {"filterwarnings", "usefixtures"})
