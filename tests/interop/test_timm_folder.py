"""timm's folder layout: what is written is what timm loads."""

from __future__ import annotations

from pathlib import Path

import timm
import torch

from freqmask.interop.timm_folder import write_timm_folder


def test_a_network_that_trains_channels_last_is_written_as_any_other(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=0).eval().to(memory_format=torch.channels_last)
    write_timm_folder(model, tmp_path, input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.2,) * 3, facts={})
    assert not model.conv1[0].weight.is_contiguous()  # the model that is trained stays as it is
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-5)
