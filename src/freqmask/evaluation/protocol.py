"""What a protocol is given and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from freqmask.evaluation.features import FeatureTable, ImageChange, Place, compute_features
from freqmask.evaluation.labelled import LabelledData, Round, subset
from freqmask.evaluation.subjects import Subject


@dataclass
class Bench:
    """A model and the images it is measured on; features are computed when they are first asked for.

    Attributes:
        subject: the model.
        data: images, labels, parts.
        place: where features are computed.
    """

    subject: Subject
    data: LabelledData
    place: Place
    _tables: dict[str, FeatureTable] = field(default_factory=dict)

    def table(self, what: str) -> FeatureTable:
        """Features of all images: of the ``end``, or of the ``blocks`` inside."""
        if what not in self._tables:
            self._tables[what] = compute_features(self.subject, self.data.source, what, self.place)
        return self._tables[what]

    def end(self, feature: str) -> np.ndarray:
        """The last features (image, dim): ``mean``, or ``class_token`` where the model has one."""
        values = self.table("end").values
        return (
            values["end/token"] if feature == "class_token" and "end/token" in values else values["end/mean"]
        )

    def inside(self) -> dict[str, np.ndarray]:
        """All features by name, of the end and of the blocks inside."""
        found = dict(self.table("end").values)
        if getattr(self.subject, "blocks", None):
            found |= self.table("blocks").values
        return found

    def changed(self, images: np.ndarray, change: ImageChange, name: str) -> FeatureTable:
        """The last features of some images after something was done to them."""
        return compute_features(self.subject, subset(self.data, images), "end", self.place, change, name)

    def tensor(self, values: np.ndarray, images: np.ndarray) -> Tensor:
        """The features of some images on the device."""
        return torch.from_numpy(np.ascontiguousarray(values[images])).to(self.place.device)

    def labels(self, images: np.ndarray) -> Tensor:
        """The classes of some images on the device."""
        return torch.from_numpy(self.data.labels[images]).to(self.place.device)

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(self.data.class_names)

    def groups(self, images: np.ndarray) -> list[str | None] | None:
        """The groups of some images."""
        return None if self.data.groups is None else [self.data.groups[int(index)] for index in images]


@dataclass
class Outcome:
    """One answer to a round.

    Attributes:
        predicted: (test,) class of each test image.
        chosen: what was chosen on a held-out part of the training images.
        learnt_from: images that the head learnt from.
    """

    predicted: Int64[np.ndarray, " test"]
    chosen: str = ""
    learnt_from: int = 0


@dataclass(frozen=True)
class Heading:
    """What tables and pictures say of a way to judge.

    Attributes:
        name: of the command.
        title: above its table.
        headline: the variant whose interval and further scores the table shows.
    """

    name: str
    title: str
    headline: str


class Protocol(ABC):
    """A way to judge frozen features.

    Attributes:
        name: of the command.
        title: above its table.
        seeded: whether its result depends on the seed, the model being the same.
        headline: the variant whose interval and further scores the table shows.
        inside: whether it reads the blocks inside, too.
    """

    inside = False

    name: str
    title: str
    seeded: bool
    headline: str

    @abstractmethod
    def run(self, bench: Bench, one: Round, seed: int) -> dict[str, Outcome]:
        """Learn from the round's training images and answer for its test images, once a variant."""
