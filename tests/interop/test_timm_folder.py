"""timm's folder layout: what is written is what timm loads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import torch

from freqmask.backbones import Backbone
from freqmask.interop.weight_files import write_timm_folder


def test_a_network_that_trains_channels_last_is_written_as_any_other(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=0).eval().to(memory_format=torch.channels_last)
    write_timm_folder(model, tmp_path, input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.2,) * 3, metadata={})
    assert not model.conv1[0].weight.is_contiguous()  # the model that is trained stays as it is
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "size"), [("mobilenetv3_small_050", 64), ("convnextv2_atto", 50)])
def test_a_folder_says_how_to_get_embeds_features_where_a_plain_call_does_not(tmp_path, name, size):
    torch.manual_seed(0)
    backbone = Backbone(name, size).eval()
    write_timm_folder(
        backbone.timm_model, tmp_path, input_size=(3, size, size), mean=[0.5] * 3, std=[0.5] * 3, metadata={}
    )
    text = (tmp_path / "README.md").read_text()
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = x = torch.rand(2, 3, size, size)
    if "pad(" in text:
        x = eval(re.search(r"x = (torch\.nn.*?\))`", text)[1], {"torch": torch, "x": images})
    torch.testing.assert_close(
        model.forward_features(x).mean((2, 3)), backbone(images).pooled, atol=1e-5, rtol=0
    )
    assert json.loads((tmp_path / "config.json").read_text())["freqmask"]["notes"]
