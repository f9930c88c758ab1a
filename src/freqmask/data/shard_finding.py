"""The index of some shards: that beside them, that in the cache, or a new one from their headers."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from freqmask.console import say
from freqmask.data.cache import cache_file
from freqmask.data.shard_files import ShardFiles
from freqmask.data.shard_index import (
    INDEX_NAME,
    VERSION,
    ShardIndex,
    load_index,
    make_index,
)
from freqmask.data.shard_joining import join_indexes, with_folder_classes
from freqmask.data.tar_headers import read_headers
from freqmask.errors import UserError

SPOKEN_BYTES = 1_000_000_000  # reading the headers of more than this takes long enough to be told
HEADER_READERS = 8


def find_index(files: ShardFiles, names: Sequence[str] | None, where: str) -> ShardIndex:
    """The index beside the shards, that in the cache, or a new one from their headers.

    Args:
        files: where they lie.
        names: which of them; None for all.
        where: DATA as it was typed.
    """
    beside = _index_beside(files, names, where)
    if beside is not None:
        return beside
    listed = files.names() if names is None else list(names)
    if not listed:
        raise UserError(f"DATA ({where}) holds no .tar; check its spelling, or name the shards")
    try:
        states = [files.state(name) for name in listed]
    except FileNotFoundError as error:
        raise UserError(
            f"DATA ({where}): the shard {error.filename or error} is not there; check it"
        ) from error
    cached = cache_file("shards", VERSION, files.where, list(zip(listed, states, strict=True)))
    try:
        return load_index(cached)
    except ValueError:
        index = with_folder_classes(join_indexes(_read_all_headers(files, listed)))
    if index.save(cached):
        index.file = cached
    return index


def _index_beside(files: ShardFiles, names: Sequence[str] | None, where: str) -> ShardIndex | None:
    """The index that was written with the shards, where it fits them."""
    file = files.index_file()
    if file is None:
        return None
    try:
        index = load_index(file)
    except ValueError as error:
        raise UserError(
            f"DATA ({where}): its {INDEX_NAME} is damaged, or was written by another version; write it again, or "
            "delete it to have it made anew"
        ) from error
    sizes = {name: size for name, size, _ in index.shards}
    if names is not None and not set(names) <= set(sizes):
        return None
    for name in () if files.remote else names or sizes:  # asking a server for each would take long
        try:
            there = files.size(name)
        except FileNotFoundError as error:
            raise UserError(
                f"DATA ({where}) lacks the shard {name}, which its {INDEX_NAME} lists; fetch it, or name those "
                "that are there by a pattern"
            ) from error
        if there != sizes[name]:
            raise UserError(
                f"DATA ({where}): the shard {name} has {there:,} bytes, not the {sizes[name]:,} of its "
                f"{INDEX_NAME}; fetch it again, or delete {INDEX_NAME} to have it made anew"
            )
    return index


def _read_all_headers(files: ShardFiles, names: Sequence[str]) -> list[ShardIndex]:
    """What the headers of each shard tell, in their order."""
    sizes = [files.size(name) for name in names]
    if files.remote or sum(sizes) > SPOKEN_BYTES:
        say(f"index       reading the headers of {len(names):,} shards of {files.where}, once")

    def read(name: str, size: int) -> ShardIndex:
        with files.stream(name) as file:
            return make_index([read_headers(name, file, size)])

    with ThreadPoolExecutor(HEADER_READERS) as pool:
        return list(pool.map(read, names, sizes))
