"""``freqmask predict``: what a fine-tuned classifier or a segmentation network says of images."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from freqmask.commands.given import command
from freqmask.console import say
from freqmask.errors import UserError
from freqmask.options import Auto

if TYPE_CHECKING:
    import torch

    from freqmask.data.source import Source
    from freqmask.interop.models import OpenedClassifier

_MOST_COLUMNS = 50  # classes whose probabilities all stand in the table


@command()
def predict(
    model: str,
    data: list[str],
    *,
    out: str,
    crop: Literal["center", "whole"] = "center",
    inference: Literal["windows", "whole"] = "windows",
    pages: Literal["channels", "images"] = "channels",
    split: str = "all",
    batch_size: int | Auto = "auto",
    workers: int | Auto = "auto",
    accelerator: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Writes what a classifier or a segmentation network says of images: classes as CSV, masks as PNG.

    Classifiers are those that freqmask evaluate finetune left, exported folders with a head, and timm:NAME. A
    table has the columns path, class and probability, and of up to 50 classes the probability of each. A mask
    is as large as its image and holds the labels of the training masks.

    Args:
        model: the run of a fine-tuning or of a segmentation, an exported folder with a head, or timm:NAME.
        data: folders or files of images, as for pretrain.
        out: a .csv file for classes, a folder for masks.
        crop: of a classifier: center takes the centered square, whole the whole image, distorted to a square.
        inference: of a segmentation network: overlapping windows as large as its training samples, or the
            whole image in one piece.
        pages: what the pages of a TIFF are.
        split: all, auto or the name of a split.
        batch_size: images, or windows, at once.
        workers: processes that read images.
        accelerator: auto, cpu, cuda or mps.
        overwrite: replace what is at out.

    Returns:
        The table, or the folder of masks.

    Raises:
        UserError: the model has no head, the data cannot be opened, or out cannot be written.
    """
    from freqmask.commands.embedding import choose_place
    from freqmask.data.sources import open_source
    from freqmask.interop.models import open_classifier
    from freqmask.interop.outputs import check_out

    segmenter = open_segmenter(model)
    classifier = None if segmenter is not None else open_classifier(model)
    if segmenter is None and classifier is None:
        raise UserError(
            f"model ({model}) has no head to predict with; freqmask evaluate finetune or segment trains one"
        )
    path = check_out(out, overwrite, folder=segmenter is not None)
    if classifier is not None and path.suffix != ".csv":
        raise UserError(f"out ({out}) must end in .csv; try --out {path.with_suffix('.csv')}")
    source = open_source([data] if isinstance(data, str) else data, pages=pages, split=split)
    place, devices = choose_place(batch_size, workers, accelerator, 1)
    if segmenter is not None:
        written = _write_masks(segmenter, source, path, inference, place, devices[0])
    else:
        assert classifier is not None
        written = _write_classes(classifier, source, path, crop, place, devices[0])
    say(f"predicted   {path}: {written:,} of {len(source):,} images, {model}")
    return path


def _write_classes(
    opened: OpenedClassifier, source: Source, path: Path, crop: str, place: Any, device: torch.device
) -> int:
    import torch

    from freqmask.data.loader import TrainDataset
    from freqmask.data.transforms import Geometry
    from freqmask.data.values import ValueRange
    from freqmask.images import as_float
    from freqmask.interop.formats import Exported
    from freqmask.training.files import replace_atomically

    share = opened.crop_share if crop == "center" else 1.0
    geometry = Geometry(opened.input_size[1:], crop=crop, horizontal_flip=0.0, center_share=share)
    values = ValueRange.parse(opened.value_range) or ValueRange()
    dataset = TrainDataset(source, [geometry], values, opened.input_size[0], convert_channels=True)
    network = Exported(opened.module, opened.mean, opened.std).to(device).eval()
    names = opened.class_names
    columns = names if len(names) <= _MOST_COLUMNS else ()
    written = 0

    def write(temporary: Path) -> None:
        nonlocal written
        with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            table = csv.writer(file)
            table.writerow(["path", "class", "probability", *columns])
            for indices, views in _batches(dataset, source, place):
                with torch.inference_mode():
                    shares = network(as_float(views[0].to(device)))[0].float().softmax(dim=1).cpu()
                for index, row in zip(indices, shares.tolist(), strict=True):
                    if index is not None:
                        best = max(range(len(row)), key=row.__getitem__)
                        cells = [f"{share:.6g}" for share in ([row[best], *row] if columns else [row[best]])]
                        table.writerow([source.name(index), names[best], *cells])
                        written += 1

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(path, write)
    return written


