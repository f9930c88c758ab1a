"""Words: which visual words stand where, from some patches and frequencies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import CNN, VIT, photographs, tiny_method, views_for

from freqmask.errors import UserError
from freqmask.methods import build_method
from freqmask.methods.words import CONTRAST, WORD_PATCH, VisualWords, _some_patches

KEYS = torch.arange(4)


def found_words(count: int = 12, grid: int = 2, side: int = 64) -> VisualWords:
    words = VisualWords(count, 3, grid, side)
    words(photographs(8))
    return words


def slow_counts(words: VisualWords, image: np.ndarray) -> np.ndarray:
    """Patch by patch in float64: free of brightness and contrast, whitened, above the mean similarity, averaged."""
    weight = words.weight.double().numpy().reshape(words.count, -1)
    padded = np.pad(image.astype(np.float64), ((0, 0), (2, 2), (2, 2)), mode="reflect")
    rows = (padded.shape[1] - 6) // 2 + 1
    found = np.zeros((rows, rows, words.count))
    for row in range(rows):
        for column in range(rows):
            patch = padded[:, 2 * row : 2 * row + 6, 2 * column : 2 * column + 6].ravel()
            patch = (patch - patch.mean()) / np.sqrt(patch.var() + CONTRAST)
            similar = weight @ patch - words.offset.double().numpy()
            found[row, column] = np.maximum(similar - similar.mean(), 0)
    half = rows // 2
    cells = [found[r : r + half, c : c + half].mean((0, 1)) for r in (0, half) for c in (0, half)]
    standard = (np.stack(cells) - words.mean.numpy()) * words.scale.numpy()
    return standard.T.ravel()  # word by word, its cells side by side


def test_counts_are_those_of_a_slow_loop_over_patches() -> None:
    words = found_words()
    image = photographs(1, seed=5)
    np.testing.assert_allclose(words(image)[0].numpy(), slow_counts(words, image[0].numpy()), atol=2e-4)


def test_words_are_found_once_and_travel_with_the_state() -> None:
    words = found_words()
    before = words.weight.clone()
    words(photographs(8, seed=9))
    assert torch.equal(words.weight, before)
    again = VisualWords(12, 3)
    again.load_state_dict(words.state_dict())
    image = photographs(2, seed=3)
    assert torch.equal(again(image), words(image))
    assert torch.equal(again.weight, before)


def test_words_are_those_of_k_means_on_whitened_patches_in_numpy() -> None:
    images = photographs(16)
    words = VisualWords(10, 3)
    words(images)
    patches = np.stack(
        [
            image[:, row : row + 6, column : column + 6].ravel()
            for image in images.double().numpy()
            for row in range(27)
            for column in range(27)
        ]
    )
    patches = (patches - patches.mean(1, keepdims=True)) / np.sqrt(patches.var(1, keepdims=True) + CONTRAST)
    variances, directions = np.linalg.eigh(np.cov(patches.T))
    whitening = directions / np.sqrt(variances + 0.1 * variances.mean()) @ directions.T
    white = (patches - patches.mean(0)) @ whitening
    white /= np.linalg.norm(white, axis=1, keepdims=True)
    centers = white[np.linspace(0, len(white) - 1, 10).round().astype(int)]
    for _ in range(8):
        nearest = (white @ centers.T).argmax(1)
        centers = np.stack([white[nearest == number].sum(0) for number in range(10)])
        centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    np.testing.assert_allclose(words.weight.flatten(1).numpy(), centers @ whitening, atol=0.02)


def test_brightness_and_contrast_change_no_count_much() -> None:
    words = found_words()
    image = 0.25 + 0.5 * photographs(2, seed=3)
    changed = 0.1 + 0.8 * image
    close = (words(image) - words(changed)).abs().mean() / words(image).abs().mean()
    other = (words(image) - words(photographs(2, seed=4))).abs().mean() / words(image).abs().mean()
    assert close < 0.2 * other


def test_large_images_are_reduced_before_their_words_are_read() -> None:
    words = VisualWords(8, 3, side=32)
    large = torch.nn.functional.interpolate(photographs(8), size=(96, 128), mode="bicubic").clamp(0, 1)
    assert words(large).shape == (8, 8 * 4)
    assert words._reduced(large).shape[-2:] == (32, 43)
    sides = [build_method("words", **{**VIT, "image_size": size}).settings["word_side"] for size in (16, 64)]
    assert sides == [16, 32]  # of larger images it is words of a small one that teach (docs/log.md)


def test_the_backbone_is_given_the_share_of_patches() -> None:
    method = tiny_method("words", {**VIT, "patch_size": 4})
    seen: list[int] = []
    method.backbone.timm_model.blocks[0].register_forward_hook(
        lambda _, given, __: seen.append(given[0].shape[1])
    )
    method(views_for(method), KEYS)
    assert seen == [1 + 32]  # class token and half of 64


def test_tokens_of_all_places_are_the_feature_map() -> None:
    backbone = tiny_method("words").backbone.eval()
    images = photographs(2)
    places = torch.randperm(16)[None].repeat(2, 1)
    tokens = backbone.read_tokens(images, places)
    whole = backbone(images).feature_map.flatten(2).mT
    assert torch.allclose(tokens, whole.gather(1, places[..., None].expand_as(whole)), atol=1e-5)


def test_no_gradient_of_the_pictures_reaches_the_backbone() -> None:
    method = tiny_method("words")
    cells, places = method.see(photographs(4), KEYS)
    method.picture_loss(cells.detach(), places, photographs(4)).backward()
    assert all(parameter.grad is None for parameter in method.backbone.parameters())
    assert method.decoder[0].weight.grad is not None


def test_the_share_of_filtered_images_and_the_radius_are_those_asked_for() -> None:
    method = tiny_method("words", filter_share=0.25)
    assert method.settings["radius"] == 8.0  # a quarter of 32
    images = photographs(400)
    filtered = method.hidden(images, torch.arange(400))
    changed = (filtered.images != images).flatten(1).any(1)
    assert 60 < changed.sum() < 140
    assert torch.equal(changed, (filtered.keep < 1).flatten(1).any(1))


@pytest.mark.parametrize(
    ("network", "options", "sentence"),
    [
        (CNN, {"token_share": 0.5}, r"token_share \(0.5\) must be 1 for resnet18"),
        (VIT, {"filter": "com", "radius": 4.0}, r"radius \(4.0\) is not used by filter com"),
        (VIT, {"token_share": 1.5}, r"token_share \(1.5\) must be"),
        ({**VIT, "image_size": (7, 40), "patch_size": 1}, {}, r"image_size \(7\) must be at least 8 pixels"),
    ],
)
def test_options_out_of_place_end_in_a_sentence(network: dict, options: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        tiny_method("words", network, **options)


def test_one_image_is_no_batch_but_trains() -> None:
    method = build_method("words", **{**VIT, "words": 16})
    method(views_for(method), KEYS)
    assert torch.isfinite(method([photographs(1)], KEYS[:1])["loss"])


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_blank_images_have_no_words_and_those_of_the_next_batch_are_found(level: float) -> None:
    words, photos = VisualWords(12, 3), photographs(8)
    assert not words(torch.full((4, 3, 32, 32), level)).any()
    assert torch.equal(words(photos), VisualWords(12, 3)(photos))
    blank = tiny_method("words")([torch.full((4, 3, 32, 32), level)], KEYS, details=True)
    assert torch.isfinite(blank["loss"]) and torch.isnan(blank["relative_loss"])


def test_the_paper_of_a_page_takes_no_words_from_what_is_written_on_it() -> None:
    pages = torch.ones(40, 1, 32, 32)
    pages[:, :, 8:20, 12:24] = photographs(40, 1, (12, 12))  # seven eighths are blank
    words = VisualWords(24, 1)
    words(pages)
    assert len(torch.unique(words.weight.flatten(1), dim=0)) == 24


def test_one_image_of_one_cell_tells_no_spread_and_blows_up_no_target() -> None:
    words, photos = VisualWords(12, 3, grid=1), photographs(8)
    words(photos[:1])
    assert words(photos).abs().max() < 50  # it was 7,000


def test_some_patches_are_spread_over_all_images_as_every_so_manieth_of_the_whole_unfolding() -> None:
    images = torch.rand(19, 3, 13, 17)
    whole = F.unfold(images, WORD_PATCH).mT.flatten(0, 1)
    for count in (1, 50, 700, 10**6):
        assert torch.equal(_some_patches(images, count), whole[:: max(1, len(whole) // count)])
