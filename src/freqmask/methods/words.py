"""Words: from a part of an image, tell which visual words stand in each of its quarters (docs/methods.md, Words)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from freqmask.backbones import Backbone, height_and_width
from freqmask.errors import UserError
from freqmask.filters import Filtered, build_filter
from freqmask.heads import FeatureNorm
from freqmask.methods.method import Method
from freqmask.options.of_methods import PartlySeenOptions, WordsOptions
from freqmask.rng import Keys, combine, uniform
from freqmask.spectrum import Images

# Of words alone; filters by themselves, and MFM and FOLK, have DEFAULT_RADIUS_AT_224 of filters/fixed.py.
RADIUS_SHARE = 4  # the low-pass keeps a quarter of the shorter side: milder filters cost nothing, docs/log.md
TOKEN_SHARE = 0.5
SMALLEST_SIDE = 8  # pixels that a word's patch and some places for it fit into
LARGEST_WORD_SIDE = 32  # finer words say less of the whole: at 64 pixels 57 against 46 % (docs/log.md)
WORD_PATCH, WORD_STRIDE = 6, 2  # pixels; Coates, Ng and Lee's best size on small photographs
FITTED_ON = 20_000  # patches: 80 for each of 256 words
AT_ONCE = 16  # images
ROUNDS = 8  # of k-means; more change the words of few patches
LEAST_SPREAD = 0.1  # of a word's counts, as a share of their mean; on CIFAR-10 it is 0.36 to 1.7
BLANK = 1e-6  # variance of a patch, a quarter of a level of 8 bits: nothing to be seen
CONTRAST, RIDGE = 1e-3, 0.1  # added to a patch's variance, and to each direction's as a share of their mean


class PartlySeen(Method):
    """A backbone that is given some patches of x~, the image with frequencies hidden; a linear decoder for pictures.

    ``filter_share`` of the images are filtered; what the network is to tell from the rest is a subclass's matter.
    """

    Options: ClassVar[type[PartlySeenOptions]]
    backbone: Backbone
    tiny_lr = (2e-3, 128)  # of the trials in docs/log.md

    def build(self, options: Any) -> None:
        """Filter, heads and decoder."""
        settings, size = self.settings, height_and_width(self.settings["image_size"])
        text, radius, share = options.filter, options.radius, options.token_share
        if text == "lowpass":
            if radius == "auto":
                radius = settings["radius"] = min(size) / RADIUS_SHARE
            text = f"lowpass(radius={radius!r})"
        elif radius != "auto":
            raise UserError(
                f"radius ({radius}) is not used by filter {text}; write it inside, as in 'highpass(radius=8)'"
            )
        self.filter, self.filter_share = build_filter(text, size), options.filter_share
        if share == "auto":
            share = TOKEN_SHARE if self.backbone.can_leave_tokens_out else 1.0
        elif float(share) < 1 and not self.backbone.can_leave_tokens_out:
            raise UserError(
                f"token_share ({share}) must be 1 for {self.backbone.name}, which takes all patches; try "
                "token_share=auto"
            )
        self.token_share = settings["token_share"] = float(share)
        self.add_heads(options)
        self.decoder = self.make_decoder()

    @abstractmethod
    def add_heads(self, options: Any) -> None:
        """What the features are asked through, by the options; ``settings`` gets what was ``auto`` among them."""

    def hidden(self, images: Images, keys: Keys) -> Filtered:
        """The images, frequencies of some of them hidden, and keep (1 throughout for the others)."""
        filtered = self.filter(images, keys, clamp=True)
        chosen = (uniform(keys, "filtered", (1,)) < self.filter_share).view(-1, 1, 1, 1)
        return Filtered(torch.where(chosen, filtered.images, images), torch.where(chosen, filtered.keep, 1.0))

    def see(
        self, images: Images, keys: Keys
    ) -> tuple[Float[Tensor, "batch cell dim"], Int64[Tensor, "batch cell"] | None]:
        """Features of the cells that the backbone is given of x~, and their places; None: all, in order.

        Args:
            images: whole, in [0, 1].
            keys: one an image.
        """
        images = self.normalise(self.hidden(images, combine(keys, 0)).images)
        if self.token_share == 1:
            return self.backbone(images).feature_map.flatten(2).mT, None
        height, width = self.backbone.padded(images).shape[-2:]
        count = height * width // self.backbone.stride**2
        order = uniform(combine(keys, 1), "tokens", (count,)).argsort(dim=1)
        places = order[:, : max(1, round(self.token_share * count))]
        return self.backbone.read_tokens(images, places), places

    def picture_loss(
        self,
        cells: Float[Tensor, "batch cell dim"],
        places: Int64[Tensor, "batch cell"] | None,
        images: Images,
    ) -> Float[Tensor, ""]:
        """How far the decoder's pixels are from the cells' own in the whole images, normalized."""
        convolution: Any = self.decoder[0]
        weight, bias = convolution.weight.flatten(1), convolution.bias
        padded = self.backbone.padded(self.normalise(images))
        wanted = at_places(F.pixel_unshuffle(padded, self.backbone.stride), places)
        return F.mse_loss(F.linear(cells, weight, bias).float(), wanted)


def at_places(
    cells: Float[Tensor, "batch dim rows columns"], places: Int64[Tensor, "batch cell"] | None
) -> Float[Tensor, "batch cell dim"]:
    """A map's cells as a sequence: those at ``places``, row by row from 0; None: all."""
    sequence = cells.flatten(2).mT
    if places is None:
        return sequence
    return torch.gather(sequence, 1, places[..., None].expand(-1, -1, sequence.shape[-1]))