@dataclass
class Segmenter:
    """A finished segmentation network.

    Attributes:
        network: of images in [0, 1], with normalisation inside.
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
        UserError: it is not finished, or the model that it began from is gone.
    """
    from freqmask.training.run_folder import RunFolder

    run = RunFolder(Path(model).expanduser())
    config = run.config() if run.exists() else {}
    if config.get("method") != "segment":
        return None
    from safetensors.torch import load_file

    from freqmask.evaluation.segmentation.segmentation_plan import training_of
    from freqmask.evaluation.segmentation.segmentation_task import NETWORK
    from freqmask.evaluation.segmentation.upernet import UperNet
    from freqmask.interop.models import open_model

    if not (run.path / NETWORK).is_file():
        raise UserError(f"model ({model}) has no network yet; its command goes on to the end")
    training, classes = training_of(config), config["classes"]
    wishes = {"drop_path_rate": 0.0, "dynamic_img_size": True}
    try:
        opened = open_model(config["model"], image_size=training.crop, wishes=wishes)
    except UserError as error:
        raise UserError(
            f"model ({model}) was built on {config['model']}, whose architecture is needed: {error}"
        ) from error
    network = UperNet(opened, len(classes), training.decoder_channels)
    network.load_state_dict(load_file(run.path / NETWORK))
    names = tuple(str(name) for name in classes.values())
    return Segmenter(network.eval(), training, tuple(int(label) for label in classes), names)


def segmentation_graph(segmenter: Segmenter) -> Any:
    """What ``export`` writes of a segmentation network: logits at the size of the images."""
    import torch
    import torch.nn.functional as F

    from freqmask.interop.formats import Graph

    class Enlarged(torch.nn.Module):
        """Logits (B, classes, H, W)."""

        def __init__(self) -> None:
            super().__init__()
            self.network = segmenter.network

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            logits = self.network(images).decoder
            return (F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False),)

    training = segmenter.training
    return Graph(
        Enlarged(),
        {"logits": f"(B, {len(segmenter.names)} classes, H, W)"},
        (training.channels, training.crop, training.crop),
        {
            "class_names": segmenter.names,
            "labels": segmenter.labels,
            "value_range": training.value_range,
            "normalised_inside": True,
        },
        32,
    )


def _write_masks(
    segmenter: Segmenter, source: Source, path: Path, inference: str, place: Any, device: torch.device
) -> int:
    import numpy as np
    import torch
    from PIL import Image

    from freqmask.data.loader import TrainDataset
    from freqmask.data.transforms import Geometry, resize
    from freqmask.data.values import ValueRange
    from freqmask.evaluation.segmentation.crops import scaled_size
    from freqmask.evaluation.segmentation.inference import Predictor
    from freqmask.interop.outputs import new_folder

    training = segmenter.training

    class WholeImages(TrainDataset):
        """An image at the size that the network is given, and its own height and width."""

        def _views(self, picture: Any, keys: Any) -> list[torch.Tensor]:
            window = picture.decode((0, 0, *picture.size))
            from freqmask.data.pixels import missing_pixels

            image = self._tensor(window, missing_pixels(window, picture.nodata))
            size = scaled_size(picture.size, training.image_size)
            return [resize(image, size), torch.tensor(picture.size)]

    values = ValueRange.parse(training.value_range) or ValueRange()
    whole = Geometry(training.crop, crop="whole", horizontal_flip=0.0)
    dataset = WholeImages(source, [whole], values, training.channels, convert_channels=True)
    stride = max(1, round(training.crop * 2 / 3))
    predictor = Predictor(segmenter.network, training, device, stride, place.batch_size)
    labels = np.array(segmenter.labels, np.uint16 if max(segmenter.labels) > 255 else np.uint8)
    place.batch_size, written = 1, 0
    with new_folder(path) as folder, torch.inference_mode():
        for (index,), views in _batches(dataset, source, place):
            if index is None:
                continue
            size = tuple(views[1][0].tolist())
            classes, _ = predictor(views[0][0], size, inference)
            target = folder / _mask_name(source.name(index), index, folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels[classes]).save(target)
            written += 1
    return written


def _mask_name(name: str, index: int, folder: Path) -> str:
    """An image's name as the name of its mask, whatever an archive or a table calls its images."""
    parts = [part for part in Path(name.replace("\\", "/")).parts if part not in ("/", "..", ".")]
    stem = Path(*parts[-2:]).with_suffix("") if parts else Path(str(index))
    plain = "/".join("".join(sign if sign.isprintable() else "_" for sign in part) for part in stem.parts)
    plain = plain.encode("utf-8", "replace").decode("utf-8").replace(":", "_")
    taken = (folder / f"{plain}.png").exists()
    return f"{plain}-{index}.png" if taken else f"{plain}.png"


def _batches(
    dataset: Any, source: Source, place: Any
) -> Iterator[tuple[list[int | None], list[torch.Tensor]]]:
    """Indices of the images, None where another stands in for one that cannot be read, and the views."""
    from freqmask.data.loader import make_loader
    from freqmask.data.sampler import OrderedSampler

    asked = 0
    for batch in make_loader(dataset, OrderedSampler(len(source)), place.batch_size, place.workers):
        found = batch["indices"].tolist()
        yield [index if index == asked + n else None for n, index in enumerate(found)], batch["views"]
        for name, reason in batch["skipped"]:
            say(f"            left out: {name}: {reason}")
        asked += len(found)
