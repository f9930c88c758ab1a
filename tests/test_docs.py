"""The documentation holds what it says: links lead somewhere, snippets run, commands exist as they are written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from freqmask.cli import COMMANDS, load, main
from freqmask.commands.command import declared

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
# Each of these is run by a test of its own.
ELSEWHERE = {"using-it.md": "tests/interop/test_using_it.py", "CONTRIBUTING.md": "tests/test_contributing.py"}
WALKS = ("index.md", "your-own-images.md", "when-it-goes-wrong.md")
TINY = "{depth: 1, embed_dim: 48, num_heads: 2}"
SMALL = ["--steps", "2", "--batch_size", "4", "--workers", "0", "--accelerator", "cpu", "--model_args", TINY]


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages."""
    found = re.findall(
        r"^```(\w*)[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return [text for language, text in found if language in languages]


def commands(page: Path) -> list[list[str]]:
    """Every ``freqmask ...`` of a page's code blocks, whoever starts it: what follows the word, without its comment."""
    lines = [line for text in blocks(page, "bash", "sh") for line in text.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[line.index("freqmask") + 1 :] for line in words if "freqmask" in line]


def commands_in_prose(page: Path) -> list[list[str]]:
    """The same of a page's sentences."""
    found = re.findall(r"`freqmask ([a-z][^`]*)`", " ".join(prose(page).split()))
    return [shlex.split(text) for text in found]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What headings are called in links."""
    titles = re.findall(r"^#+ (.*)", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            lost.append(target)
    assert lost == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_picture_has_words_and_is_small(page: Path) -> None:
    for words, target in re.findall(r"!\[(.*?)\]\(([^)\s]+)\)", prose(page)):
        assert len(words) > 20, f"{target} needs an alternative text"
        assert (page.parent / target).stat().st_size < 600_000


def test_the_site_shows_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"^  - .*: ([\w-]+\.md)$", text, re.MULTILINE))
    assert named == {page.name for page in DOCS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one_that_the_parser_takes(page: Path) -> None:
    for words in [*commands(page), *commands_in_prose(page)]:
        name, *rest = words
        if name in ("--help", "--version"):
            continue
        command = COMMANDS[name]
        if command.parts is not None:
            if not rest:
                continue  # the family by its name, in a sentence
            assert rest[0] in command.parts, words
        options = {option_of(word) for word in rest if word.startswith("--")}
        assert options <= options_of(name, rest[0] if command.parts else None), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_in_a_sentence_is_one_of_some_command(page: Path) -> None:
    known = {"help", "version", "completion"}.union(
        *(options_of(name, part) for name, command in COMMANDS.items() for part in command.parts or [None])
    )
    others = r"`(?:python|mkdocs|pip|torchrun) [^`]*`|`--model local-dir:[^`]*`|`--bandwidth`"
    named = re.findall(r"--([a-z][\w-]*)", re.sub(others, "", prose(page)))
    assert {option_of(name) for name in named} - known == set()


def test_every_option_has_a_page() -> None:
    text = " ".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = {option_of(name) for name in re.findall(r"--([a-z][\w-]*)", text)}
    every = {(name, part) for name, command in COMMANDS.items() for part in command.parts or [None]}
    assert {option for command in every for option in options_of(*command)} - named == set()


def option_of(word: str) -> str:
    """An option's name as the signature has it."""
    return re.split(r"[=.]", word.removeprefix("--"))[0].replace("-", "_")


def options_of(name: str, part: str | None = None) -> set[str]:
    """What the command takes with two dashes."""
    known = {option.name for option in declared(load(name, part)).values() if not option.positional}
    return known | ({"help", "print_config"} if "config" in known else {"help"})


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name
)
def test_every_python_snippet_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name in ELSEWHERE:
        assert (ROOT / ELSEWHERE[page.name]).is_file()
        return
    monkeypatch.chdir(tmp_path)
    for snippet in blocks(page, "python"):
        if "local-dir:" in snippet:  # needs a run: the walk below has one
            compile(snippet, page.name, "exec")
        else:
            exec(compile(snippet, page.name, "exec"), {"__name__": "snippet"})


