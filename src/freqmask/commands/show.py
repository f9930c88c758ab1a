"""What is here: ``freqmask info`` (versions, devices, extras), ``recipes``, ``runs``, and a ``report`` on runs."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from importlib import metadata
from pathlib import Path
from typing import Literal

from freqmask.commands.command import command
from freqmask.console import say
from freqmask.errors import UserError
from freqmask.imports import uncollected
from freqmask.recipes import read_recipe, recipe_names
from freqmask.training.files import replace_atomically, writing

_LIBRARIES = ("torch", "torchvision", "timm", "lightning", "numpy", "pillow", "tifffile", "matplotlib")
_FOR_DEVELOPERS = ("dev", "docs", "bench")


@command()
def info() -> dict[str, str]:
    """Prints versions, devices, extras and folders: what a bug report should hold.

    Returns:
        One text per line printed, by its title.
    """
    from freqmask import __version__
    from freqmask.data.cache import cache_folder

    extras: dict[str, list[str]] = {}  # those meant for users: what each needs
    for requirement in metadata.requires("freqmask") or []:
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", requirement)
        name = re.match(r"[\w.-]+", requirement)
        if extra and name and extra[1] not in _FOR_DEVELOPERS:
            extras.setdefault(extra[1], []).append(name[0])
    versions = {
        "freqmask": __version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        **{name: _version(name) or "missing" for name in _LIBRARIES},
        **_devices(),
        **{f"extra [{extra}]": _presence(extra, names) for extra, names in extras.items()},
        "cache folder": str(cache_folder()),
    }
    width = max(map(len, versions))
    for title, text in versions.items():
        say(f"{title:{width}}  {text}")
    return versions


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    with uncollected():
        import torch

        from freqmask.training.auto import bf16_gain, usable_cores

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        gpus.append("Apple GPU (mps)")
    usable, total = usable_cores(), os.cpu_count() or 1
    return {
        "cores": f"{usable}" if usable == total else f"{usable} of {total}",
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}; bf16 {bf16_gain():.2g} times as fast as float32",
        "gpu": ", ".join(gpus) or "none",
    }


def _presence(extra: str, names: list[str]) -> str:
    """Whether all of an extra is there, else the line that installs it."""
    missing = [name for name in names if _version(name) is None]
    if missing:
        return f"without {', '.join(missing)}; pip install 'freqmask[{extra}]'"
    return "present: " + ", ".join(names)


@command()
def recipes(name: str | None = None, *, copy: str | None = None) -> list[str] | str | Path:
    """Lists the shipped recipes, shows one, or copies one for you to change.

    A recipe is a YAML file of options of ``pretrain``: the published rows of both papers and small ones
    for 32-, 64- and 128-pixel images. Its first line says what it costs and whether we ran it ourselves.
    Run one with ``freqmask pretrain DATA --config NAME``.

    Args:
        name: the recipe to show; without a name all are listed.
        copy: where the recipe is copied to: a file that does not exist yet, or a folder.

    Returns:
        The names, or the text of the recipe shown, or the path of the copy.

    Raises:
        UserError: no recipe of that name, ``copy`` without a name, or the file exists already.
    """
    if name is None:
        if copy is not None:
            raise UserError(f"--copy ({copy}) needs the name of a recipe; `freqmask recipes` lists them")
        names = recipe_names()
        width = max(map(len, names))
        for recipe in map(read_recipe, names):
            say(f"{recipe.name:{width}}  {recipe.state}")
            say(textwrap.indent(textwrap.fill(recipe.cost, 98 - width), " " * (width + 2)))
        say("\nfreqmask recipes NAME shows one; freqmask recipes NAME --copy FILE copies it;")
        say("freqmask pretrain DATA --config NAME (or FILE) runs it.")
        return names
    recipe = read_recipe(name)
    if copy is None:
        say(recipe.text.rstrip())
        return recipe.text
    target = Path(copy).expanduser()
    if target.is_dir():
        target = target / recipe.path.name
    if target.exists():  # it may hold somebody's changes
        raise UserError(f"--copy ({target}) exists already; name another file")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(recipe.text)
    say(f"{target} holds the recipe; run it with: freqmask pretrain DATA --config {target}")
    return target


@command()
def report(
    run: list[str],
    *,
    out: str | None = None,
    table: Literal["md", "csv", "latex"] | None = None,
    results: list[str] | None = None,
    no_images: bool = False,
) -> Path | str:
    """Writes one HTML page on one or several runs, or a table of them.

    The page opens from the disk without a network: what was run, its curves, its previews by step, skipped
    images, every evaluation. Several runs are overlaid and the settings in which they differ listed. It may be
    written while a run is being trained. The table joins runs that differ in their seed only into mean and
    standard deviation, names the settings that vary, and puts the evaluations beside them.

    Args:
        run: run folders, or a folder that holds them.
        out: the file to write. The page goes to RUN/report.html, or report.html here where there are several
            runs; a table is printed.
        table: a table instead of the page: md (Markdown), csv or latex.
        results: further results.csv, of models that are no runs: raw pixels, random or public weights.
        no_images: leave previews and the picture of the inputs out, for those who may not share them. Names of
            files stay.

    Returns:
        The path of the page; of a table its path, or its text where there is no ``out``.

    Raises:
        UserError: no run where one was named.
    """
    if table is None:
        from freqmask.reporting.page import write_report

        path = write_report(run, out, images=not no_images, results=results or [])
        say(f"{path}    ({path.stat().st_size / 1e6:.1f} MB; open it in a browser)")
        return path
    from freqmask.reporting.reading import read_results, read_runs
    from freqmask.reporting.tables import FORMS, join_seeds

    text = FORMS[table](join_seeds(read_runs(run), read_results(results or [])))
    if out is None:
        say(text)
        return text
    path = Path(out).expanduser()
    content = (text + "\n").encode("utf-8", "surrogateescape")  # a name that is no UTF-8, as the disk has it
    replace_atomically(path, lambda temporary: temporary.write_bytes(content))
    say(out)
    return path


@command()
def runs(folder: str = "runs") -> list[str]:
    """Lists runs: state, method, steps, time, loss, best probe.

    Args:
        folder: where the run folders are.

    Returns:
        The names of the runs.

    Raises:
        UserError: the folder does not exist or holds no run.
    """
    from freqmask.reporting.tables import list_runs, table_lines

    found = list_runs(Path(folder).expanduser())
    say("\n".join(table_lines(found)))
    return [run.name for run in found]
