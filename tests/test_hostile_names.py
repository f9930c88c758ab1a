"""Names of files, classes, folders and runs are data: no terminal obeys them, every table gives them back."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import csv

from freqmask.console import plain, shell_word
from freqmask.data.sources import open_source
from freqmask.training.files import read_rows
from tests.broken_runner import attempt
from tests.tiny_runs import make_run

NAMES = (
    "<script>alert(1)<",
    '"q\'uote"',
    '=HYPERLINK("http:","y")',
    "+1+1",
    "-1",
    "@SUM(A1)",
    "two\nlines",
    "two\rreturns",
    "a\ttab",
    "\x1b[31mred\x1b]0;title\x07",
    "csi\x9b31m",
    "rtl\u202egnp",
    os.fsdecode(b"caf\xe9"),
    os.fsdecode(b"\x9b31m"),
    "long" * 45,
    "--out",
    "x..",
    "a,b;c",
    " lead",
    "trail ",
    "back\\slash",
    "a$x^$b$_$",
    "NA",
    "001",
    "%s{x}",
    "ünïcode",
)
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]")
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a class of every name, three images a class and one that cannot be read, and a run."""
    folder = tmp_path_factory.mktemp("place")
    generator = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        (folder / "data" / name).mkdir(parents=True)
        for other in (NAMES[number], NAMES[(7 * number + 1) % len(NAMES)], f"{name}-3"):
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "data" / name / f"{other}.png")
        (folder / "data" / name / f"{NAMES[(3 * number + 2) % len(NAMES)]}-bad.png").write_bytes(b"no image")
    (folder / "scene").mkdir()
    make_run(folder / "run <b>\x1b[31m")
    return folder


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def said(words: list[str]) -> str:
    """What a command prints, which no terminal would obey."""
    code, text = attempt(words)
    assert code == 0, text
    assert not OBEYED.search(text), repr(OBEYED.search(text))
    return text


def names_of(place: Path, bad: bool) -> list[str]:
    source = open_source(str(place / "data"))
    return sorted(name for name in map(source.name, range(len(source))) if name.endswith("-bad.png") == bad)


def by_arrow(path: Path, column: str) -> list[str]:
    """As another reader of CSV has it, with bytes that are no UTF-8 as Python's file names have them."""
    parsing, converting = (
        csv.ParseOptions(newlines_in_values=True),
        csv.ConvertOptions(column_types={column: pa.binary()}),
    )
    table = csv.read_csv(path, parse_options=parsing, convert_options=converting)
    return list(map(os.fsdecode, table[column].to_pylist()))


def test_features_and_neighbours_of_hostile_names(place: Path, here: Path) -> None:
    data, run = str(place / "data"), str(place / "run <b>\x1b[31m")
    for out in ("e.npy", "e.parquet"):
        said(["embed", run, data, "--neighbours", "--out", out, "--workers", "0"])
    rows = read_rows(Path("e.csv"))
    assert sorted(row["path"] for row in rows) == names_of(place, bad=False)
    assert {row["class"] for row in rows} == set(NAMES)
    stored = pq.read_table("e.parquet", columns=["class"]).column("class").to_pylist()
    assert set(stored) == {
        name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for name in NAMES
    }


def test_evaluations_pages_and_lists_of_hostile_names(place: Path, here: Path) -> None:
    data, run = str(place / "data"), str(place / "run <b>\x1b[31m")
    shutil.copytree(run, "run\t+1")
    evaluation = ["evaluate", "knn", "run\t+1", "pixels", "--data", data, "--workers", "0", "--out", "ev"]
    text = said([*evaluation, "--test_share", "0.5"])
    assert "two\\nlines" in text
    said([*evaluation, "--test_share", "0.5"])  # the split that the first one has written is read
    classes = read_rows(Path("ev/knn-classes.csv"))
    assert {row["class"] for row in classes} == set(NAMES)
    (split,) = Path("runs/splits").glob("*.csv")
    listed = {row["path"] for row in read_rows(split)}
    assert listed == {*names_of(place, bad=False), *names_of(place, bad=True)}
    said(["runs", "."])
    for kind in ("md", "csv", "latex"):
        said(["report", "run\t+1", "--results", "ev/results.csv", "--table", kind])
    said(["report", "run\t+1", "--results", "ev/results.csv", "--out", "page.html"])
    assert len(re.findall("<script", Path("page.html").read_text(encoding="utf-8"))) == 3


def test_prepared_and_predicted_hostile_names(place: Path, here: Path) -> None:
    data = str(place / "data")
    text = said(["prepare", data, "--out", "sh ards", "--workers", "0"])
    assert text.splitlines()[-1] == "use it      freqmask pretrain 'sh ards'"
    skipped = read_rows(Path("sh ards/skipped.csv"))
    assert sorted(row["name"] for row in skipped) == names_of(place, bad=True)
    assert set(open_source("sh ards").class_names or ()) == set(NAMES)
    shutil.copytree(GOLDEN / "tuned" / "mfm-seed0" / "classifier", "model")
    config = json.loads(Path("model/config.json").read_text())
    labels = ["=1+1", "\x1b[31m\n", NAMES[12]]
    config["label_names"] = labels
    Path("model/config.json").write_text(json.dumps(config))
    said(["predict", "model", data, "--out", "p.csv", "--workers", "0"])
    rows = read_rows(Path("p.csv"))
    assert sorted(row["path"] for row in rows) == names_of(place, bad=False)
    assert set(rows[0]) == {"path", "class", "probability", *labels}
    assert {row["class"] for row in rows} <= set(labels)


def test_another_reader_reads_the_same_names(place: Path, here: Path) -> None:
    said(["prepare", str(place / "data"), "--out", "shards", "--workers", "0"])
    assert sorted(by_arrow(Path("shards/skipped.csv"), "name")) == names_of(place, bad=True)


def test_a_command_with_hostile_names_is_what_a_shell_takes() -> None:
    for name in NAMES:
        word = shell_word(name)
        assert not OBEYED.search(word)
        assert "\n" not in word
        taken = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True).stdout
        assert os.fsdecode(taken) == name


def test_an_error_is_escaped(here: Path) -> None:
    code, text = attempt(["pretrain", "no\x1b[31msuch\u202e" + NAMES[12]])
    assert code == 2
    assert not OBEYED.search(text)


def test_weights_under_a_name_that_is_no_utf_8_are_refused_before_any_work(place: Path, here: Path) -> None:
    for words in (
        ["pretrain", "builtin:photos", "--out", NAMES[12]],
        ["export", str(place / "run <b>\x1b[31m"), "--out", NAMES[12]],
    ):
        code, text = attempt(words)
        assert code == 2
        assert "must have a name in UTF-8" in text


def test_plain_text_stays_as_it_is() -> None:
    for text in ("ünïcode – 漢字 ± µ\nzwei", "😀"):
        assert plain(text) == text
