"""Making a timm model as asked: its name, its arguments, and a sentence where it cannot be done."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from os.path import commonprefix
from typing import Any

import timm
import torch
from torch import Tensor, nn

from freqmask.errors import UserError, brief, nearest

# Arguments that are options of ours: named twice, they could contradict each other.
OWN_ARGUMENTS = {"img_size": "image_size", "in_chans": "channels", "patch_size": "patch_size"}
TOKENS = ("cls_token", "pos_embed", "reg_token", "dist_token")
# timm's entry functions say it in either of two ways, depending on how the family reads its arguments.
REFUSED = re.compile(r"unexpected keyword argument(?:\(s\): \[)? ?'(\w+)'")


def create_model(
    name: str,
    image_size: tuple[int, int],
    channels: int,
    patch_size: int | None = None,
    model_args: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    optional_args: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, bool]:
    """A timm model without classifier, drop path off, for images of one size.

    A model of fixed size is made for the next size that its coarsest stride divides. Arguments as for
    :class:`freqmask.backbones.Backbone`.

    Returns:
        The model, and whether it works at this image size only.

    Raises:
        UserError: for an unknown name, or a model that cannot do what is asked.
    """
    check_name(name)
    asked: dict[str, Any] = {"in_chans": channels, **_checked(model_args)}
    if patch_size is not None:
        asked["patch_size"] = patch_size
    try:
        model, taken = _create(name, asked, image_size, pretrained, optional_args)
        padded = round_up(image_size, max(strides(model)))
    except UserError:
        if all(side % 32 == 0 for side in image_size):
            raise
        # Some families refuse a size that their stride does not divide before one can ask for the stride.
        model, taken = _create(name, asked, None, False, optional_args)
        padded = round_up(image_size, max(strides(model)))
        model, taken = _create(name, asked, padded, pretrained, optional_args)
    takes_size = "img_size" in taken
    if takes_size and padded != image_size:
        model, _ = _create(name, asked, padded, pretrained, optional_args)
    return model, takes_size and not taken.get("dynamic_img_size", False)


def check_name(name: str) -> None:
    """Raises a UserError that names the nearest timm models, unless timm knows the name."""
    prefix, colon, bare = name.partition(":")
    if colon and prefix not in ("local-dir", "hf-hub"):
        raise UserError(
            f"backbone ({name}) must be a name as timm has it; did you mean {bare!r}? "
            f"{prefix}: goes before the name in --init and where a MODEL is asked for"
        )
    if colon or timm.is_model(name.split(".")[0]):
        return
    raise UserError(f"backbone ({name}) must be the name of a timm model; {_similar(name)}")


def _similar(name: str) -> str:
    # the first model that begins most like the name: patch and size behind it are seldom typed
    models = timm.list_models()
    shared = {known: len(commonprefix([name, known])) for known in models}  # noqa: RUF071  # letters
    longest = max(shared.values())
    alike = [known for known in models if shared[known] == longest or 2 * longest < len(name)]
    begins = {known[: len(name)]: known for known in reversed(alike)}
    hint = nearest(name, begins)
    if not hint.startswith("did you mean"):
        return "timm.list_models() lists all of them"
    return f"did you mean {begins[hint.split(chr(39))[1]]!r}?"


def strides(model: nn.Module) -> list[int]:
    """Pixels per cell of every stage that timm counts for this model.

    Raises:
        UserError: if timm offers no feature maps of it.
    """
    information = getattr(model, "feature_info", None)
    if not information or not hasattr(model, "forward_intermediates"):
        raise UserError(
            f"backbone ({type(model).__name__}) yields no feature map through timm; "
            "take another, such as vit_small_patch16_224 or resnet50"
        )
    return [stage["reduction"] for stage in information]


def round_up(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The next height and width that ``multiple`` divides."""
    return math.ceil(size[0] / multiple) * multiple, math.ceil(size[1] / multiple) * multiple


def cannot(name: str, what: str, error: BaseException) -> UserError:
    """The sentence for a model that timm could not make or run as asked."""
    return UserError(
        f"backbone ({name}) cannot take {what}: {brief(error, 300)}; change them or the backbone"
    )


def has_attending_blocks(model: nn.Module) -> bool:
    """Whether the model is a sequence of ``blocks``, each with attention, as every ViT in timm is."""
    blocks = list(getattr(model, "blocks", nn.Module()).children())
    return bool(blocks) and all(hasattr(block, "attn") and hasattr(block, "mlp") for block in blocks)