@pytest.mark.slow
@pytest.mark.parametrize("name", WALKS)
def test_the_walk_of_a_newcomer_goes_through(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command of the page, in order, on made-up images, each training cut to two steps."""
    make_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    if name != "index.md":  # where a page leans on runs of the page before
        main(small(["pretrain", "photos", "--out", "runs/mine"]))
    ran = 0
    for words in commands(ROOT / "docs" / name):
        if any(word.startswith("timm:") for word in words) or words == ["pretrain"]:
            continue  # public weights need a network; the first look takes three minutes
        main(small(words))
        ran += 1
        if "--out" in words and "runs/mine" in words and words[0] == "pretrain":
            main(small(["pretrain", "photos", "--seed", "1", "--out", "runs/other"]))
    assert ran > 4
    for snippet in blocks(ROOT / "docs" / name, "python"):
        exec(compile(snippet, name, "exec"), {})


def small(words: list[str]) -> list[str]:
    """The command with its training cut short, its measuring kept to what a few images allow."""
    if words[0] in ("evaluate", "embed"):
        return [*words, "--accelerator", "cpu", "--workers", "0"]
    if words[0] != "pretrain":
        return words
    kept = without(words, "--hours", "--epochs", "--steps", "--batch_size", "--accumulate")
    size = [] if "--image_size" in kept else ["--image_size", "32"]
    return [*kept, *SMALL, *size]


def without(words: list[str], *options: str) -> list[str]:
    """The words without some options and their values."""
    return [
        word
        for number, word in enumerate(words)
        if word not in options and (number == 0 or words[number - 1] not in options)
    ]


def make_images(folder: Path) -> None:
    """photos, labeled: five classes of JPEGs; cells: 16-bit TIFFs; tiles: 12 bands; a table of labels each."""
    draw = np.random.default_rng(0)
    for number in range(60):
        photo = draw.integers(0, 255, (48, 56, 3), dtype=np.uint8)
        for name in ("photos", "labeled"):
            write(folder / name / f"class{number % 5}" / f"{number}.jpg", photo)
        write(folder / "cells" / f"{number}.tif", draw.integers(100, 3000, (96, 96)).astype(np.uint16))
        write(folder / "tiles" / f"{number}.tif", draw.normal(800, 90, (64, 64, 12)).astype(np.float32))
    write(folder / "photo.jpg", photo)
    for table in ("labels.csv", "land_use.csv"):
        rows = [f"{number}.tif,kind{number % 3}" for number in range(60)]
        (folder / table).write_text("\n".join(["path,label", *rows]) + "\n")


def write(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jpg":
        Image.fromarray(pixels).save(path)
    else:
        tifffile.imwrite(
            path, pixels, photometric="minisblack", planarconfig="contig" if pixels.ndim == 3 else None
        )


def test_the_changelog_names_each_kind_of_change_once_a_version_and_each_change_once() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for version in text.split("\n## ")[1:]:
        kinds = re.findall(r"^### (\w+)$", version, re.MULTILINE)
        assert kinds == sorted(
            set(kinds), key=["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"].index
        )
        changes = re.findall(r"^- .*$", version, re.MULTILINE)
        assert [change for change in set(changes) if changes.count(change) > 1] == []
        long = [
            line for line in version.splitlines() if len(line) > 60
        ]  # a paste shows in the lines below, too
        assert len(long) == len(set(long))


def test_every_result_names_the_command_that_measures_it_again() -> None:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    named = set(re.findall(r"python (benchmarks/\w+\.py)", text))
    assert {path for path in named if not (ROOT / path).is_file()} == set()
    there = {path.name for path in (ROOT / "benchmarks" / "results").glob("*.csv")}
    assert there - set(re.findall(r"results/(\w+\.csv)", text)) == set(), (
        "give each a line in docs/results.md"
    )