class Words(PartlySeen):
    """Masked visual words: what stands where, told from some patches and some frequencies of an image.

    loss = mean (head(pooled) - z)^2, with pooled the mean feature of the patches of x~ that the backbone is given, x~
    the image with frequencies hidden (``filter_share`` of the images), and z the standardized counts of each visual
    word in each cell of the whole, unfiltered image, see :class:`VisualWords`. A decoder for pictures is trained beside
    it on features through which no gradient returns.

    After Gidaris et al. (2020), who predict bags of words of a trained network's features; here words are whitened
    patches (Coates, Ng and Lee 2011), so that all bands of the spectrum count and nothing has to be trained before.

    Its options are those of :class:`~freqmask.options.of_methods.WordsOptions`.
    """

    name = "words"
    Options: ClassVar[type[WordsOptions]] = WordsOptions
    parts = ("word_loss", "picture_loss")
    about = "hides patches and frequencies of an image; the network tells which visual words stand in its quarters"

    def add_heads(self, options: WordsOptions) -> None:
        """The words, and a linear layer behind a batch norm that tells them."""
        side, shorter = options.word_side, min(height_and_width(self.settings["image_size"]))
        if shorter < SMALLEST_SIDE:
            raise UserError(
                f"image_size ({shorter}) must be at least {SMALLEST_SIDE} pixels for words of {WORD_PATCH}; try a "
                "larger one, or --method mfm"
            )
        if side == "auto":
            side = self.settings["word_side"] = min(shorter, LARGEST_WORD_SIDE)
        self.words = VisualWords(options.words, self.backbone.channels, options.word_grid, side)
        self.norm = FeatureNorm(self.backbone.feature_dim)
        self.head = nn.Linear(self.backbone.feature_dim, options.words * options.word_grid**2)

    def forward(
        self, views: Sequence[Images], keys: Keys | None = None, details: bool = False
    ) -> dict[str, Float[Tensor, ""]]:
        """The loss of one view of each image with its parts ``word_loss`` and ``picture_loss``, see :class:`Method`."""
        (images,), keys = self.checked(views, keys)
        cells, places = self.see(images, keys)
        target = self.words(images)
        word_loss = F.mse_loss(self.head(self.norm(cells.mean(dim=1))).float(), target)
        picture_loss = self.picture_loss(cells.detach(), places, images)
        parts = {
            "loss": word_loss + picture_loss,
            "word_loss": word_loss.detach(),
            "picture_loss": picture_loss.detach(),
        }
        if details:
            at_zero = target.square().mean()  # 0 for blank images
            parts["relative_loss"] = (word_loss / at_zero.where(at_zero > 0, torch.nan)).detach()
        return parts


