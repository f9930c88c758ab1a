"""timm models: made as asked, with a sentence where it cannot be done, and told from tensors (ViT, BEiT, ResNet)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from os.path import commonprefix
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from freqmask.errors import UserError, brief, nearest

# Arguments that are options of ours: named twice, they could contradict each other.
OWN_ARGUMENTS = {"img_size": "image_size", "in_chans": "channels", "patch_size": "patch_size"}
TOKENS = ("cls_token", "pos_embed", "reg_token", "dist_token")
# one of these pairs is in every ViT and BEiT, and in every ResNet
SIGNATURES = (
    ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
    ("conv1.weight", "layer1.0.conv1.weight"),
)
_HEADS = ("head.weight", "fc.weight", "head.fc.weight", "classifier.weight")
# width of a ViT -> its name; bottleneck and layers of a ResNet -> its name
_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
_RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
}
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
    given = dict(model_args or {})
    for theirs, ours in OWN_ARGUMENTS.items():
        if theirs in given:
            raise UserError(f"model_args ({theirs}={given[theirs]}) must not name it; use the option {ours}")
    for own in ("num_classes", "features_only", "pretrained"):
        if own in given:
            raise UserError(f"model_args ({own}={given[own]}) must not name it: freqmask sets it itself")
    asked: dict[str, Any] = {"in_chans": channels, **given}
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
    for part in model.modules():
        if isinstance(part, PatchEmbed) and _is_plain_convolution(part.proj):
            part.proj.__class__ = PatchConv2d
    return model, takes_size and not taken.get("dynamic_img_size", False)


def _is_plain_convolution(part: Any) -> bool:
    """Whether a :class:`PatchConv2d` does the same."""
    is_plain = type(part) is nn.Conv2d and part.padding == (0, 0) and part.dilation == (1, 1)
    return is_plain and part.kernel_size == part.stride and part.groups == 1


class PatchConv2d(nn.Conv2d):
    """A convolution whose windows lie side by side, on a GPU as one matrix product.

    cuDNN takes 2.1 of the 79 ms of a step of ViT-B/16 for its first layer alone, many times what the product takes.
    """

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) becomes (B, D, H // side, W // side), as ``nn.Conv2d`` has it."""
        return self.product(images) if images.is_cuda else super().forward(images)

    def _get_name(self) -> str:
        return "Conv2d"  # the same layer to all who read a network's description, such as exports

    def product(self, images: Tensor) -> Tensor:
        """The same by a matrix product; its result lies in memory cell by cell."""
        batch, channels = images.shape[:2]
        height, width = self.stride
        rows, columns = images.shape[-2] // height, images.shape[-1] // width
        whole = images[..., : rows * height, : columns * width]
        patches = whole.reshape(batch, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(batch, rows, columns, channels * height * width)
        cells = F.linear(patches, self.weight.flatten(1), self.bias)
        return cells.permute(0, 3, 1, 2)


def check_name(name: str) -> None:
    """Raises a UserError that names the nearest timm models, unless timm knows the name."""
    prefix, colon, bare = name.partition(":")
    if colon and prefix not in ("local-dir", "hf-hub"):
        raise UserError(
            f"backbone ({name}) must be a name as timm has it; did you mean {bare!r}? "
            f"{prefix}: goes before the name in --init and where a MODEL is asked for"
        )
    if not colon and not timm.is_model(name.split(".")[0]):
        # the first model that begins most like the name: patch and size behind it are seldom typed
        shared = {one: len(commonprefix([name, one])) for one in timm.list_models()}  # noqa: RUF071  # letters
        longest = max(shared.values())
        alike = [known for known in shared if shared[known] == longest or 2 * longest < len(name)]
        begins = {known[: len(name)]: known for known in reversed(alike)}
        hint = nearest(name, begins)
        if hint.startswith("did you mean"):
            hint = f"did you mean {begins[hint.split(chr(39))[1]]!r}?"
        else:
            hint = "timm.list_models() lists all of them"
        raise UserError(f"backbone ({name}) must be the name of a timm model; {hint}")


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
        following = {one for one, _ in node.next_functions if one is not None} - seen
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
        taken = wanted | asked
        try:
            return timm.create_model(name, pretrained=pretrained, **taken), taken
        except TypeError as error:
            refused = REFUSED.search(str(error))
            if refused is None:
                raise cannot(name, f"the arguments {asked}", error) from error
            argument = refused[1]
            if argument not in wanted or argument in asked:
                option = OWN_ARGUMENTS.get(argument, f"model_args {argument}")
                raise UserError(
                    f"{option} ({asked.get(argument)}) is no argument of backbone {name}; leave it out or "
                    "take another backbone"
                ) from error
            del wanted[argument]
        except Exception as error:  # timm, its hub and the network raise whatever they please
            if pretrained:
                raise UserError(
                    f"the public weights of {name} could not be had ({type(error).__name__}: {brief(error, 200)}); "
                    "check the name and the network, or start without pretrained"
                ) from error
            size = "" if image_size is None else f"images of {image_size[0]}x{image_size[1]} with "
            raise cannot(name, f"{size}{asked}", error) from error


def as_timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ViT's tensors with DINOv2's registers as timm has them: no place of the class token in ``pos_embed``."""
    if "register_tokens" not in state:
        return dict(state)
    renamed = dict(state)
    renamed["reg_token"] = renamed.pop("register_tokens")
    if _places_before(renamed) == 1:
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:]
    return renamed


def architecture_of(
    state: Mapping[str, Tensor], backbone: str | None, model_args: Mapping[str, Any]
) -> tuple[str, dict[str, Any], list[str]]:
    """The timm name and arguments, and sentences on what was assumed.

    Args:
        state: the backbone's tensors.
        backbone: the timm name where it is known; None tells it from the tensors.
        model_args: timm's arguments that were given; they go first.

    Raises:
        UserError: neither is the name known nor can it be told.
    """
    name, arguments, notes, module = backbone, dict[str, Any](), list[str](), ""
    if backbone is not None:
        check_name(backbone)
        module = timm.model_entrypoint(backbone.split(".")[0]).__module__
    if backbone is None and "layer1.0.conv1.weight" in state:
        name, arguments = _resnet(state)
    elif module.split(".")[-1] in ("", "vision_transformer", "beit", "deit") and all(
        tensor in state for tensor in SIGNATURES[0]
    ):
        name, arguments = _vit(state, backbone, model_args)
        heads = f"attention heads: {arguments['num_heads']} (width / 64; the file does not tell"
        notes = [] if "num_heads" in model_args else [f"{heads}: --model_args '{{num_heads: N}}')"]
        if "no_embed_class" in arguments and not {"img_size", "no_embed_class"} & model_args.keys():
            notes.append(
                "square images, and no place for the class token among the "
                f"{state['pos_embed'].shape[1]} of pos_embed; else --model_args '{{img_size: [HEIGHT, WIDTH]}}'"
            )
    if name is None:
        raise UserError(
            "the architecture cannot be told from the file (it is no plain ViT, BEiT or ResNet: "
            f"{', '.join(sorted(state)[:3])} ...); name it with --backbone, as timm does"
        )
    classes = (int(state[head].shape[0]) for head in _HEADS if head in state and state[head].dim() == 2)
    return name, {"num_classes": next(classes, 0), **arguments, **model_args}, notes


def _resnet(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    layers = tuple(_count(state, f"layer{number}") for number in range(1, 5))
    bottleneck, first = "layer1.0.conv3.weight" in state, state.get("conv1.weight")
    arguments: dict[str, Any] = {} if first is None else {"in_chans": first.shape[1]}
    name = _RESNETS.get((bottleneck, layers))
    if name is None:
        name, arguments["layers"] = ("resnet50" if bottleneck else "resnet18"), list(layers)
    return name, arguments


def _count(state: Mapping[str, Tensor], part: str) -> int:
    """How many blocks ``part.0``, ``part.1`` ... there are."""
    numbers = (name.split(".")[1] for name in state if name.startswith(f"{part}."))
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)


def ratio_of(hidden: int, dim: int) -> float:
    """The ``mlp_ratio`` from which timm, which cuts off what is behind the point, makes this hidden width."""
    return hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.5) / dim


def _vit(
    state: Mapping[str, Tensor], backbone: str | None, given: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    dim, channels, patch, _ = state["patch_embed.proj.weight"].shape
    fc1, size = state.get("blocks.0.mlp.fc1.weight"), _SIZES.get(dim, "base")
    if backbone is not None:
        name = backbone
    elif "blocks.0.gamma_1" in state or any("relative_position_bias_table" in key for key in state):
        name = f"beit_{size if size == 'large' else 'base'}_patch16_224"
    else:
        name = f"vit_{size}_patch{14 if size == 'huge' else 16}_224"
    arguments: dict[str, Any] = {
        "img_size": given.get("img_size") or _side(state, patch),
        "patch_size": patch,
        "in_chans": channels,
        "embed_dim": dim,
        "depth": _count(state, "blocks"),
        "num_heads": given.get("num_heads") or (16 if dim == 1280 else max(1, dim // 64)),
        "mlp_ratio": 4.0 if fc1 is None else ratio_of(fc1.shape[0], dim),
    }
    if name.startswith("beit"):
        return name, arguments | {
            "use_abs_pos_emb": "pos_embed" in state,
            "use_rel_pos_bias": any(".attn.relative_position_bias_table" in key for key in state),
            "use_shared_rel_pos_bias": "rel_pos_bias.relative_position_bias_table" in state,
            "global_pool": "avg" if "fc_norm.weight" in state else "token",
        }
    if "fc_norm.weight" in state:
        arguments |= {"global_pool": "avg", "fc_norm": True}
    if "cls_token" not in state:
        arguments |= {"class_token": False, "global_pool": "avg"}
    if "reg_token" in state:
        arguments["reg_tokens"] = state["reg_token"].shape[1]
    if "pos_embed" in state and _prefix_tokens(state) > 0:
        places, sides = state["pos_embed"].shape[1], arguments["img_size"]
        sides = [sides, sides] if isinstance(sides, int) else sides
        is_size = isinstance(sides, (list, tuple)) and [type(side) for side in sides] == [int, int]
        if is_size and places == (sides[0] // patch) * (sides[1] // patch):  # else timm says what is wrong
            arguments["no_embed_class"] = True
    if "blocks.0.ls1.gamma" in state:
        arguments["init_values"] = 1e-5  # the values themselves are in the file
    if not any(key in state for key in ("blocks.0.attn.qkv.bias", "blocks.0.attn.q_bias")):
        arguments["qkv_bias"] = False
    return name, arguments


def _prefix_tokens(state: Mapping[str, Tensor]) -> int:
    return ("cls_token" in state) + (state["reg_token"].shape[1] if "reg_token" in state else 0)


def _places_before(state: Mapping[str, Tensor]) -> int:
    """Places in ``pos_embed`` before those of the patches."""
    places, tokens = state["pos_embed"].shape[1], _prefix_tokens(state)
    return next((n for n in (tokens, 1, 0) if math.isqrt(places - n) ** 2 == places - n > 0), min(tokens, 1))


def _side(state: Mapping[str, Tensor], patch: int) -> list[int]:
    """Height and width in pixels of square images that have so many places."""
    if "pos_embed" in state:
        cells = state["pos_embed"].shape[1] - _places_before(state)
    else:
        table = next((state[name] for name in state if name.endswith("relative_position_bias_table")), None)
        # a table of a window n x n has (2n - 1)^2 + 3 rows, the three for the class token
        cells = 196 if table is None else ((math.isqrt(table.shape[0] - 3) + 1) // 2) ** 2
    side = math.isqrt(cells)
    if side * side != cells or side == 0:
        raise UserError(
            f"pos_embed has {cells} places, which is no square; give the size with --model_args "
            "'{img_size: [HEIGHT, WIDTH]}'"
        )
    return [side * patch, side * patch]
