"""What a run advises before its first step."""

from __future__ import annotations

from typing import Any

import pytest

from freqmask.pretraining.announce import advice_lines

ENOUGH: dict[str, Any] = {"init": None, "overfit": None, "steps": 10_000, "channels": 3, "method": "mfm"}


def advised(images: int = 100_000, data: str = "photos", **options: Any) -> str:
    return " ".join(advice_lines({**ENOUGH, **options}, images, data))


def test_enough_steps_and_images_need_no_advice() -> None:
    assert advised() == ""


def test_few_steps_are_told_before_they_are_spent() -> None:
    assert "32 steps are few: little shows before 5,000" in advised(steps=32)


def test_few_images_are_sent_to_public_weights() -> None:
    text = advised(images=4_000)
    assert "freqmask pretrain photos --method mfm --init timm:vit_small_patch16_224" in text
    assert "three channels" not in text
    assert "they know three channels and are adapted" in advised(images=4_000, channels=12)


@pytest.mark.parametrize("options", [{"init": "timm:resnet18"}, {"overfit": 8}, {"data": "builtin:digits"}])
def test_who_has_chosen_is_not_advised(options: dict[str, Any]) -> None:
    assert advised(**{"images": 8, "steps": 8, **options}) == ""
