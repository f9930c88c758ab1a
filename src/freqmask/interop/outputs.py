"""Where interop writes: a file or a folder that is whole or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from freqmask.errors import UserError
from freqmask.training.files import check_writable


def check_out(out: str | Path, overwrite: bool, *, folder: bool) -> Path:
    """The path to write, refused where something would be lost.

    Args:
        out: where to write.
        overwrite: True lets go what is there.
        folder: whether a folder is written, or a file.

    Raises:
        UserError: it exists, or cannot be written.
    """
    path = Path(out).expanduser()
    if path.exists() and folder != path.is_dir():
        raise UserError(f"out ({out}) is a {'file' if folder else 'folder'}; give another --out")
    if path.exists() and not overwrite and (not folder or any(path.iterdir())):
        raise UserError(f"out ({out}) exists already; give another --out, or --overwrite")
    check_writable(path, folder=folder)
    return path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A scratch folder that takes the place of ``path`` at the end, unless something goes wrong before.

    Args:
        path: what it becomes; an old folder there is replaced whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield scratch
        scratch.chmod(0o777 & ~_umask())
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            path.replace(old / "old")
            scratch.replace(path)
            shutil.rmtree(old)
        else:
            scratch.replace(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
