"""From features to images and to the outputs that are distilled."""

from __future__ import annotations

import pytest
import torch

from freqmask.errors import UserError
from freqmask.heads import ProjectionHead, ReconstructionHead


@pytest.mark.parametrize("channels", [1, 3, 12])
def test_a_cell_of_the_map_becomes_a_square_of_the_image(channels: int) -> None:
    head = ReconstructionHead(8, channels, stride=4)
    assert head(torch.randn(2, 8, 3, 5)).shape == (2, channels, 12, 20)


def test_a_cell_writes_into_its_own_square_only() -> None:
    head = ReconstructionHead(8, 3, stride=4)
    feature_map = torch.zeros(1, 8, 3, 5)
    feature_map[..., 1, 2] = 1.0
    changed = (head(feature_map) != head(torch.zeros(1, 8, 3, 5))).any(dim=1)[0]
    assert changed[4:8, 8:12].all()
    assert changed.sum() == 16


def test_a_map_larger_than_the_image_is_cut_and_a_smaller_one_stretched() -> None:
    head = ReconstructionHead(8, 3, stride=4)
    feature_map = torch.randn(2, 8, 3, 5)
    assert torch.equal(head(feature_map, (11, 17)), head(feature_map)[..., :11, :17])
    assert head(feature_map, (13, 20)).shape == (2, 3, 13, 20)


def test_the_decoder_has_the_parameter_names_of_the_authors_checkpoints() -> None:
    shapes = {name: tuple(value.shape) for name, value in ReconstructionHead(8, 3, 16).state_dict().items()}
    assert shapes == {"0.weight": (768, 8, 1, 1), "0.bias": (768,)}


def test_outputs_of_the_projection_head_are_cosines() -> None:
    head = ProjectionHead(8, outputs=5, hidden=16, bottleneck=4)
    outputs = head(100 * torch.randn(32, 8))
    assert outputs.abs().max() <= 1 + 1e-6
    hidden = torch.nn.functional.normalize(head.mlp(100 * torch.ones(1, 8)), dim=-1)
    with torch.no_grad():
        head.last_layer[3] = 7 * hidden[0]  # the row's direction counts, its length does not
    assert head(100 * torch.ones(1, 8))[0, 3].item() == pytest.approx(1.0, abs=1e-6)


def test_the_projection_head_has_three_layers_of_the_published_widths() -> None:
    head = ProjectionHead(384, outputs=16)
    shapes = [tuple(parameter.shape) for parameter in head.mlp.parameters() if parameter.dim() == 2]
    assert shapes == [(2048, 384), (2048, 2048), (256, 2048)]
    assert head.last_layer.shape == (16, 256)


def test_a_projection_head_of_no_width_is_refused() -> None:
    with pytest.raises(UserError, match=r"bottleneck \(0\)"):
        ProjectionHead(8, bottleneck=0)
