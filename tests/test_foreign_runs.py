"""Runs, exported folders and configs may be somebody else's: their code is imported where the user named it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import yaml

import freqmask
from freqmask.data.sources import open_source
from freqmask.filters import LowPass
from freqmask.imports import NotNamedError, import_object, named_by_user
from tests.broken_runner import attempt
from tests.tiny_runs import make_photographs, make_run

CODE = """from pathlib import Path
Path("imported").touch()
from freqmask.filters import LowPass
from freqmask.methods import MFM
class Wedge(LowPass):
    pass
class Mine(MFM):
    name = "theirs:Mine"
def source():
    raise SystemExit("code of the data set")
"""
TRAINING = [
    "--steps",
    "1",
    "--batch_size",
    "4",
    "--workers",
    "0",
    "--precision",
    "32-true",
    "--image_size",
    "32",
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with photographs and a run, code on the path that leaves a mark where it is imported."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "theirs.py").write_text(CODE)
    (tmp_path / "photos").mkdir()
    make_photographs(tmp_path / "photos")
    make_run(tmp_path / "run")
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FREQMASK_TRUST", raising=False)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    return tmp_path


def changed(run: Path, **options: object) -> None:
    """The options of a run as somebody else may have written them."""
    file = run / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | options))


FOREIGN = {
    "method": {"method": "theirs:Mine"},
    "filter": {"filter": "theirs:Wedge(radius=4)"},
    "data": {"data": ["theirs:source"]},
}
COMMANDS = {
    "evaluate": [
        "evaluate",
        "knn",
        "run",
        "--data",
        "photos",
        "--workers",
        "0",
        "--out",
        "ev",
        "--test_share",
        "0.5",
    ],
    "embed": ["embed", "run", "photos", "--out", "e.parquet", "--workers", "0"],
    "export": ["export", "run", "--out", "exported"],
    "predict": ["predict", "run", "photos", "--out", "p.csv"],
    "reconstruct": ["reconstruct", "run", "photos/cats/1.png", "--out", "r.png"],
    "report": ["report", "run"],
    "runs": ["runs", "."],
    "help": ["pretrain", "--config", "run/config.yaml", "--help"],
    "repeat": ["pretrain", "--config", "run/config.yaml", "--out", "again", *TRAINING],
    "resume": ["pretrain", "photos", "--out", "run", *TRAINING],
    "train on": ["pretrain", "photos", "--init", "run", "--out", "again", "--dry_run", *TRAINING],
}


@pytest.mark.parametrize("option", FOREIGN)
def test_no_command_imports_what_a_run_names(option: str, here: Path) -> None:
    changed(here / "run", **{"data": ["photos"], **FOREIGN[option]})
    refused = []
    for name, words in COMMANDS.items():
        if name != "train on" or option == "method":
            code, text = attempt(words)
            assert "Traceback" not in text, (name, text)
            assert "code of the data set" not in text
            assert not (here / "imported").exists(), (name, text)
            if "was not imported" in text:
                path = str(FOREIGN[option][option]).strip("[']").partition("(")[0]
                assert f"FREQMASK_TRUST={path}" in text
                assert "run/config.yaml" in text
                refused.append((name, code))
    assert ("repeat", 2) in refused
    assert ("evaluate", 0) in refused if option == "data" else ("reconstruct", 2) in refused
    if option == "method":
        assert ("help", 2) in refused


def test_what_the_user_names_is_imported(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(here / "run", filter="theirs:Wedge(radius=4)")
    with pytest.raises(NotNamedError, match=r"run/config\.yaml names"):
        freqmask.load_method("run")
    assert not (here / "imported").exists()
    monkeypatch.setenv("FREQMASK_TRUST", "other:One,theirs:Wedge")
    assert attempt(COMMANDS["reconstruct"])[0] == 0
    monkeypatch.delenv("FREQMASK_TRUST")
    freqmask.load_method("run")  # the program has imported theirs already
    dry = ["--dry_run", *TRAINING]
    code, text = attempt(["pretrain", "photos", "--filter", "theirs:Wedge(radius=4)", "--out", "new", *dry])
    assert code == 0, text
    repeat = ["pretrain", "--config", "run/config.yaml", "--data", "photos", "--out", "newer", *dry]
    assert attempt(repeat)[0] == 2  # imported by another command, but not named to this one
    code, text = attempt([*repeat, "--filter", "theirs:Wedge(radius=4)"])
    assert code == 0, text


def test_a_program_of_ones_own_is_not_asked(here: Path) -> None:
    with pytest.raises(SystemExit, match="code of the data set"):
        open_source("theirs:source")


def test_of_nested_commands_the_first_tells_what_was_named() -> None:
    with named_by_user(["a.b:C", {"filter": "oneof(['d:E(1)'])"}]):
        with (
            named_by_user(["json:loads"], "config.yaml"),
            pytest.raises(NotNamedError, match=r"config\.yaml"),
        ):
            import_object("json:loads", "filter")
        with pytest.raises(ModuleNotFoundError):
            import_object("d:E", "filter")
    assert import_object("json:loads", "filter")


def test_classes_and_filters_of_a_call_are_named_by_it() -> None:
    class Loads(LowPass):
        def describe(self) -> str:
            return "json:loads(radius=4)"

    with named_by_user({"method": OrderedDict, "filter": Loads(4)}):
        assert import_object("collections:OrderedDict", "method") is OrderedDict
        assert import_object("json:loads", "filter")
        with pytest.raises(NotNamedError):
            import_object("json:dumps", "filter")


def test_workers_look_for_modules_where_their_parent_does(here: Path) -> None:
    """Python looks for the modules of a new process in its current folder first."""
    (here / "run" / "multiprocessing.py").write_text("raise SystemExit('code of the run')")
    (here / "bin").mkdir()
    script = here / "bin" / "freqmask_script.py"
    script.write_text("from freqmask.cli import main\nif __name__ == '__main__':\n    main()\n")
    words = ["embed", ".", "../photos", "--out", "../e.parquet", "--workers", "1"]
    done = subprocess.run(
        [sys.executable, str(script), *words], cwd=here / "run", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_is_no_place_to_look_for_modules(here: Path) -> None:
    (here / "run" / "theirs.py").write_text("raise SystemExit('code of the run')")
    (here / "run" / "yaml.py").write_text("raise SystemExit('code of the run')")
    shutil.rmtree(here / "path")
    done = subprocess.run(
        [sys.executable, "-m", "freqmask", "recipes"],
        cwd=here / "run",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
