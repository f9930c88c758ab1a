"""``freqmask info``: what is installed and what it runs on."""

from __future__ import annotations

import os
import re
import sys
from importlib import metadata

from freqmask.commands.given import command
from freqmask.console import say

_LIBRARIES = ("torch", "torchvision", "timm", "lightning", "numpy", "pillow", "tifffile", "matplotlib")
_FOR_DEVELOPERS = ("dev", "docs", "bench")


@command(imports="torch")
def info() -> dict[str, str]:
    """Prints versions, devices, extras and folders: what a bug report should hold.

    Returns:
        One text per line printed, by its title.
    """
    from freqmask import __version__
    from freqmask.data.cache import cache_folder

    python = ".".join(map(str, sys.version_info[:3]))
    facts = {
        "freqmask": __version__,
        "python": python,
        **{name: _version(name) or "missing" for name in _LIBRARIES},
        **_devices(),
        **_extras(),
        "cache folder": str(cache_folder()),
    }
    width = max(map(len, facts))
    for title, text in facts.items():
        say(f"{title:{width}}  {text}")
    return facts


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    import torch

    from freqmask.training.auto import usable_cores

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        gpus.append("Apple GPU (mps)")
    usable, total = usable_cores(), os.cpu_count() or 1
    # the instruction sets that PyTorch uses here; the last two compute bfloat16 fast
    capabilities = [torch.backends.cpu.get_cpu_capability()]
    # Private names of PyTorch's: a version without them just names less.
    for words, question in (("AVX512-bf16", "_is_avx512_bf16_supported"), ("AMX", "_is_amx_tile_supported")):
        if getattr(torch.cpu, question, bool)():
            capabilities.append(words)
    return {
        "cores": f"{usable}" if usable == total else f"{usable} of {total}",
        "cpu": ", ".join(capabilities),
        "gpu": ", ".join(gpus) or "none",
    }


def _extras() -> dict[str, str]:
    """For every extra meant for users: present, or the line that installs it."""
    wanted: dict[str, list[str]] = {}
    for requirement in metadata.requires("freqmask") or []:
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", requirement)
        name = re.match(r"[\w.-]+", requirement)
        if extra and name and extra[1] not in _FOR_DEVELOPERS:
            wanted.setdefault(extra[1], []).append(name[0])
    return {f"extra [{extra}]": _presence(extra, names) for extra, names in wanted.items()}


def _presence(extra: str, names: list[str]) -> str:
    missing = [name for name in names if _version(name) is None]
    if missing:
        return f"without {', '.join(missing)}; pip install 'freqmask[{extra}]'"
    return "present: " + ", ".join(names)
