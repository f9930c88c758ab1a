"""Words: from a part of an image, tell which visual words stand in each of its quarters (docs/methods.md, Words)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from freqmask.backbones import Backbone, ImageSize, eval_no_grad, height_and_width
from freqmask.errors import UserError
from freqmask.filters import Filter, Filtered, build_filter
from freqmask.heads import ReconstructionHead
from freqmask.images import Normalization
from freqmask.methods.method import Method, build_backbone, picture_keys, pictures, recorded
from freqmask.methods.mfm import corrupt
from freqmask.options import read_group
from freqmask.options.of_methods import WordsOptions
from freqmask.rng import combine, uniform

RADIUS_SHARE = 4  # the low-pass keeps a quarter of the shorter side: milder filters cost nothing, docs/log.md
TOKEN_SHARE = 0.5
LARGEST_WORD_SIDE = 64
WORD_PATCH, WORD_STRIDE = 6, 2  # pixels; Coates, Ng and Lee's best size on small photographs
FITTED_ON = 20_000  # patches: 80 for each of 256 words
ROUNDS = 8  # of k-means; more change the words of few patches
CONTRAST, RIDGE = 1e-3, 0.1  # added to a patch's variance, and to each direction's as a share of their mean


class Words(Method):
    """Masked visual words: what stands where, told from some patches and some frequencies of an image.

    loss = mean (head(pooled) - z)^2, with pooled the mean feature of the patches of x~ that the backbone is given, x~
    the image with frequencies hidden (``filter_share`` of the images), and z the standardised counts of each visual
    word in each cell of the whole, unfiltered image, see :class:`VisualWords`. A decoder for pictures is trained beside
    it on features through which no gradient returns.

    After Gidaris et al. (2020), who predict bags of words of a trained network's features; here words are whitened
    patches (Coates, Ng and Lee 2011), so that all bands of the spectrum count and nothing has to be trained before.

    Args:
        backbone: a timm model's name, or a :class:`~freqmask.backbones.Backbone`.
        image_size: side in pixels, or (height, width).
        channels: channels of the images.
        **options: those of :class:`~freqmask.options.of_methods.WordsOptions`.

    Raises:
        UserError: for an option out of range, or a token_share below 1 for a backbone that takes all patches.
    """

    name = "words"
    Options: ClassVar[type[WordsOptions]] = WordsOptions
    about = "hides patches and frequencies of an image; the network tells which visual words stand in its quarters"

    def __init__(
        self,
        backbone: str | Backbone = "vit_small_patch16_224",
        image_size: ImageSize = 224,
        channels: int = 3,
        **options: Any,
    ) -> None:
        given = read_group(self.Options, options)
        settings = recorded(
            {"backbone": backbone, "image_size": image_size, "channels": channels, **vars(given)}
        )
        super().__init__()
        size = height_and_width(image_size)
        self.normalise = Normalization(channels, given.mean, given.std)
        self.backbone = build_backbone(backbone, image_size, channels, given)
        self.filter = _filter(given, size)
        self.filter_share = given.filter_share
        self.token_share = _token_share(given.token_share, self.backbone)
        side = min(min(size), LARGEST_WORD_SIDE) if given.word_side == "auto" else given.word_side
        self.words = VisualWords(given.words, channels, given.word_grid, side)
        dim = self.backbone.feature_dim
        self.norm = nn.BatchNorm1d(dim)
        self.head = nn.Linear(dim, given.words * given.word_grid**2)
        self.decoder = ReconstructionHead(dim, channels, self.backbone.stride)
        radius = (
            min(size) / RADIUS_SHARE if given.filter == "lowpass" and given.radius == "auto" else given.radius
        )
        self.settings = {**settings, "radius": radius, "token_share": self.token_share, "word_side": side}

    def forward(
        self,
        views: Sequence[Float[Tensor, "batch channel height width"]],
        keys: Int64[Tensor, " batch"] | None = None,
        details: bool = False,
    ) -> dict[str, Float[Tensor, ""]]:
        """The loss of one view of each image with its parts ``word_loss`` and ``picture_loss``, see :class:`Method`."""
        (images,), keys = self.checked(views, keys)
        filtered = self.hidden(images, combine(keys, 0)).images
        cells, places = self.encode(self.normalise(filtered), combine(keys, 1))
        target = self.words(images)
        word_loss = F.mse_loss(self.head(self.normed(cells.mean(dim=1))).float(), target)
        picture_loss = self.picture_loss(cells.detach(), places, self.normalise(images))
        parts = {
            "loss": word_loss + picture_loss,
            "word_loss": word_loss.detach(),
            "picture_loss": picture_loss.detach(),
        }
        if details:
            parts["relative_loss"] = (word_loss / target.square().mean()).detach()
        return parts

    def hidden(
        self, images: Float[Tensor, "batch channel height width"], keys: Int64[Tensor, " batch"]
    ) -> Filtered:
        """The images, frequencies of some of them hidden, and keep (1 throughout for the others)."""
        filtered = corrupt(self.filter, images, keys, clamp=True)
        chosen = (uniform(keys, "filtered", (1,)) < self.filter_share).view(-1, 1, 1, 1)
        return Filtered(torch.where(chosen, filtered.images, images), torch.where(chosen, filtered.keep, 1.0))

    def encode(
        self, images: Float[Tensor, "batch channel height width"], keys: Int64[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch cell dim"], Int64[Tensor, "batch cell"] | None]:
        """Features of the cells that the backbone was given, and their places; None: all, in order."""
        if self.token_share == 1:
            return self.backbone(images).feature_map.flatten(2).mT, None
        height, width = self.backbone.padded(images).shape[-2:]
        count = height * width // self.backbone.stride**2
        order = uniform(keys, "tokens", (count,)).argsort(dim=1)
        places = order[:, : max(1, round(self.token_share * count))]
        return self.backbone.read_tokens(images, places), places

    def normed(self, pooled: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Batch norm; a single image, which has no batch statistics, takes the running ones."""
        norm = self.norm
        training = self.training and len(pooled) > 1
        statistics = norm.running_mean, norm.running_var
        return F.batch_norm(
            pooled, *statistics, norm.weight, norm.bias, training, norm.momentum or 0.0, norm.eps
        )

    def picture_loss(
        self,
        cells: Float[Tensor, "batch cell dim"],
        places: Int64[Tensor, "batch cell"] | None,
        target: Float[Tensor, "batch channel height width"],
    ) -> Float[Tensor, ""]:
        """How far the decoder's pixels are from the cells' own, for the pictures alone."""
        convolution: Any = self.decoder[0]
        weight, bias = convolution.weight.flatten(1), convolution.bias
        wanted = F.pixel_unshuffle(self.backbone.padded(target), self.backbone.stride).flatten(2).mT
        if places is not None:
            wanted = torch.gather(wanted, 1, places[..., None].expand(-1, -1, wanted.shape[-1]))
        return F.mse_loss(F.linear(cells, weight, bias).float(), wanted)

    @torch.no_grad()
    def reconstruct(
        self, images: Float[Tensor, "batch channel height width"], keys: Int64[Tensor, " batch"] | None = None
    ) -> dict[str, Tensor]:
        """Original, filtered, what a linear decoder sees in the features, the missing part filled in."""
        keys = picture_keys(images) if keys is None else keys
        filtered = corrupt(self.filter, images, keys, clamp=True)
        with eval_no_grad(self):
            cells = self.backbone(self.normalise(filtered.images)).feature_map
            prediction = self.normalise.inverse(self.decoder(cells, (images.shape[-2], images.shape[-1])))
        return pictures(images, filtered.images, prediction, filtered.keep)


