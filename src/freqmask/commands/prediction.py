"""What networks with heads say of images: classes as a table, masks as files."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from freqmask.commands.embedding import (
    ComputeConfig,
    FeatureTask,
    compute,
    image_batches,
    plan_parts,
    say_left_out,
)
from freqmask.data.loader import TrainDataset
from freqmask.data.pixels import missing_pixels
from freqmask.data.source import Source
from freqmask.data.transforms import Geometry, resize
from freqmask.data.values import ValueRange
from freqmask.evaluation.mask_files import scaled_size
from freqmask.interop.exporters import Exported, Graph
from freqmask.interop.feature_files import rows_of
from freqmask.interop.models import OpenedClassifier, hash_weights, still_images
from freqmask.training.files import new_folder, open_table, replace_atomically
from freqmask.training.run_folder import RunFolder

_MOST_COLUMNS = 50  # classes whose probabilities all stand in the table


class Classification(FeatureTask):
    """The probability of every class.

    Args:
        opened: the classifier.
        crop: ``center``, of which its own test share is kept, or ``whole``.
    """

    def __init__(self, opened: OpenedClassifier, crop: str) -> None:
        self.opened, self.crop = opened, crop
        self.network = Exported(opened.module, opened.mean, opened.std).eval()

    def describe(self) -> dict[str, Any]:
        names = ("name", "class_names", "input_size", "mean", "std", "value_range", "crop_share")
        settings = {name: getattr(self.opened, name) for name in names}
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        return {**lists, "weights": hash_weights(self.opened.module), "crop": self.crop}

    @property
    def width(self) -> int:
        return len(self.opened.class_names)

    def dataset(self, source: Source) -> TrainDataset:
        return still_images(self.opened, source, self.crop)

    def to(self, device: torch.device) -> None:
        self.network.to(device)

    def compute(self, images: Tensor) -> dict[str, Tensor]:
        return {"features": self.network(images)[0].float().softmax(dim=1)}


def write_classes(
    task: Classification, source: Source, path: Path, config: ComputeConfig, devices: list[torch.device]
) -> int:
    """A table with path, class, its probability and those of all classes where they are few; how many rows."""
    parts = plan_parts(task, source, path)
    compute(task, source, parts, config, devices)
    files, skipped = parts.whole()
    names = task.opened.class_names
    columns = names if len(names) <= _MOST_COLUMNS else ()
    written = 0

    def write(temporary: Path) -> None:
        nonlocal written
        with open_table(temporary, "w") as file:
            table = csv.writer(file)
            table.writerow(["path", "class", "probability", *columns])
            for name, shares in rows_of(files, ("path", "features")):
                best = max(range(len(shares)), key=shares.__getitem__)
                cells = [f"{share:.6g}" for share in [shares[best], *(shares if columns else ())]]
                table.writerow([name, names[best], *cells])
                written += 1

    replace_atomically(path, write)
    parts.remove()
    say_left_out(skipped)
    return written


@dataclass
class Segmenter:
    """A finished segmentation network.

    Attributes:
        network: of images in [0, 1], with normalization inside.
        training: how it was trained.
        labels: of the masks, in the order of the network's outputs.
        names: of the classes.
    """

    network: Any
    training: Any
    labels: tuple[int, ...]
    names: tuple[str, ...]


def open_segmenter(model: str) -> Segmenter | None:
    """The network of a finished segmentation run, or None where MODEL is something else.

    Raises:
        UserError: it is not finished; of a run of 0.1.0, the model that it began from is gone.
    """
    run = RunFolder(Path(model).expanduser())
    config = run.config() if run.exists() else {}
    if config.get("method") != "segment":
        return None
    # here and not above: Lightning comes with it, and classifiers do not wait for it
    from freqmask.evaluation.segmentation_task import open_network

    network, training = open_network(run)
    labels: dict[int, str] = config["classes"]
    return Segmenter(network, training, tuple(map(int, labels)), tuple(map(str, labels.values())))


class _Enlarged(nn.Module):
    """Logits (B, classes, H, W) at the size of the images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor]:
        logits = self.network(images).decoder
        return (F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False),)


def segmentation_graph(segmenter: Segmenter) -> Graph:
    """What ``export`` writes of a segmentation network: logits at the size of the images."""
    training = segmenter.training
    metadata = {
        "class_names": segmenter.names,
        "labels": segmenter.labels,
        "value_range": training.value_range,
        "normalised_inside": True,
    }
    outputs = {"logits": f"(B, {len(segmenter.names)} classes, H, W)"}
    size = (training.channels, training.crop, training.crop)
    return Graph(_Enlarged(segmenter.network), outputs, size, metadata, multiple=32)


class _WholeImages(TrainDataset):
    """An image at the size that the network is given, and its own height and width."""

    shorter_side: Any = None

    def _views(self, picture: Any, keys: Any) -> list[Tensor]:
        window = picture.decode((0, 0, *picture.size))
        image = self._tensor(window, missing_pixels(window, picture.nodata))
        return [resize(image, scaled_size(picture.size, self.shorter_side)), torch.tensor(picture.size)]


def write_masks(
    segmenter: Segmenter,
    source: Source,
    path: Path,
    inference: str,
    config: ComputeConfig,
    device: torch.device,
) -> int:
    """A folder of masks, each as large as its image and with the labels of the training masks; how many.

    Args:
        segmenter: the network.
        source: the images.
        path: the folder, atomic.
        inference: ``windows`` that overlap by a third, or ``whole``.
        config: windows at once, and loader processes.
        device: of torch.
    """
    from freqmask.evaluation.segmentation import Predictor

    training = segmenter.training
    geometry = Geometry(training.crop, crop="whole", horizontal_flip=0.0)
    values = ValueRange.parse(training.value_range) or ValueRange()
    dataset = _WholeImages(source, [geometry], values, training.channels, convert_channels=True)
    dataset.shorter_side = training.image_size
    predictor = Predictor(segmenter.network, training, device, config.batch_size)
    labels = np.array(segmenter.labels, np.uint16 if max(segmenter.labels) > 255 else np.uint8)
    skipped: list[tuple[str, str]] = []
    one = ComputeConfig(batch_size=1, workers=config.workers)  # sizes differ
    with new_folder(path) as folder, torch.inference_mode():
        for batch in image_batches(dataset, source, range(len(source)), one):
            index = int(batch.wanted[0])
            skipped += batch.reasons.items()
            if not batch.is_read[0]:
                continue
            size = tuple(batch.views[1][0].tolist())
            classes, _ = predictor(batch.views[0][0], size, inference)
            target = folder / _mask_name(source.name(index), index, folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels[classes]).save(target)
    say_left_out(skipped)
    return len(source) - len(skipped)


def _mask_name(name: str, index: int, folder: Path) -> str:
    """An image's name as the name of its mask, whatever an archive or a table calls its images."""
    parts = [part for part in Path(name.replace("\\", "/")).parts if part not in ("/", "..", ".")]
    stem = Path(*parts[-2:]).with_suffix("") if parts else Path(str(index))
    plain = "/".join("".join(sign if sign.isprintable() else "_" for sign in part) for part in stem.parts)
    plain = plain.encode("utf-8", "replace").decode("utf-8").replace(":", "_")
    return f"{plain}-{index}.png" if (folder / f"{plain}.png").exists() else f"{plain}.png"
