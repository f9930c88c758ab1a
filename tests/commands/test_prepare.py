"""``freqmask prepare`` as a user types it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import freqmask
from freqmask.cli import main
from freqmask.data.sources import open_source


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "my photos"
    root.mkdir()
    for number in range(20):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.jpg")
    (root / "bad.jpg").write_bytes(b"x")
    return root


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_says_what_it_did_to_the_images(photos, tmp_path, capsys):
    out = tmp_path / "my shards"
    main(["prepare", str(photos), "--out", str(out), "--resize", "32", "--workers", "0"])
    said = capsys.readouterr().out
    assert "20 images in 1 shard" in said and "bad.jpg: its content is not an image" in said
    assert "20 of 20 images (100%) were reduced, the median one to 0.50" in said
    assert f"freqmask pretrain '{out}'" in said
    assert len(open_source(out)) == 20
    main(["prepare", str(photos), "--out", str(out), "--resize", "32"])
    assert "is there already" in capsys.readouterr().out


def test_the_room_is_that_of_the_folder_that_is_there(photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    usage, small = shutil.disk_usage, (tmp_path / "disk").resolve()

    def free(path):
        own = usage(path)
        return own._replace(free=5_000) if Path(path).resolve() == small else own

    monkeypatch.setattr(shutil, "disk_usage", free)
    main(["prepare", str(photos), "--out", str(tmp_path / "out"), "--workers", "0"])
    said = capsys.readouterr().out
    assert "; 5 kB are free" in said and "note: that may not fit" in said


def test_its_twin_returns_the_folder(photos, tmp_path):
    out = freqmask.prepare(str(photos), out=str(tmp_path / "out"), resize="none", workers=0)
    assert open_source(out).encoded(0)[1] == ".jpg"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--resize", "64"], "--resize was 32 and is 64"),
        (["--resize", "32", "--shard-size", "7"], "--shard_size was 10000 and is 7"),
    ],
)
def test_other_settings_are_refused(photos, tmp_path, capsys, words, sentence):
    out = str(tmp_path / "out")
    main(["prepare", str(photos), "--out", out, "--resize", "32", "--workers", "0"])
    before = contents(tmp_path / "out")
    with pytest.raises(SystemExit) as left:
        main(["prepare", str(photos), "--out", out, *words])
    assert left.value.code == 2 and sentence in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_other_images_are_refused(photos, tmp_path, capsys):
    words = ["prepare", str(photos), "--out", str(tmp_path / "out"), "--workers", "0"]
    main(words)
    (photos / "1.jpg").unlink()
    with pytest.raises(SystemExit):
        main(words)
    assert "images, labels or groups were others" in capsys.readouterr().err


def test_other_groups_are_refused(photos, tmp_path, capsys):
    table = tmp_path / "labels.csv"
    words = ["prepare", str(photos), "--labels", str(table), "--out", str(tmp_path / "out"), "--workers", "0"]
    rows = [f"{number}.jpg,a,{number}" for number in range(20)]
    table.write_text("\n".join(["path,label,group", *rows]))
    main(words)
    table.write_text("\n".join(["path,label,group", *rows[:-1], "19.jpg,a,0"]))  # of patient 0, too
    with pytest.raises(SystemExit):
        main(words)
    assert "images, labels or groups were others" in capsys.readouterr().err


def test_files_that_were_rewritten_under_their_names_are_told(photos, tmp_path, capsys):
    words = ["prepare", str(photos), "--out", str(tmp_path / "out"), "--workers", "0"]
    main(words)
    capsys.readouterr()
    time = (photos / "1.jpg").stat().st_mtime_ns
    main(words)
    said = capsys.readouterr().out
    assert "of the same images and settings" in said and "note" not in said
    os.utime(photos / "1.jpg", ns=(time, time + 10**9))
    main(words)
    said = capsys.readouterr().out
    assert "of the same names and settings" in said and "were rewritten (or copied) since" in said
    manifest = tmp_path / "out" / "prepare.json"
    content = json.loads(manifest.read_text())
    for name in ("groups", "stamp"):  # 0.1.0 had none
        del content["settings"][name]
    manifest.write_text(json.dumps(content))
    main(words)
    assert "of the same images and settings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--resize", "8"], "resize (8) must be a whole number at least 32, or none"),
        (["--shard_size", "0"], "shard_size (0)"),
        (["--workers", "-1"], "workers (-1)"),
        (["--split", "val"], "split (val)"),
        (["--pages", "book"], "pages (book)"),
    ],
)
def test_a_mistake_is_a_sentence_and_leaves_nothing(photos, tmp_path, capsys, words, sentence):
    with pytest.raises(SystemExit) as left:
        main(["prepare", str(photos), "--out", str(tmp_path / "out"), *words])
    assert left.value.code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_written_is_a_sentence(photos, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit) as left:
        main(["prepare", str(photos), "--out", str(tmp_path / "file" / "out")])
    assert left.value.code == 2 and "cannot be written" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_command_goes_on(photos, tmp_path):
    words = ["--resize", "32", "--shard_size", "4", "--workers", "1"]

    def command(out):
        return [
            sys.executable,
            "-m",
            "freqmask",
            "prepare",
            str(photos),
            "--out",
            str(tmp_path / out),
            *words,
        ]

    subprocess.run(command("whole"), check=True, capture_output=True)
    with subprocess.Popen(command("out"), stdout=subprocess.PIPE, text=True) as process:
        assert any(line.startswith("image 6 of") for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out" / "shards.index").exists()
    again = subprocess.run(command("out"), check=True, capture_output=True, text=True)
    assert "resumes" in again.stdout
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
