"""Tables of labels as other programs write them."""

from __future__ import annotations

import codecs
import os
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from freqmask.data.sources import open_source
from freqmask.data.splits import read_labels
from freqmask.errors import UserError

NAMES = ["Kühe/b0.png", "Kühe/b1.png", "dog/a.png"]
TABLE = "path,label\n" + "".join(f"{name},caf{'é' * (k == 0)}{k}\n" for k, name in enumerate(NAMES))


@pytest.fixture
def images(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number, name in enumerate(NAMES):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 6, 3), number, np.uint8)).save(path)
    return tmp_path / "data"


@pytest.mark.parametrize(
    "written",
    [
        TABLE.encode(),
        codecs.BOM_UTF8 + TABLE.encode(),
        TABLE.replace("\n", "\r\n").encode(),
        TABLE.replace("\n", "\r").encode(),
        TABLE.replace(",", ";").encode(),
        ("sep=;\n" + TABLE.replace(",", ";")).encode(),
        TABLE.encode("utf-16"),
        TABLE.replace(",", "\t").encode("utf-16-le"),
        TABLE.encode("utf-16-be"),
        TABLE.encode("utf-32"),
        TABLE.encode("latin-1"),
        TABLE.encode("cp1252"),
        unicodedata.normalize("NFD", TABLE).encode(),
    ],
    ids=["utf-8", "bom", "crlf", "cr", "semicolon", "sep", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1",
         "cp1252", "nfd"],
)  # fmt: skip
def test_a_table_is_read_in_the_encoding_it_has(images: Path, written: bytes) -> None:
    (images.parent / "labels.csv").write_bytes(written)
    source = open_source(images, labels=images.parent / "labels.csv")
    assert [source.name(index) for index in range(3)] == NAMES
    assert [unicodedata.normalize("NFC", name) for name in source.class_names or ()] == [
        "caf1",
        "caf2",
        "café0",
    ]
    assert [source.label(index) for index in range(3)] == [2, 0, 1]
    told = "is not in UTF-8" in " ".join(source.summary().notes)
    assert told == (b"caf\xe90" in written and b"\0" not in written)


def test_names_that_the_disc_decomposes_are_found(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number, name in enumerate(NAMES):
        path = tmp_path / "data" / unicodedata.normalize("NFD", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 6, 3), number, np.uint8)).save(path)
    (tmp_path / "labels.csv").write_text(TABLE)
    source = open_source(tmp_path / "data", labels=tmp_path / "labels.csv")
    assert [source.open(index).decode()[0, 0, 0] for index in range(3)] == [0, 1, 2]


def test_a_name_that_is_no_text_stays_itself(images: Path) -> None:
    odd = os.fsdecode(b"latin-\xe9.png")
    (images / odd).write_bytes((images / NAMES[0]).read_bytes())
    (images.parent / "labels.csv").write_bytes(b"path,label\nlatin-\xe9.png,a\n")
    source = open_source(images, labels=images.parent / "labels.csv")
    assert source.name(0) == odd


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the file is empty"),
        ("file,label\na,b\n", "path is missing; its first line has 'file', 'label'; rename"),
        (
            "File Name;Class\na;b\n",
            "path and label are missing; its first line has 'File Name', 'Class'; rename",
        ),
        ("path,label\ngone.png,a\n", "1 image that DATA lacks"),
        ("path,label\n", "lists no images"),
        ('path,label\n"' + "x" * 200_000, "is no CSV table"),
        ("path,label\ndog/a.png,a\ndog/a.png,b\n", "twice"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_in_a_sentence(images: Path, text: str, words: str) -> None:
    (images.parent / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        open_source(images, labels=images.parent / "labels.csv")


def test_a_name_that_several_images_have_is_refused_where_it_is_labelled(images: Path) -> None:
    with tarfile.open(
        images.parent / "s.tar", "w"
    ) as tar:  # as tar --append leaves a newer version of a file
        for name, member in (("Kühe/b0.png", "0.png"), ("dog/a.png", "1.png"), ("Kühe/b1.png", "0.png")):
            tar.add(images / name, member)
    table = images.parent / "labels.csv"
    table.write_text("path,label\ns/0.png,cow\ns/1.png,dog\n")
    with pytest.raises(UserError, match=r"names 's/0.png', as 2 images of DATA are called"):
        open_source(images.parent / "s.tar", labels=table)
    table.write_text("path,label\ns/1.png,dog\n")
    assert open_source(images.parent / "s.tar", labels=table).open(0).decode().max() == 2


def test_quotes_hold_delimiters_and_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('path,label\n"a,b.png","x\u2028y\nz"\n')
    assert [(row.path, row.label) for row in read_labels(tmp_path / "t.csv")] == [("a,b.png", "x\u2028y\nz")]


@pytest.mark.parametrize("index", ["", " "])
def test_an_index_without_a_name_as_pandas_writes_it_is_neither_split_nor_group(
    images: Path, index: str
) -> None:
    table = images.parent / "labels.csv"
    lines = [f"{number % 2},{name},{name[0]}" for number, name in enumerate(NAMES)]
    table.write_text("\n".join([f"{index},path,label", *lines]), encoding="utf-8")
    rows = read_labels(table)
    assert [(row.label, row.split, row.group) for row in rows] == [("K", None, None)] * 2 + [
        ("d", None, None)
    ]
    assert open_source(images, labels=table).group(0) is None
