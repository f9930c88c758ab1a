"""Images stacked in one numpy file: ``.npy``, or ``.npz`` with labels and splits."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from freqmask.data.cache import hash_of
from freqmask.data.pixels import ArrayPicture, Picture
from freqmask.data.source import Source
from freqmask.data.splits import Located, number_classes, split_of
from freqmask.data.storage import LocalFiles
from freqmask.errors import BadImage, UserError, brief, nearest

IMAGE_KEYS = ("images", "image", "x", "data", "arr_0")
LABEL_KEYS = ("labels", "label", "y", "targets", "arr_1")


def locate_array(path: Path) -> Located:
    """The images of a ``.npy`` or ``.npz`` file.

    A ``.npy`` is (image, height, width[, channel]) or (image, channel, height, width). A ``.npz`` has such an array
    as ``images`` (or x, data) and labels as ``labels`` (or y), each also with the name of a split before or after it
    (``train_images``, ``x_test``). A UserError where it is damaged, needs code to be run, or holds no images.
    """
    if path.suffix.lower() == ".npy":
        return Located(str(path), lambda split, notes: ArraySource(path, [(None, None)]))
    pairs = _find_pairs(_npz_shapes(path), path)

    def open_split(split: str | None, notes: list[str]) -> Source:
        return ArraySource(path, list(pairs.values()) if split is None else [pairs[split]], split, notes)

    return Located(str(path), open_split, [name for name in pairs if name])


def _npz_shapes(path: Path) -> dict[str, int]:
    """Name of each array of a ``.npz`` -> its number of axes; pixels are not read."""
    axes = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    old = np.lib.format.read_magic(file) == (1, 0)
                    read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
                    axes[member.removesuffix(".npy")] = len(read(file)[0])
    except Exception as error:  # of zipfile, of the file system, of numpy's header
        raise UserError(f"DATA ({path}) is damaged or no numpy archive ({error}); write it again") from error
    return axes


def _find_pairs(axes: dict[str, int], path: Path) -> dict[str, tuple[str, str | None]]:
    """Split (or "") -> the names of its images and its labels."""
    images: dict[str, str] = {}
    labels: dict[str, str] = {}
    for key, count in axes.items():
        words = key.lower().split("_") if key.lower() not in (*IMAGE_KEYS, *LABEL_KEYS) else [key.lower()]
        split = next((word for word in words if split_of(word)), "")
        kind = "_".join(word for word in words if word != split)
        if kind in IMAGE_KEYS and count in (3, 4):
            images.setdefault(split, key)
        elif kind in LABEL_KEYS:
            labels.setdefault(split, key)
    if not images:
        hint = nearest("images", axes)
        raise UserError(f"DATA ({path}) must hold images of 3 or 4 axes under the name images or x; {hint}")
    return {split: (key, labels.get(split)) for split, key in images.items()}


class ArraySource(Source):
    """Images stacked along the first axis of one or several arrays of a file.

    A ``.npy`` is mapped, a ``.npz`` read whole, in each process at its first image. ``pairs`` are the names of
    the arrays of images and of labels, one pair of None for a ``.npy``; ``split`` goes into the images' names.
    """

    kind = "numpy array"

    def __init__(
        self,
        path: Path,
        pairs: list[tuple[str | None, str | None]],
        split: str | None = None,
        notes: list[str] | None = None,
    ) -> None:
        self.file, self.pairs, self.notes = path, pairs, notes or []
        self.split = split
        self._files = LocalFiles(path.parent)
        self._state = self._files.state(path.name)
        self._stacks: list[np.ndarray] | None = None
        stacks = self._load()
        self._starts = np.cumsum([0, *(len(stack) for stack in stacks)])
        if len(self) == 0:
            raise UserError(f"DATA ({path}) holds no images; its array has the shape {stacks[0].shape}")
        labels = self._load_labels()
        if labels is not None:
            self._labels, self.class_names = number_classes(labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stacks": None}  # each process maps or reads the file itself

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _load(self) -> list[np.ndarray]:
        """The stacks of images, read once a process."""
        if self._stacks is None:
            stacks = [_read(self.file, images) for images, _ in self.pairs]
            for stack in stacks:
                if stack.ndim not in (3, 4) or stack.dtype.kind not in "biuf":
                    raise UserError(
                        f"DATA ({self.file}) must be numbers of the shape (image, height, width) or "
                        f"(image, height, width, channel), not {stack.dtype} of {stack.shape}; "
                        "a single image goes into a folder"
                    )
            self._stacks = stacks
        return self._stacks

    def _load_labels(self) -> list[int] | None:
        """All labels, or None where they are missing, of several columns or not counted from 0."""
        parts = [_read(self.file, labels) for _, labels in self.pairs if labels is not None]
        if len(parts) < len(self.pairs):
            return None
        usable = all(
            part.shape[:1] == (part.size,) and part.dtype.kind in "iu" and part.min(initial=0) >= 0
            for part in parts
        )
        if not usable or sum(part.size for part in parts) != len(self):
            note = f"The labels in {self.file.name} are not one class number an image and are left out."
            self.notes = [*self.notes, note]
            return None
        return [label for part in parts for label in part.ravel().tolist()]

    def open(self, index: int) -> Picture:
        self.check(index)
        self._files.refuse_changed(self.file.name, self._state)
        stack = int(np.searchsorted(self._starts, index, side="right")) - 1
        try:
            image = self._load()[stack][index - int(self._starts[stack])]
        except OSError as error:
            raise BadImage(f"{self.file.name} can no longer be read ({error.strerror})") from error
        return ArrayPicture(image)

    def name(self, index: int) -> str:
        return f"{self.split}-{index}" if self.split else str(index)

    def fingerprint(self) -> str:
        """A hash of the first and last bytes of every array and their shapes."""
        parts: list[str | np.ndarray] = []
        for stack in self._load():
            parts += [f"{stack.shape}{stack.dtype}", stack[:1], stack[len(stack) // 2 :][:1], stack[-1:]]
        return hash_of(*parts)


def _read(path: Path, key: str | None) -> np.ndarray:
    """One array of a file; objects, which would run code, are refused."""
    try:
        if key is None:
            array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
            return np.asarray(array)  # a plain view: np.memmap is slow to index
        with np.load(path, allow_pickle=False) as archive:
            return archive[key]
    except PermissionError as error:
        raise UserError(f"DATA ({path}) may not be read: no permission; check its access rights") from error
    except Exception as error:  # numpy parses headers as Python, and hands on whatever that raises
        raise UserError(
            f"DATA ({path}) must be a plain numpy array ({brief(error, 100)}); write it again"
        ) from error
