"""Images with their masks as a source."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Shaped

from freqmask.data.folder import FolderSource
from freqmask.data.index import FolderIndex, index_folder
from freqmask.data.pictures import Box, Picture
from freqmask.data.sources import Pages, Source, SourceSummary
from freqmask.errors import UserError
from freqmask.evaluation.segmentation.layout import Part, match_masks
from freqmask.evaluation.segmentation.masks import MASK_SUFFIXES, read_mask


@dataclass
class PairedPicture(Picture):
    """An image that knows its mask.

    Args:
        picture: the image.
        mask_path: file of the mask.
    """

    picture: Picture
    mask_path: Path

    def __post_init__(self) -> None:
        self.size, self.channels = self.picture.size, self.picture.channels
        self.dtype, self.nodata = self.picture.dtype, self.picture.nodata

    def decode(
        self, box: Box | None = None, at_least: tuple[int, int] | None = None
    ) -> Shaped[np.ndarray, "channel height width"]:
        return self.picture.decode(box, at_least)

    def mask(self) -> Int32[np.ndarray, "height width"]:
        """The labels of all pixels."""
        return read_mask(self.mask_path)


class PairSource(Source):
    """The images of a folder with the masks of another.

    Args:
        part: the folders.
        pages: what the pages of a TIFF are; one mask belongs to one file.

    Raises:
        UserError: a folder is empty, or a file has no partner.
    """

    def __init__(self, part: Part, pages: Pages = "channels") -> None:
        self.part = part
        self.images = FolderSource(part.images, pages)
        self.masks: FolderIndex = index_folder(part.masks, MASK_SUFFIXES)
        if len(self.masks) == 0:
            ignored = ", ".join(self.masks.ignored) or "nothing"
            raise UserError(
                f"masks ({part.masks}) must hold files of {', '.join(sorted(MASK_SUFFIXES))} with one class "
                f"number a pixel; it holds {ignored}"
            )
        same = part.images.resolve() == part.masks.resolve()
        if same:
            raise UserError(f"images and masks ({part.images}) must be two folders")
        names = [self.images.index.relative(number) for number in range(len(self.images))]
        masks = [self.masks.relative(number) for number in range(len(self.masks))]
        self.mask_numbers = match_masks(names, masks, part)

    def __len__(self) -> int:
        return len(self.images)

    def mask_path(self, index: int) -> Path:
        """The file of an image's mask."""
        return self.masks.path(self.mask_numbers[index])

    def open(self, index: int) -> Picture:
        return PairedPicture(self.images.open(index), self.mask_path(index))

    def name(self, index: int) -> str:
        name = self.images.name(index)
        return f"{self.part.name}/{name}" if self.part.name else name

    def fingerprint(self) -> str:
        both = f"{self.images.fingerprint()} {self.masks.fingerprint}"
        return hashlib.blake2b(both.encode(), digest_size=8).hexdigest()

    def summary(self) -> SourceSummary:
        whole = self.images.summary()
        return SourceSummary("images with masks", whole.found, len(self), whole.ignored, whole.notes)