class VisualWords(nn.Module):
    """How often each of some whitened patches stands in each cell of an image, standardized.

    Patches of 6x6 pixels, every second one, are freed of brightness and contrast, and whitened, so that every
    frequency has the same weight. A patch speaks for the words that are nearer to it than the average word
    (``max(0, cosine - mean cosine)``); a cell is the mean of its patches. Words are found by k-means, whitening and
    scale likewise, in the first batch that is given and is not blank, the same for the same batch; they are part of the
    state.

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

    def __init__(self, count: int, channels: int, grid: int = 2, side: int = LARGEST_WORD_SIDE) -> None:
        super().__init__()
        self.count, self.grid, self.side = count, grid, side
        self.register_buffer("weight", torch.zeros(count, channels, WORD_PATCH, WORD_PATCH))
        self.register_buffer("offset", torch.zeros(count))
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("scale", torch.ones(count))
        self.register_buffer("found", torch.tensor(False))
        self._found = False  # the buffer's value once it was True: a look at it makes a GPU wait

    @torch.no_grad()
    def forward(self, images: Images) -> Float[Tensor, "batch numbers"]:
        """Standardized counts (B, K grid^2) of images in [0, 1]; the first batch also finds the words."""
        with torch.autocast(images.device.type, enabled=False):
            images = self._reduced(images.float())
            self._found = self._found or bool(self.found)
            if not self._found:
                self.find(images)
                self._found = bool(self.found)
            cells = self._cells(images)
            return ((cells - self.mean[:, None, None]) * self.scale[:, None, None]).flatten(1)

    @torch.no_grad()
    def find(self, images: Images) -> None:
        """Find whitening, words and scale in some images, the same on every process; blank ones have none."""
        patches = _some_patches(images, FITTED_ON)
        variance, mean = torch.var_mean(patches, dim=1, keepdim=True, correction=0)
        patches = (patches - mean) / (variance + CONTRAST).sqrt()
        center = patches.mean(dim=0)
        variances, directions = torch.linalg.eigh(torch.cov((patches - center).mT))
        scale = (variances + RIDGE * variances.mean()).clamp_min(1e-12).rsqrt()
        whitening = directions * scale @ directions.mT
        patches = F.normalize((patches - center) @ whitening, dim=1)
        seen = variance.flatten() > BLANK  # else most words of a page would be its paper
        words = _spherical_k_means(patches[seen] if seen.any() else patches, self.count)
        self.weight.copy_((whitening @ words.mT).mT.reshape(self.weight.shape))
        self.offset.copy_(center @ whitening @ words.mT)
        cells = self._cells(images)
        self.mean.copy_(cells.mean(dim=(0, 2, 3)))
        # a word as good as constant in this batch need not be so in the next one
        spread = cells.std(dim=(0, 2, 3), correction=0).maximum(LEAST_SPREAD * self.mean).clamp_min(1e-4)
        self.found.copy_(seen.any())
        self.scale.copy_(self.found / spread)
        if distributed.is_available() and distributed.is_initialized():
            for buffer in (self.weight, self.offset, self.mean, self.scale, self.found):
                distributed.broadcast(buffer, 0)

    def _reduced(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        share = self.side / min(height, width)
        if share >= 1:
            return images
        size = (max(self.side, round(height * share)), max(self.side, round(width * share)))
        return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)

    def _cells(self, images: Tensor) -> Float[Tensor, "batch word row column"]:
        """One convolution does it all: contrast and brightness of a patch come out of its sums."""
        # Both means are taken out of the words, not of what they answer: a fifth of the time at 64 pixels.
        weight = self.weight.float()  # bf16-true: no autocast casts
        weight = weight - weight.mean(dim=0)
        weight, offset = weight - weight.mean(dim=(1, 2, 3), keepdim=True), self.offset - self.offset.mean()
        # Parts that stay in a CPU's cache: answers are 256 numbers at every second pixel.
        parts = images.split(AT_ONCE) if images.device.type == "cpu" else (images,)
        return torch.cat([self._cells_of(part, weight, offset[:, None, None]) for part in parts])

    def _cells_of(self, images: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
        padded = F.pad(images, [WORD_PATCH // 2 - 1] * 4, mode="reflect")
        mean = F.avg_pool2d(padded.mean(1, keepdim=True), WORD_PATCH, WORD_STRIDE)
        square = F.avg_pool2d(padded.square().mean(1, keepdim=True), WORD_PATCH, WORD_STRIDE)
        contrast = ((square - mean.square()).clamp_min(0) + CONTRAST).rsqrt()
        answers = F.conv2d(padded, weight, stride=WORD_STRIDE).mul_(contrast).sub_(offset).relu_()
        return F.adaptive_avg_pool2d(answers, self.grid)


def _some_patches(images: Tensor, count: int) -> Float[Tensor, "patch dim"]:
    """At least ``count`` patches spread evenly over all, where there are so many; all at once would be gigabytes."""
    height, width = images.shape[-2:]
    every = max(1, len(images) * (height - WORD_PATCH + 1) * (width - WORD_PATCH + 1) // count)
    found, before = [], 0
    for part in images.split(8):
        patches = F.unfold(part, WORD_PATCH).mT.flatten(0, 1)
        found.append(patches[-before % every :: every])
        before += len(patches)
    return torch.cat(found)


def _spherical_k_means(patches: Float[Tensor, "patch dim"], count: int) -> Float[Tensor, "word dim"]:
    """Centers of unit length, begun at patches spread evenly over all."""
    spread = torch.linspace(0, len(patches) - 1, count, dtype=torch.float64).round().long()
    words = patches[spread.to(patches.device)]
    for _ in range(ROUNDS):
        nearest = (patches @ words.mT).argmax(dim=1)
        sums = torch.zeros_like(words).index_add_(0, nearest, patches)
        words = F.normalize(sums + 1e-6 * words, dim=1)  # a word that is nobody's nearest stays
    return words
