"""Which numbers of a backbone stand for an image: places side by side, centered or whitened; kept beside the weights.

Features of a masked model have a common mean and an effective rank of a few: cosines between them are all near 1.
Taking the mean off, or making all directions vary alike, is what makes neighbors of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from freqmask.errors import UserError
from freqmask.interop.formats import CONFIG, OURS
from freqmask.interop.models import OpenedModel
from freqmask.interop.weight_files import write_tensors
from freqmask.spectrum import Images
from freqmask.training.run_folder import write_text

PLAIN, CENTERED, WHITENED = "plain", "centered", "whitened"
KINDS = (PLAIN, CENTERED, WHITENED)
FILE, KEY = "features.safetensors", "features"  # beside the weights; in config.json under `freqmask`
# of the mean variance is added to each: directions of rounding errors must not count like others
SHRINKAGE = 0.01


@dataclass(frozen=True)
class FeatureSpace:
    """What becomes of the features of a backbone: ``(parts side by side - mean) @ projection``."""

    # names of features: ``end/mean``, ``end/token``, ``block3/mean`` (the third block)
    parts: tuple[str, ...]
    kind: str  # plain, centered or whitened
    mean: Float[Tensor, " column"]  # of each number over training images; empty where plain
    projection: Float[Tensor, "column direction"]  # (numbers, directions); empty where not whitened

    @classmethod
    def fit(
        cls, features: Mapping[str, Float[Tensor, "image dim"]], parts: Sequence[str], kind: str
    ) -> FeatureSpace:
        """Mean and covariance of some images; no labels.

        Args:
            features: of training images, by name.
            parts: which stand side by side.
            kind: plain, centered or whitened.
        """
        mean, projection = torch.empty(0), torch.empty(0, 0)
        if kind != PLAIN:
            rows = torch.cat([features[name] for name in parts], dim=1).cpu().double()
            mean = rows.mean(dim=0)
            if kind == WHITENED:
                rows = rows - mean
                if len(rows) >= rows.shape[1]:  # by the smaller of both products
                    variances, directions = torch.linalg.eigh(rows.T @ rows / len(rows))
                else:
                    _, lengths, rights = torch.linalg.svd(rows, full_matrices=False)
                    variances, directions = lengths.square() / len(rows), rights.T
                kept = variances > 1e-9 * variances.max().clamp_min(1e-30)
                scale = (variances + SHRINKAGE * variances.sum() / len(mean)).rsqrt()
                projection = (directions * scale)[:, kept].float()
            mean = mean.float()
        return cls(tuple(parts), kind, mean, projection)

    def apply(self, features: Mapping[str, Float[Tensor, "batch dim"]]) -> Float[Tensor, "batch column"]:
        """The features of images in this space, float32."""
        rows = torch.cat([features[name].float() for name in self.parts], dim=1)
        if self.kind == PLAIN:
            return rows
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows - self.mean.to(rows.device)
            return rows @ self.projection.to(rows.device) if self.kind == WHITENED else rows

    def describe(self) -> str:
        """For tables, such as ``block3/mean + end/mean, whitened``."""
        return f"{' + '.join(self.parts)}, {self.kind}"

    @property
    def digest(self) -> str:
        """Tells spaces of one description apart."""
        values = b"".join(tensor.contiguous().numpy().tobytes() for tensor in (self.mean, self.projection))
        return f"{self.describe()} {hashlib.blake2b(values, digest_size=4).hexdigest()}"


def features_by_name(opened: OpenedModel, normalized: Images, parts: Sequence[str]) -> dict[str, Tensor]:
    """The features that a space takes, by name: of the end, and of blocks counted from 1."""
    end = opened.backbone(normalized)
    features = {"end/mean": end.pooled, "end/token": end.class_token}
    blocks = {int(name.split("/")[0].removeprefix("block")) for name in parts if name.startswith("block")}
    if numbers := sorted(blocks):
        stages = opened.stages(normalized, [number - 1 for number in numbers])
        for number, stage in zip(numbers, stages, strict=True):
            features |= {f"block{number}/mean": stage.pooled, f"block{number}/token": stage.class_token}
    return {name: features[name] for name in parts}


def save_space(space: FeatureSpace, opened: OpenedModel) -> Path:
    """Keep a choice beside the weights of an exported folder or of a run.

    Returns:
        The file of mean and projection.

    Raises:
        UserError: the model has no folder.
    """
    folder = opened.folder
    if folder is None:
        raise UserError(f"model ({opened.name}) has no folder that could keep its features; export it first")
    mean = space.mean if len(space.mean) else torch.zeros(1)
    write_tensors(folder / FILE, {"mean": mean, "projection": space.projection})
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    about = {"parts": list(space.parts), "kind": space.kind, "weights_hash": opened.weights_hash}
    config[OURS] = {**config.get(OURS, {}), KEY: about}
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    return folder / FILE


def load_space(opened: OpenedModel) -> FeatureSpace | None:
    """The choice that was kept beside a model's weights; None where there is none, or of other weights.

    Raises:
        UserError: its file is missing or broken.
    """
    about = opened.metadata.get(KEY)
    if opened.folder is None or not about or about.get("weights_hash") != opened.weights_hash:
        return None
    try:
        tensors = load_file(opened.folder / FILE)
        return FeatureSpace(tuple(about["parts"]), about["kind"], tensors["mean"], tensors["projection"])
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise UserError(
            f"features ({opened.folder / FILE}) cannot be read ({error}); choose them again by "
            "freqmask evaluate knn MODEL --features save"
        ) from error