class VisualWords(nn.Module):
    """How often each of some whitened patches stands in each cell of an image, standardised.

    Patches of 6x6 pixels, every second one, are freed of brightness and contrast, and whitened, so that every
    frequency has the same weight. A patch speaks for the words that are nearer to it than the average word
    (``max(0, cosine - mean cosine)``); a cell is the mean of its patches. Words are found by k-means, whitening and
    scale likewise, in the first batch that is given, the same for the same batch; they are part of the state.

    Args:
        count: words K.
        channels: channels C.
        grid: cells a side.
        side: shorter side in pixels that images are reduced to; smaller ones stay.
    """

    weight: Tensor
    offset: Tensor
    mean: Tensor
    scale: Tensor
    found: Tensor

    def __init__(self, count: int, channels: int, grid: int = 2, side: int = 64) -> None:
        super().__init__()
        self.count, self.grid, self.side = count, grid, side
        self.register_buffer("weight", torch.zeros(count, channels, WORD_PATCH, WORD_PATCH))
        self.register_buffer("offset", torch.zeros(count))
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("scale", torch.ones(count))
        self.register_buffer("found", torch.tensor(False))
        self._found = False  # the buffer's value once it was True: a look at it makes a GPU wait

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch numbers"]:
        """Standardised counts (B, K grid^2) of images in [0, 1]; the first batch also finds the words."""
        with torch.autocast(images.device.type, enabled=False):
            images = self._reduced(images.float())
            self._found = self._found or bool(self.found)
            if not self._found:
                self.find(images)
            cells = F.adaptive_avg_pool2d(self._activations(images), self.grid)
            return ((cells - self.mean[:, None, None]) * self.scale[:, None, None]).flatten(1)

    @torch.no_grad()
    def find(self, images: Float[Tensor, "batch channel height width"]) -> None:
        """Find whitening, words and scale in some images, the same on every process."""
        patches = F.unfold(images, WORD_PATCH).mT.flatten(0, 1)
        patches = patches[:: max(1, len(patches) // FITTED_ON)]
        variance, mean = torch.var_mean(patches, dim=1, keepdim=True, correction=0)
        patches = (patches - mean) / (variance + CONTRAST).sqrt()
        center = patches.mean(dim=0)
        variances, directions = torch.linalg.eigh(torch.cov((patches - center).mT))
        whitening = (
            directions * (variances + RIDGE * variances.mean()).clamp_min(1e-12).rsqrt() @ directions.mT
        )
        patches = F.normalize((patches - center) @ whitening, dim=1)
        words = _spherical_k_means(patches, self.count)
        self.weight.copy_((whitening @ words.mT).mT.reshape(self.weight.shape))
        self.offset.copy_(center @ whitening @ words.mT)
        cells = F.adaptive_avg_pool2d(self._activations(images), self.grid)
        self.mean.copy_(cells.mean(dim=(0, 2, 3)))
        self.scale.copy_(1 / cells.std(dim=(0, 2, 3), correction=0).clamp_min(1e-4))
        self.found.fill_(True)
        self._found = True
        if distributed.is_available() and distributed.is_initialized():
            for buffer in (self.weight, self.offset, self.mean, self.scale):
                distributed.broadcast(buffer, 0)

    def _reduced(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        share = self.side / min(height, width)
        if share >= 1:
            return images
        size = (max(self.side, round(height * share)), max(self.side, round(width * share)))
        return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)

    def _activations(self, images: Tensor) -> Tensor:
        """One convolution does it all: contrast and brightness of a patch come out of its sums."""
        padded = F.pad(images, [WORD_PATCH // 2 - 1] * 4, mode="reflect")
        similar = F.conv2d(padded, self.weight, stride=WORD_STRIDE)
        mean = F.avg_pool2d(padded.mean(1, keepdim=True), WORD_PATCH, WORD_STRIDE)
        square = F.avg_pool2d(padded.square().mean(1, keepdim=True), WORD_PATCH, WORD_STRIDE)
        contrast = ((square - mean.square()).clamp_min(0) + CONTRAST).rsqrt()
        similar = (similar - mean * self.weight.sum((1, 2, 3))[:, None, None]) * contrast
        similar = similar - self.offset[:, None, None]
        return F.relu(similar - similar.mean(dim=1, keepdim=True))


def _spherical_k_means(patches: Float[Tensor, "patch dim"], count: int) -> Float[Tensor, "word dim"]:
    """Centers of unit length, begun at patches spread evenly over all."""
    spread = torch.linspace(0, len(patches) - 1, count, device=patches.device).round().long()
    words = patches[spread]
    for _ in range(ROUNDS):
        nearest = (patches @ words.mT).argmax(dim=1)
        sums = torch.zeros_like(words).index_add_(0, nearest, patches)
        words = F.normalize(sums + 1e-6 * words, dim=1)  # a word that is nobody's nearest stays
    return words


def _filter(options: WordsOptions, size: tuple[int, int]) -> Filter:
    """The low-pass of a quarter of the side, or the filter that was named, which has its radius inside."""
    if options.filter == "lowpass":
        radius = min(size) / RADIUS_SHARE if options.radius == "auto" else options.radius
        return build_filter(f"lowpass(radius={radius!r})", size)
    if options.radius != "auto":
        raise UserError(
            f"radius ({options.radius}) is not used by filter {options.filter}; write it inside, as in "
            "'highpass(radius=8)'"
        )
    return build_filter(options.filter, size)


def _token_share(share: float | str, backbone: Backbone) -> float:
    """The share of patches, 1 where the backbone takes all."""
    if share == "auto":
        return TOKEN_SHARE if backbone.can_leave_tokens_out else 1.0
    if float(share) < 1 and not backbone.can_leave_tokens_out:
        raise UserError(
            f"token_share ({share}) must be 1 for {backbone.name}, which takes all patches; try token_share=auto"
        )
    return float(share)