def attends_anywhere(model: nn.Module) -> bool:
    """Whether any layer attends from place to place; attention that only pools does not count."""
    names = {type(module).__name__.lower() for module in model.modules()}
    return any("attention" in name and "pool" not in name for name in names)


def parameters_behind(outputs: Iterable[Tensor]) -> set[nn.Parameter]:
    """The parameters that a gradient of any of ``outputs`` reaches, found by walking autograd's graph."""
    waiting = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(waiting)
    found: set[nn.Parameter] = set()
    while waiting:
        node = waiting.pop()
        variable = getattr(node, "variable", None)  # only a leaf's accumulator has one
        if isinstance(variable, nn.Parameter):
            found.add(variable)
        following = {next_node for next_node, _ in node.next_functions if next_node is not None} - seen
        seen |= following
        waiting.extend(following)
    return found


@torch.no_grad()
def initialise_as_mfm(model: nn.Module) -> None:
    """MFM's initialization of a ViT (docs/methods.md, MFM), in place.

    Linear layers, the patch embedding, tokens and positions are normal with std 0.02, cut at one std; biases
    are zero; the residual projections of block l (from 1) are divided by sqrt(2 l).
    """
    for name, parameter in model.named_parameters():
        if name in TOKENS:
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.02, b=0.02)
    patch_projection = getattr(getattr(model, "patch_embed", None), "proj", None)
    for module in model.modules():
        if isinstance(module, nn.Linear) or (module is patch_projection and isinstance(module, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02, a=-0.02, b=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for depth, block in enumerate(model.get_submodule("blocks").children(), start=1):
        for projection in (getattr(block.attn, "proj", None), getattr(block.mlp, "fc2", None)):
            if isinstance(projection, nn.Linear):
                projection.weight.div_(math.sqrt(2 * depth))


def _checked(model_args: Mapping[str, Any] | None) -> dict[str, Any]:
    given = dict(model_args or {})
    for theirs, ours in OWN_ARGUMENTS.items():
        if theirs in given:
            raise UserError(f"model_args ({theirs}={given[theirs]}) must not name it; use the option {ours}")
    for taken in ("num_classes", "features_only", "pretrained"):
        if taken in given:
            raise UserError(f"model_args ({taken}={given[taken]}) must not name it: freqmask sets it itself")
    return given


def _create(
    name: str,
    asked: dict[str, Any],
    image_size: tuple[int, int] | None,
    pretrained: bool,
    optional_args: Mapping[str, Any] | None,
) -> tuple[nn.Module, dict[str, Any]]:
    # what was not asked for may be refused, one argument at a time; the arguments that were taken come back
    wanted: dict[str, Any] = {"drop_path_rate": 0.0, "num_classes": 0, **(optional_args or {})}
    if image_size is not None:
        wanted["img_size"] = image_size
    while True:
        try:
            model = timm.create_model(name, pretrained=pretrained, **{**wanted, **asked})
            return model, {**wanted, **asked}
        except TypeError as error:
            refused = REFUSED.search(str(error))
            if refused is None or refused[1] not in wanted or refused[1] in asked:
                raise _refusal(name, asked, refused, error) from error
            del wanted[refused[1]]
        except Exception as error:  # timm, its hub and the network raise whatever they please
            raise _failure(name, asked, image_size, pretrained, error) from error


def _refusal(name: str, asked: dict[str, Any], refused: re.Match[str] | None, error: Exception) -> UserError:
    if refused is None:
        return cannot(name, f"the arguments {asked}", error)
    argument = refused[1]
    option = OWN_ARGUMENTS.get(argument, f"model_args {argument}")
    return UserError(
        f"{option} ({asked.get(argument)}) is no argument of backbone {name}; leave it out or "
        "take another backbone"
    )


def _failure(
    name: str, asked: dict[str, Any], image_size: tuple[int, int] | None, pretrained: bool, error: Exception
) -> UserError:
    if pretrained:
        return UserError(
            f"the public weights of {name} could not be had ({type(error).__name__}: {brief(error, 200)}); check the "
            "name and the network, or start without pretrained"
        )
    size = "" if image_size is None else f"images of {image_size[0]}x{image_size[1]} with "
    return cannot(name, f"{size}{asked}", error)
