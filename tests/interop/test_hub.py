"""What is pushed is private unless asked, and shows nothing of the machine or the images."""

import json
import socket
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load as load_tensors

from freqmask.errors import UserError
from freqmask.interop.exporters import graph_of, push_model
from freqmask.interop.feature_space import FeatureSpace, save_space
from freqmask.interop.formats import check_hub
from freqmask.interop.models import open_classifier, open_model
from freqmask.interop.weight_files import write_timm_folder
from freqmask.training.run_folder import RunFolder


class FakeHub:
    """Remembers what it was asked for, and the files that were there at that moment."""

    def __init__(self, failure=None):
        self.failure = failure
        self.calls = {}

    def create_repo(self, repository, **options):
        if self.failure:
            raise self.failure
        self.calls["create"] = (repository, options)
        return f"https://hub/{repository}"

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.calls["upload"] = (repo_id, commit_message)


@pytest.fixture
def run_with_results(run_factory):
    run = run_factory(probe_data="/home/somebody/labels", crop="resized")
    run.previews.mkdir()
    (run.previews / "step-000020.png").write_bytes(b"a picture of somebody")
    (run.path / "results.csv").write_text("protocol,data,score\nknn,/home/somebody/labels,0.75\n")
    return run


def test_a_push_is_private_and_shows_no_images_names_or_paths(run_with_results):
    hub = FakeHub()
    address = push_model(open_model(run_with_results.path), "me/mine", api=hub)
    assert address == "https://hub/me/mine"
    assert hub.calls["create"] == ("me/mine", {"private": True, "exist_ok": True})
    assert set(hub.files) == {"README.md", "config.json", "model.safetensors", "decoder.safetensors"}
    for name, content in hub.files.items():
        assert b"somebody" not in content, name
        assert b"holiday" not in content, name
    card = hub.files["README.md"].decode()
    for text in ("library_name: timm", "hf-hub:me/mine", "40 images", "abc123", "method: mfm", "knn", "0.75"):
        assert text in card


def test_a_push_takes_the_feature_space_along_and_passes_over_a_cell_without_a_column(run_with_results):
    with (run_with_results.path / "results.csv").open("a") as file:
        file.write("knn,here,0.5,a fourth cell\n")
    features = {"end/mean": torch.arange(6.0).reshape(3, 2)}
    save_space(FeatureSpace.fit(features, ["end/mean"], "centered"), open_model(run_with_results.path))
    kept = graph_of(open_model(run_with_results.path)).outputs["features"]
    assert kept == "(B, D: the mean of the map, not as --features save kept them)"
    hub = FakeHub()
    push_model(open_model(run_with_results.path), "me/mine", api=hub)
    assert json.loads(hub.files["config.json"])["freqmask"]["features"]["parts"] == ["end/mean"]
    assert load_tensors(hub.files["features.safetensors"])["mean"].tolist() == [2.0, 3.0]
    assert "0.75" in hub.files["README.md"].decode()


def test_a_card_tells_the_model_s_own_results_and_what_each_is_of(run_with_results):
    run = run_with_results
    (run.path / "results.csv").write_text(
        "protocol,model,variant,accuracy\n"
        f"knn,{run.path.name},k=20,0.71\n"
        "knn,random:resnet18,k=20,0.72\n"
        "knn,pixels,k=20,0.73\n"
        f"robustness,{run.path.name},pgd linf 4/255,0.02\n"
    )
    hub = FakeHub()
    push_model(open_model(run.path), "me/mine", api=hub)
    card = hub.files["README.md"].decode()
    assert "| knn | k=20 | 0.71 |" in card
    assert "| robustness | pgd linf 4/255 | 0.02 |" in card
    assert "0.72" not in card and "0.73" not in card


def test_with_images_shows_them_and_public_is_public(run_with_results):
    hub = FakeHub()
    push_model(open_model(run_with_results.path), "me/mine", public=True, with_images=True, api=hub)
    assert hub.calls["create"][1]["private"] is False
    assert hub.files["step-000020.png"] == b"a picture of somebody"
    card = hub.files["README.md"].decode()
    assert "![preview](step-000020.png)" in card
    assert "secret holiday" in card


def test_a_fine_tuned_classifier_is_pushed_with_its_head_and_no_paths(tmp_path):
    run = RunFolder(tmp_path / "tuned")
    asked = {"model": ["/home/somebody/run"], "data": "/home/somebody/labels", "labels": "somebody.csv"}
    run.begin({"method": "finetune", "lr": 0.1, "model": "/home/somebody/run", "options": asked}, {}, "")
    write_timm_folder(
        timm.create_model("resnet18", num_classes=2, layers=[1, 1, 1, 1]),
        run.path / "classifier",
        input_size=(3, 32, 32),
        mean=[0.5] * 3,
        std=[0.5] * 3,
        metadata={"model": "/home/somebody/run", "step": 3},
        label_names=["cat", "dog"],
    )
    hub = FakeHub()
    push_model(open_classifier(run.path), "me/mine", api=hub)
    assert set(hub.files) == {"README.md", "config.json", "model.safetensors"}
    assert not [name for name, content in hub.files.items() if b"somebody" in content]
    card, config = hub.files["README.md"].decode(), json.loads(hub.files["config.json"])
    assert (config["label_names"], config["num_classes"], config["freqmask"]["step"]) == (
        ["cat", "dog"],
        2,
        3,
    )
    for text in ("image-classification", "resnet18 classifier of 2 classes, fine-tuned", "lr: 0.1"):
        assert text in card
    with pytest.raises(UserError, match="holds timm models only"):
        push_model(graph_of(open_classifier(run.path)), "me/mine", api=hub)


def test_a_hub_that_refuses_is_one_sentence(vit_run):
    with pytest.raises(UserError, match=r"push \(me/mine\) failed \(PermissionError: not yours\)"):
        push_model(open_model(vit_run.path), "me/mine", api=FakeHub(PermissionError("not yours")))


def test_without_token_or_network_nothing_is_tried(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="token"):
        check_hub("me/mine")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")

    def no_network(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "create_connection", no_network)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="no connection"):
        check_hub("me/mine")
    with pytest.raises(UserError, match="USER/NAME"):
        check_hub("mine")
