"""What holds for every method."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as distributed
from tiny import CNN, VIT, photographs, tiny_method, views_for
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from freqmask.backbones import Backbone
from freqmask.errors import UserError
from freqmask.filters import LowPass
from freqmask.methods import METHODS, Method, build_method, find_method
from freqmask.pretraining.task import shard, shown_metrics

NAMES = list(METHODS)
KEYS = torch.arange(4)


@pytest.mark.parametrize("network", [VIT, CNN], ids=["vit", "cnn"])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls_on_a_fixed_batch(name: str, network: dict[str, Any]) -> None:
    # a teacher, a centre or a temperature that moves makes another task of every step
    still = {"ema_momentum": 1.0, "center_momentum": 1.0, "teacher_temperature": 0.04}
    method = tiny_method(name, network, **(still if name == "folk" else {}))
    views = views_for(method)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(30):
        loss = method(views, KEYS)["loss"]
        optimizer.zero_grad()
        loss.backward()
        method.before_optimizer_step(step, 30)
        optimizer.step()
        method.after_step(step, 30)
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["mfm", "folk", "sr", "deblur", "denoise"])  # the others have a batch norm
def test_a_batch_in_parts_makes_the_steps_of_the_whole(name: str) -> None:
    own = {"mfm": {"reduce": "image"}, "folk": {"reduce": "image", "freeze_last_layer_steps": 0}}

    def losses(parts: int) -> list[float]:
        method = tiny_method(name, **own.get(name, {}))
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
        steps = []
        for step in range(3):
            loss = torch.zeros(())
            for part in range(parts):
                mine = slice(part, None, parts)
                loss = loss + method([v[mine] for v in views_for(method)], KEYS[mine])["loss"] / parts
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            method.after_step(step, 3)
            steps.append(loss.item())
        return steps

    assert losses(2) == pytest.approx(losses(1), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_that_wants_a_gradient_gets_one(name: str) -> None:
    method = tiny_method(name)
    method(views_for(method), KEYS)["loss"].backward()
    assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_part_of_the_loss_is_declared_so_that_it_is_shown(name: str) -> None:
    method = tiny_method(name, **({"token_weight": 0.5} if name == "distill" else {}))
    assert set(method(views_for(method), KEYS)) - {"loss"} == set(method.parts) <= set(shown_metrics(method))


@pytest.mark.parametrize("name", NAMES)
def test_settings_build_the_same_method_again(name: str) -> None:
    own = {"words": {"words": 16}, "distill": {"token_weight": 0.5}}.get(name, {"gamma": 1.5})
    method = tiny_method(name, **own, mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2))
    assert set(method.settings) == set(inspect.signature(type(method)).parameters)
    again = build_method(method.name, **method.settings)
    again.load_state_dict(method.state_dict())
    if name == "distill":  # a teacher is no plain value and lies in no checkpoint
        again.teacher = method.teacher
    views = views_for(method)
    assert torch.equal(again(views, KEYS)["loss"], method(views, KEYS)["loss"])
    assert again.settings == method.settings


@pytest.mark.parametrize("name", NAMES)
def test_the_same_keys_give_the_same_loss_and_others_another(name: str) -> None:
    method = tiny_method(name).eval()
    views = views_for(method)
    loss = method(views, KEYS)["loss"]
    assert torch.equal(method(views, KEYS)["loss"], loss)
    if name not in ("sr", "deblur"):  # nothing is random in sr, and at 32 pixels all kernels have one size
        assert not torch.equal(method(views, KEYS + 7)["loss"], loss)


@pytest.mark.parametrize(("channels", "size"), [(1, (33, 47)), (12, (32, 32)), (3, (35, 24))])
@pytest.mark.parametrize("name", NAMES)
def test_any_size_and_any_channels(name: str, channels: int, size: tuple[int, int]) -> None:
    method = tiny_method(name, channels=channels, image_size=size)
    views = views_for(method, channels=channels, size=size)
    assert torch.isfinite(method(views, KEYS)["loss"])
    seen = method.reconstruct(views[0])
    image = (4, channels, *size)
    assert {seen[part].shape for part in ("input", "filtered", "prediction", "target", "filled")} == {image}
    assert seen["keep"].shape[2:] == (size[0], size[1] // 2 + 1)


@pytest.mark.parametrize("network", [VIT, CNN], ids=["vit", "cnn"])
@pytest.mark.parametrize("name", NAMES)
def test_pictures_leave_no_trace(name: str, network: dict[str, Any]) -> None:
    method = tiny_method(name, network)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    first, second = (method.reconstruct(photographs()) for _ in range(2))
    assert all(torch.equal(first[part], second[part]) for part in first)
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    assert method.training


@pytest.mark.parametrize("name", NAMES)
def test_details_cost_nothing_unless_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = tiny_method(name)
    views = views_for(method)
    with_details = method(views, KEYS, details=True)
    if name not in ("words", "distill"):  # whose one detail is a quotient of what they have computed anyway
        monkeypatch.setattr(inspect.getmodule(type(method)), "reconstruction_health", None)
    without = method(views, KEYS)
    assert not [part for part in without if part.startswith("relative_loss") or part == "collapse"]
    assert "relative_loss" in with_details
    assert [part for part, value in with_details.items() if value.requires_grad] == ["loss"]


def test_compiled_backbones_give_the_same_loss_under_the_same_names() -> None:
    network = {**VIT, "model_args": {**VIT["model_args"], "depth": 1}}
    method, compiled = (tiny_method("folk", network) for _ in range(2))
    compiled.compile_parts(backend="eager", fullgraph=True)
    views = views_for(method)
    assert torch.allclose(compiled(views, KEYS)["loss"], method(views, KEYS)["loss"], atol=1e-6)
    assert list(compiled.state_dict()) == list(method.state_dict())


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "aot_eager") for name in NAMES), pytest.param("mfm", "inductor", marks=pytest.mark.slow)],
)
def test_a_whole_method_compiles_into_one_graph(name: str, backend: str) -> None:
    torch._dynamo.reset()
    network = {**VIT, "model_args": {**VIT["model_args"], "depth": 1}}
    method, twin = (tiny_method(name, network) for _ in range(2))
    views = views_for(method)
    if name == "words":  # its words are found in the first batch
        for eager in (method, twin):
            eager(views, KEYS)
    parts = [
        compute(views, KEYS, details=True)
        for compute in (method, torch.compile(twin, fullgraph=True, backend=backend))
    ]
    for values in parts:
        values["loss"].backward()
    torch.testing.assert_close(parts[1], parts[0], equal_nan=True)
    for eager, compiled in zip(method.parameters(), twin.parameters(), strict=True):
        # distill standardizes twice over four images, which magnifies rounding
        atol = 1e-5 if name == "distill" else 1e-6
        torch.testing.assert_close(compiled.grad, eager.grad, rtol=1e-4, atol=atol)


@pytest.fixture
def mesh_of_one() -> Iterator[DeviceMesh]:
    """This process alone as all that train together."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("network", [VIT, CNN], ids=["vit", "cnn, channels last"])
