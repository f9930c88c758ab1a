"""A model that sees corrupted images: what `compute_features` needs to measure, and cache, a corruption."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from freqmask.data.dataset import Sample, TrainDataset
from freqmask.data.sampler import Item
from freqmask.data.sources import Source
from freqmask.draws import sample_key
from freqmask.evaluation.corruptions import Corruption
from freqmask.evaluation.subjects import Subject


class CorruptedDataset(TrainDataset):
    """A dataset whose images are corrupted in the loader's workers, after they are cut to the model's size.

    The draws follow from the identity of the image alone: every model of one size sees the same images.

    Args:
        dataset: of the clean images, one view each.
        corruption: what is done to them.
    """

    def __init__(self, dataset: TrainDataset, corruption: Corruption) -> None:
        super().__init__(
            dataset.source,
            dataset.geometries,
            dataset.value_range,
            dataset.channels,
            dataset.convert_channels,
            dataset.seed,
        )
        self.corruption = corruption
        corruption.warm(self.geometries[0].size)

    def __getitem__(self, item: Item) -> Sample:
        """The sample of an item, its view corrupted."""
        sample = super().__getitem__(item)
        key = sample_key(0, 0, self.source.identity(sample.index))
        sample.views = [self.corruption(view, key) for view in sample.views]
        return sample


class CorruptedSubject(Subject):
    """A begun subject that is shown corrupted images.

    Args:
        subject: the model.
        corruption: what is done to its images.
    """

    def __init__(self, subject: Subject, corruption: Corruption) -> None:
        self.subject, self.corruption = subject, corruption
        self.text, self.name, self.kind = subject.text, subject.name, subject.kind
        self.results = subject.results

    def key(self) -> dict[str, Any]:
        """The model's, and the corruption."""
        return {**self.subject.key(), "corruption": self.corruption.describe()}

    def dataset(self, source: Source) -> TrainDataset:
        """The images as the model sees them, corrupted."""
        return CorruptedDataset(self.subject.dataset(source), self.corruption)

    def features(self, images: Tensor, what: str) -> dict[str, Tensor]:
        """The model's."""
        return self.subject.features(images, what)

    def begin(self, train: Source, device: torch.device) -> None:
        """The model has begun."""
