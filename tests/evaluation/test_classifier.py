"""A classifier's own answers: its outputs matched to DATA's classes."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data.readers.reader_image_folder import find_images_and_targets

from freqmask.data.sources import open_source
from freqmask.errors import UserError
from freqmask.evaluation.eval_model import LOGITS, ClassifierModel

ARGUMENTS: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 1}


def write_classifier(folder: Path, names: list[str] | None, count: int = 3) -> Any:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=count, **ARGUMENTS)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    about = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.2] * 3, "num_classes": count}
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": count,
        "model_args": ARGUMENTS,
        "pretrained_cfg": about,
    }
    (folder / "config.json").write_text(json.dumps(config | ({"label_names": names} if names else {})))
    return model.eval()


def test_outputs_are_put_in_the_order_of_data(tmp_path: Path) -> None:
    model = write_classifier(tmp_path / "model", ["wolf", "cat", "dog"])
    subject = ClassifierModel(str(tmp_path / "model"), ["cat", "dog"])
    images = torch.rand(2, 3, 16, 16)
    expected = model((images - 0.5) / 0.2)[:, [1, 2]]
    assert torch.allclose(subject.features(images, "end")[LOGITS], expected, atol=1e-5)


def test_classes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_classifier(tmp_path / "named", ["wolf", "cat", "dog"])
    with pytest.raises(UserError, match="'cow' not among the model's"):
        ClassifierModel(str(tmp_path / "named"), ["cat", "cow"])
    write_classifier(tmp_path / "plain", None)
    assert ClassifierModel(str(tmp_path / "plain"), ["a", "b", "c"]).columns.tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="classifies 3 classes and DATA has 2"):
        ClassifierModel(str(tmp_path / "plain"), ["a", "b"])


def test_folders_named_by_numbers_are_those_outputs(tmp_path: Path) -> None:
    for number in range(11):
        (tmp_path / "data" / str(number)).mkdir(parents=True)
        Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / "data" / str(number) / "1.png")
    names = open_source(tmp_path / "data").class_names
    assert names is not None and names.index("10") == 2
    write_classifier(tmp_path / "plain", None, 11)
    _, numbers = find_images_and_targets(str(tmp_path / "data"))
    assert ClassifierModel(str(tmp_path / "plain"), names).columns.tolist() == [numbers[n] for n in names]


def test_data_with_some_of_the_numbers_of_outputs_is_taken_by_number(tmp_path: Path) -> None:
    write_classifier(tmp_path / "plain", None, 12)
    assert ClassifierModel(str(tmp_path / "plain"), ["2", "7", "11"]).columns.tolist() == [2, 7, 11]
    with pytest.raises(UserError, match="classifies 12 classes and DATA has 3, '12' not among the model's"):
        ClassifierModel(str(tmp_path / "plain"), ["2", "7", "12"])


def test_making_networks_leaves_the_generators_of_other_devices_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from freqmask.data.augment import randomness_from
    from freqmask.evaluation.finetune_plan import make_classifier
    from freqmask.interop.models import open_model

    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    seeded.clear()
    opened = open_model("random:resnet10t", image_size=32)
    make_classifier(opened, 2, 0.0, seed=5)
    with randomness_from(7, torch_too=True, device=torch.device("cpu")):
        torch.rand(1)
    assert not seeded
    assert torch.equal(torch.rand(1), expected)