@pytest.mark.parametrize("name", NAMES)
def test_a_sharded_method_has_the_loss_and_gradient_of_the_whole(
    name: str, network: dict[str, Any], mesh_of_one: DeviceMesh
) -> None:
    """FSDP's weights are tensors of its own, but inside of the modules that are called."""
    whole, sharded = (tiny_method(name, network) for _ in range(2))
    sharded.load_state_dict(whole.state_dict())
    sharded.to(memory_format=torch.channels_last)
    shard(sharded, mesh_of_one)
    losses = [method(views_for(method), KEYS)["loss"] for method in (whole, sharded)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for expected, found in zip(whole.parameters(), sharded.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(found.grad.full_tensor(), expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_default_backbone_is_one_of_the_backbones(name: str) -> None:
    method = tiny_method(name)
    assert isinstance(method.backbones()[method.default_backbone], Backbone)


def test_a_backbone_that_is_already_built_is_taken_and_recorded() -> None:
    backbone = Backbone(VIT["backbone"], 32, patch_size=8, stage=0, model_args=VIT["model_args"])
    method = build_method("mfm", backbone=backbone, image_size=32)
    assert method.backbone is backbone
    again = build_method("mfm", **method.settings)
    assert list(again.state_dict()) == list(method.state_dict())
    assert again.backbone.stage == 0
    with pytest.raises(UserError, match=r"must fit channels \(4\)"):
        build_method("mfm", backbone=backbone, image_size=32, channels=4)


def test_a_filter_object_is_recorded_by_its_description() -> None:
    method = tiny_method("mfm", filter=LowPass(3))
    assert tiny_method("mfm", filter=method.settings["filter"]).filter.radius == 3


class Half(Method):
    """A method from outside: half of the mean."""

    name = "half"

    def __init__(self, weight: float = 0.5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, views: Any, keys: Any = None, details: bool = False) -> dict[str, torch.Tensor]:
        return {"loss": self.weight * views[0].mean()}

    def reconstruct(self, images: Any, keys: Any = None) -> dict[str, torch.Tensor]:
        return {}


def test_a_method_of_ones_own_is_found_by_its_import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "mylab", sys.modules[Half.__module__])
    assert find_method("mylab:Half") is Half
    assert build_method("mylab:Half", weight=0.25).weight.item() == 0.25


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("fokl", {}, r"method \(fokl\).*did you mean 'folk'"),
        ("no.such:Thing", {}, r"method \(no.such:Thing\) could not be imported"),
        ("pathlib:Path", {}, r"must be a class that derives from torch.nn.Module"),
        ("mfm", {"radios": 3}, r"radios is no option of method mfm; radios: did you mean 'radius'"),
        ("sr", {"radius": 3}, r"radius is no option of method sr"),
        ("mfm", {"filter": "com", "radius": 3}, r"radius \(3\) is not used by filter com"),
        ("mfm", {"com_share": 0.3}, r"com_share \(0.3\) is not used by filter fixed"),
        (
            "mfm",
            {"filter": "lowpass(radius=3)", "softness": 1.0},
            r"softness \(1.0\) is not used by filter lowpass",
        ),
        ("mfm", {"radius": 100}, r"radius \(100\) must be at most 16"),
        ("mfm", {"low_pass_share": 1.5}, r"low_pass_share \(1.5\)"),
        ("folk", {"com_share": -0.1}, r"com_share \(-0.1\)"),
        ("mfm", {"mean": [0.5]}, r"mean \(\[0.5\]\) must hold one value for each of the 3 channels"),
        ("mfm", {"std": [0.5, 0.0, 0.5]}, r"std .* must be above 0"),
        ("folk", {"views": "three", "ema_momentum": 2}, r"views \(three\).*; ema_momentum \(2\)"),
        ("folk", {"teacher_temperature": 0}, r"teacher_temperature \(0\)"),
        ("folk", {"freeze_last_layer_steps": -1}, r"freeze_last_layer_steps \(-1\)"),
        ("folk", {"reconstruction_weight": 0, "distillation_weight": 0}, r"not both 0"),
        (
            "folk",
            {"patch_size": None, **CNN, "distil": "class_token"},
            r"distil \(class_token\) .* resnet18 has none",
        ),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_method(name, None if name in METHODS else {"weight": 1.0}, **settings)


def test_another_number_of_views_is_told_in_a_sentence() -> None:
    with pytest.raises(UserError, match="views must be a list of 2 batches"):
        tiny_method("folk")([photographs()])
    with pytest.raises(UserError, match="views must be a list of 1 batches"):
        tiny_method("mfm")(photographs())
