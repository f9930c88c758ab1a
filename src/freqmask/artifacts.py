"""What freqmask itself has written, so that a run inside its own data folder never takes a preview for an image."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection
from pathlib import Path

MARKER = ".freqmask"
"""The file in a folder that names what freqmask wrote there, a JSON string a line."""
LIKE_DATA = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".npy", ".parquet"})

# Folders that were written before there was a marker, or that somebody copied without it.
_SIGNATURES = (
    {b"config.yaml", b"run.json"},  # a training
    {b"config.yaml", b"metrics.csv"},
    {b"run.lock", b"plan.png"},  # one that was planned only
    {b"config.json", b"model.safetensors"},  # an exported backbone
)
_IN_A_RUN = frozenset({b"plan.png", b"previews", b"backbone", b"checkpoints"})


def mark(path: Path) -> None:
    """Note that we write a file which a source could take for data; a note that fails loses nothing but itself."""
    in_run = any((folder / "run.lock").exists() for folder in (path.parent, path.parent.parent))
    if path.suffix.lower() not in LIKE_DATA or in_run:  # a run's folders are known without a marker
        return
    line = json.dumps(path.name).encode()
    marker = path.parent / MARKER
    with contextlib.suppress(OSError):
        if not marker.exists() or line not in marker.read_bytes().splitlines():
            # Appending a short line is atomic, so two processes may write beside each other.
            with marker.open("ab") as file:
                file.write(line + b"\n")


def marked_in(folder: Path) -> set[str]:
    """The names in a folder of what we wrote there."""
    try:
        return set(map(os.fsdecode, marked((folder / MARKER).read_bytes())))
    except OSError:
        return set()


def marked(marker: bytes) -> set[bytes]:
    """The names in a marker; lines that are not ours count for nothing."""
    names = set()
    for line in marker.splitlines():
        with contextlib.suppress(ValueError):
            name = json.loads(line)
            if isinstance(name, str):
                names.add(os.fsencode(name))
    return names


def is_own_folder(entries: Collection[bytes]) -> bool:
    """Whether the names in a folder are those of a training or of an exported backbone."""
    return any(signature <= set(entries) for signature in _SIGNATURES)


def is_part_of_run(name: bytes) -> bool:
    """Whether an entry of a run folder holds figures or arrays of the run."""
    return name in _IN_A_RUN
