"""Identical images: within a data set, and between test images and those of a pre-training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from freqmask.data.cache import bytes_of, cache_file, read_arrays, write_arrays
from freqmask.data.source import Source
from freqmask.data.sources import open_source
from freqmask.data.splits import hold_out
from freqmask.errors import BadImage, UserError
from freqmask.imports import NotNamedError, named_by_user
from freqmask.training.run_folder import RunFolder

_AT_LEAST = (64, 64)  # a large JPEG is decoded reduced: the same file gives the same pixels, only sooner
MOST_COMPARED = 200_000  # images of a pre-training; beyond it a look at all of them would take hours


def pixel_hashes(source: Source, indices: Iterable[int] | None = None) -> list[int]:
    """A 64-bit number of the pixels of each image, or of some: the same for identical images, whatever they are called.

    All images of a source are hashed once and cached by the source's fingerprint; those that cannot be read each have
    a number of their own.
    """
    file = cache_file("pixels", source.fingerprint(), len(source))
    cached = read_arrays(file)
    if cached is None:
        hashes = np.array([_pixel_hash(source, index) for index in range(len(source))], np.int64)
        write_arrays(file, {}, {"hashes": hashes})
    else:
        hashes = cached[1]["hashes"]
    chosen = hashes if indices is None else hashes[np.asarray(list(indices), np.int64)]
    return [int(value) for value in chosen]


def _pixel_hash(source: Source, index: int) -> int:
    digest = hashlib.blake2b(digest_size=8)
    try:
        picture = source.open(index)
        image = picture.decode(None, _AT_LEAST)
    except UserError:
        raise
    except (BadImage, Exception):  # decoders raise anything on broken files
        digest.update(f"unreadable {index}".encode())
    else:
        digest.update(f"{picture.size} {image.shape} {image.dtype}".encode())
        digest.update(bytes_of(image))
    return int.from_bytes(digest.digest(), "little", signed=True)


def seen_in_pretraining(run: Path, source: Source, tested: np.ndarray) -> str:
    """A sentence on how many test images a run was pre-trained on.

    Args:
        run: a run folder; its config names what it was trained on.
        source: the images of the evaluation.
        tested: which of them are test images.
    """
    config = RunFolder(run).config()
    data = config.get("data") or []
    try:
        with named_by_user((), run / "config.yaml"):
            trained = open_source(
                data, pages=config.get("pages", "channels"), split=config.get("split", "auto")
            )
    except NotNamedError as error:
        return f"{run.name}: its pre-training images were not compared with the test images: {error}"
    except UserError:
        return f"{run.name}: its pre-training images ({data}) are no longer there to be compared with the test images"
    if len(trained) > MOST_COMPARED:
        return f"{run.name}: {len(trained):,} pre-training images are too many to be compared with the test images"
    used = None if config.get("overfit") else hold_out(trained, seed=int(config.get("seed", 0)))[0]
    known = set(pixel_hashes(trained, used))
    count = sum(value in known for value in pixel_hashes(source, tested))
    return f"{run.name}: pre-trained on {count:,} of the {len(tested):,} test images (labels unseen)"
