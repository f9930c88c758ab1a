"""Folders of images and masks: layouts, labels, partners, crops, and what is refused."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from evaluation.segmentation_images import blocks, make_data, make_pairs, write
from odd_images import missing_for_now
from PIL import Image

from freqmask.data.values import ValueRange
from freqmask.errors import BadImage, UserError
from freqmask.evaluation.mask_data import (
    IGNORED,
    Labels,
    MaskConfig,
    open_segmentation,
    read_classes,
)
from freqmask.evaluation.mask_files import PairDataset, PairSource, Part, RandomCrop, nearest, read_mask


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_both_ways_to_lay_out_splits_hold_the_same_pairs(tmp_path: Path) -> None:
    make_data(tmp_path / "one", 3, 2)
    for split, count, first in (("train", 3, 0), ("test", 2, 100)):
        make_pairs(tmp_path / "other" / split / "images", tmp_path / "other" / split / "labels", count, first)
    one, other = (open_segmentation(MaskConfig(data=str(tmp_path / name))) for name in ("one", "other"))
    assert (len(one.train), len(one.test)) == (len(other.train), len(other.test)) == (3, 2)
    assert one.labels == other.labels == Labels((0, 1), ("0", "1"), (255,), False)


def test_a_mask_rewritten_under_its_name_is_read_again(tmp_path: Path) -> None:
    folder = make_data(tmp_path / "data", 3, 2)
    masks = folder / "masks" / "train"
    for classes in ((0, 1), (0, 1, 2)):
        os.utime(masks, (0, 0))  # as one that has not changed for long
        assert open_segmentation(MaskConfig(data=str(folder))).labels.values == classes
        mask = np.asarray(read_mask(masks / "000.png"), np.uint8)
        mask[0, 0] = 2
        write(masks / "000.png", mask)


def test_an_image_that_could_not_be_opened_once_is_opened_again(tmp_path: Path) -> None:
    folder = make_data(tmp_path / "data", 3, 2)
    with missing_for_now(folder / "images" / "train" / "001.png"):
        for _ in range(2):
            assert len(open_segmentation(MaskConfig(data=str(folder))).train) == 2
    assert len(open_segmentation(MaskConfig(data=str(folder))).train) == 3


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_gray_of_few_bits_is_labels_as_stored(tmp_path: Path, bits: int) -> None:
    # Pillow spreads 2 and 4 bits over 0 to 255 and writes neither
    labels = np.arange(35).reshape(5, 7) % 2**bits
    digits = (labels[..., None] >> np.arange(bits)[::-1]) & 1
    rows = np.packbits(digits.reshape(5, -1).astype(bool), axis=1)
    header = struct.pack(">IIBBBBB", 7, 5, bits, 0, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in ((b"IHDR", header), (b"IDAT", content), (b"IEND", b"")):
        parts += [struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(kind + data))]
    (tmp_path / "mask.png").write_bytes(b"".join(parts))
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), labels)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "mask.png")) > 0, labels > 0), "it is a PNG"


def test_sixteen_bits_with_opacity_or_colors_are_refused(tmp_path: Path) -> None:
    labels = np.arange(12, dtype=np.uint16).reshape(3, 4)
    for count in (1, 2, 3, 4):
        encoded = imagecodecs.png_encode(labels if count == 1 else np.stack([labels] * count, axis=-1))
        (tmp_path / "mask.png").write_bytes(encoded)
        if count == 1:
            np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), labels)
        else:
            with pytest.raises(BadImage, match="16 bits"):
                read_mask(tmp_path / "mask.png")


def test_gray_with_opacity_is_labels(tmp_path: Path) -> None:
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for mode in ("LA", "RGBA"):
        Image.fromarray(labels).convert(mode).save(tmp_path / "mask.png")
        np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), labels)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)])
def test_a_row_or_a_column_of_pixels_is_a_mask_in_any_format(tmp_path: Path, shape: tuple[int, int]) -> None:
    labels = np.arange(shape[0] * shape[1], dtype=np.uint8).reshape(shape)
    tifffile.imwrite(tmp_path / "m.tif", labels)
    np.save(tmp_path / "m.npy", labels)
    Image.fromarray(labels).save(tmp_path / "m.png")
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(read_mask(path), labels)


@pytest.mark.parametrize("values", [(0, 3), (0, 5), (7,), (0, 255), tuple(range(256))])
def test_gray_in_a_gif_is_labels_whatever_its_palette_is(tmp_path: Path, values: tuple[int, ...]) -> None:
    labels = np.resize(np.array(values, np.uint8), (20, 30))
    for options in ({}, {"optimize": False}, {"transparency": values[0]}):
        Image.fromarray(labels).save(tmp_path / "mask.gif", **options)
        np.testing.assert_array_equal(read_mask(tmp_path / "mask.gif"), labels)


def test_colors_of_a_gif_are_no_labels(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 2], [2, 0]], np.uint8))
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])  # Pillow writes the numbers 0 and 1
    image.save(tmp_path / "mask.gif")
    with pytest.raises(BadImage, match="colors"):
        read_mask(tmp_path / "mask.gif")


def test_ade20k_ignores_zero_and_begins_with_one(tmp_path: Path) -> None:
    for split, first in (("training", 0), ("validation", 9)):
        make_pairs(tmp_path / "images" / split, tmp_path / "annotations" / split, 2, first)
        for path in (tmp_path / "annotations" / split).iterdir():
            mask = np.asarray(read_mask(path), np.uint8) + 1
            mask[:4] = 0
            write(path, mask)
    data = open_segmentation(MaskConfig(data=str(tmp_path), class_names=["wall", "sky"]))
    assert data.labels == Labels((1, 2), ("wall", "sky"), (0, 255), True)
    assert data.labels.lookup()[[0, 1, 2, 255]].tolist() == [IGNORED, 0, 1, IGNORED]
    assert data.split == "training / validation"
    (tmp_path / "classes.txt").write_text("wall\nsky\n")
    assert open_segmentation(MaskConfig(data=str(tmp_path))).labels == data.labels
    (tmp_path / "classes.txt").unlink()
    plain = open_segmentation(MaskConfig(data=str(tmp_path), layout="plain"))
    assert plain.labels.values == (0, 1, 2)


def test_a_class_called_void_is_ignored_and_numbers_may_stand_before_names(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    (data / "classes.txt").write_text("1 Road\n0 Sky\n11 Unlabelled\n")
    labels = open_segmentation(MaskConfig(data=str(data))).labels
    assert (labels.values, labels.names, labels.ignored) == ((0, 1), ("Sky", "Road"), (11, 255))
    (data / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t5\t1\t1\twall, plain\n"
    )
    assert read_classes(data / "objectInfo150.txt") == {1: "wall"}


def test_without_a_test_part_images_are_held_out_once_and_for_all(tmp_path: Path) -> None:
    make_pairs(tmp_path / "images", tmp_path / "masks", 10)
    write(tmp_path / "images" / "twin.png", np.asarray(_pixels(tmp_path / "images" / "000.png")))
    write(tmp_path / "masks" / "twin_mask.png", blocks(0))
    first, again = (open_segmentation(MaskConfig(data=str(tmp_path))) for _ in range(2))
    names = [{part.name(n) for n in range(len(part))} for part in (first.train, first.test)]
    assert names == [{part.name(n) for n in range(len(part))} for part in (again.train, again.test)]
    assert not names[0] & names[1]
    assert len({number for number, part in enumerate(names) if part & {"000.png", "twin.png"}}) == 1
    assert "held out by us" in first.notes[0]
    assert len(list(Path("runs/splits").iterdir())) == 1


def test_pages_that_are_images_have_the_mask_of_their_file_and_stay_together(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(8):
        stack = np.random.default_rng(number).integers(0, 256, (1 + number % 3, 32, 40), np.uint8)
        tifffile.imwrite(tmp_path / "images" / f"{number}.tif", stack, photometric="minisblack")
        write(tmp_path / "masks" / f"{number}.png", blocks(number))
    data = open_segmentation(MaskConfig(data=str(tmp_path), pages="images"))
    names = [[part.name(n).split("#")[0] for n in range(len(part))] for part in (data.train, data.test)]
    assert len(names[0]) + len(names[1]) == sum(1 + number % 3 for number in range(8))
    assert not set(names[0]) & set(names[1])
    samples = PairDataset(data.train, data.labels.lookup(), ValueRange(), 1)
    for number, name in enumerate(names[0]):
        mask = _pixels(tmp_path / "masks" / name.replace(".tif", ".png"))
        assert np.array_equal(samples[(0, 0, number)].views[1].numpy(), mask)


def test_notes_of_a_split_of_ours_are_of_its_training_masks(tmp_path: Path) -> None:
    make_pairs(tmp_path / "images", tmp_path / "masks", 10)
    config = MaskConfig(data=str(tmp_path), class_names=["zero", "one", "two"])
    test = open_segmentation(config).test
    for number in range(10):
        path = tmp_path / "masks" / f"{number:03d}.png"
        mask = np.asarray(read_mask(path), np.uint8)
        mask[:8] = 255 if number % 2 else mask[:8]
        mask[8:12] = 2 if test.name(0) == path.name else mask[8:12]
        write(path, mask)
    data = open_segmentation(config)
    train = [data.train.name(index) for index in range(len(data.train))]
    assert test.name(0) not in train, "it is split as before"
    masks = np.stack([_pixels(tmp_path / "masks" / name) for name in train])
    assert f"Label 255 counts for nothing: {(masks == 255).mean():.1%} of the training pixels." in data.notes
    assert "No training mask holds two." in data.notes


def _pixels(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path))


def test_folders_may_be_named_one_by_one(tmp_path: Path) -> None:
    make_pairs(tmp_path / "a", tmp_path / "b", 6)
    data = open_segmentation(
        MaskConfig(images=str(tmp_path / "a"), masks=str(tmp_path / "b"), test_share=0.5)
    )
    assert len(data.train) == len(data.test) == 3


def test_palettes_deep_pngs_tiffs_and_grey_saved_as_colour_are_labels(tmp_path: Path) -> None:
    from PIL import Image

    classes = blocks(1)
    paletted = Image.fromarray(classes)
    paletted.putpalette([9, 9, 9, 200, 0, 0])
    paletted.save(tmp_path / "palette.png")
    write(tmp_path / "deep.png", (classes.astype(np.uint16) * 300))
    write(tmp_path / "grey.png", np.repeat(classes[:, :, None], 3, axis=2))
    tifffile.imwrite(tmp_path / "mask.tif", classes.astype(np.uint16))
    np.save(tmp_path / "mask.npy", classes.astype(np.int64))
    height, width = classes.shape  # of a largest label of 11 Pillow makes 255
    np.savetxt(tmp_path / "plain.pgm", classes, "%d", header=f"P2 {width} {height} 11", comments="")
    (tmp_path / "raw.pgm").write_bytes(b"P5 %d %d 11\n" % (width, height) + classes.tobytes())
    deep = (classes * np.uint16(300)).astype(">u2").tobytes()
    (tmp_path / "deep.pgm").write_bytes(b"P5\n# ids\n%d %d\n300\n" % (width, height) + deep)
    for name, factor in (
        ("palette.png", 1),
        ("deep.png", 300),
        ("grey.png", 1),
        ("mask.tif", 1),
        ("mask.npy", 1),
        ("plain.pgm", 1),
        ("raw.pgm", 1),
        ("deep.pgm", 300),
    ):
        assert (read_mask(tmp_path / name) == factor * classes.astype(np.int64)).all(), name
    np.save(tmp_path / "half.npy", classes / 2)
    np.save(tmp_path / "below.npy", -classes.astype(np.int16))
    for name in ("half.npy", "below.npy"):
        with pytest.raises(BadImage, match=r"whole numbers|from 0 to"):
            read_mask(tmp_path / name)


def spoilt(folder: Path, how: str) -> None:
    masks = folder / "masks" / "train"
    if how == "size":
        write(masks / "003.png", np.zeros((5, 6), np.uint8))
    elif how == "label":
        write(masks / "003.png", blocks(3) * 9)
        (folder / "classes.txt").write_text("sky\nroad\n")
    elif how == "test label":
        write(folder / "masks" / "test" / "100.png", blocks(3) * 9)
    elif how == "colours":
        write(masks / "003.png", np.random.default_rng(0).integers(0, 9, (32, 40, 3), dtype=np.uint8))
    elif how == "broken":
        (masks / "003.png").write_bytes(b"no image")
    elif how == "no mask":
        (masks / "003.png").unlink()
    elif how == "no image":
        (folder / "images" / "train" / "003.png").unlink()
    elif how == "binary":
        for path in masks.iterdir():
            write(path, 255 * np.asarray(read_mask(path), np.uint8))
    elif how == "no test":
        (folder / "masks" / "test").rename(folder / "elsewhere")
    elif how == "void test":
        for path in (folder / "masks" / "test").iterdir():
            write(path, np.full((32, 40), 255, np.uint8))
    elif how == "no images":
        for path in (folder / "images" / "train").iterdir():
            path.write_bytes(b"no image")
    elif how == "two formats":
        write(masks / "003.bmp", blocks(3))
    elif how == "one mask for two":
        write(folder / "images" / "train" / "003.jpg", np.zeros((32, 40, 3), np.uint8))
    elif how == "no masks":
        for path in masks.iterdir():
            path.rename(path.with_suffix(".txt"))
    elif how.startswith("classes: "):
        (folder / "classes.txt").write_bytes(how.removeprefix("classes: ").encode("latin-1"))


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("size", r"003\.png\) is 6x5 pixels and its image 40x32"),
        ("label", r"003\.png\) holds the label 9 .* not among the classes \(0 to 1\)"),
        ("test label", r"100\.png\) holds the label 9 .* what the training masks hold"),
        ("colours", r"003\.png\): it holds 32×40×3 values"),
        ("broken", r"003\.png\): it cannot be read"),
        ("no mask", r"1 file \(003\.png\) in .*images/train without a mask"),
        ("no image", r"1 file \(003\.png\) in .*masks/train without an image"),
        ("binary", r"fewer than two classes \(labels: 0, 255; ignored: 255\)"),
        ("no test", r"has masks for train only"),
        ("void test", r"the test masks hold no class, only ignored labels \(255\)"),
        ("no images", r"none of the 4 images can be opened; train/000\.png"),
        ("two formats", r"hold 003\.png in two file formats"),
        ("one mask for two", r"and another image would share one mask"),
        ("no masks", r"masks \(.*masks/train\) must hold files of .*; it holds \.txt"),
        ("classes: 0 sky\nroad\n", "must number every line or none"),
        ("classes: 0 sky\n0 road\n", "no number twice"),
        ("classes: sky\nsky\n", "must differ from each other"),
        ("classes:  \n", "is empty"),
        ("classes: Idx\tName\n", "is empty"),
        ("classes: Idx\tName\n1\twall\nfoo\tbar\n", "must number every line or none"),
        ("classes: 0 sky\n1 road\n70000 field\n", "field has the label 70000; labels go from 0 to 65535"),
        ("classes: stra\xdfe\n", "cannot be read .*; give a text file"),
    ],
)
def test_what_does_not_fit_is_one_sentence(how: str, sentence: str, tmp_path: Path) -> None:
    spoilt(make_data(tmp_path, 4, 2), how)
    with pytest.raises(UserError, match=sentence):
        open_segmentation(MaskConfig(data=str(tmp_path)))
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "DATA is missing"),
        ({"images": "street/images"}, "images and masks must be given together"),
        (
            {"images": "street/images", "masks": "street/masks", "data": "street"},
            "data must not be given beside",
        ),
        ({"images": "nowhere", "masks": "street/masks"}, r"images \(nowhere\) must be a folder"),
        (
            {"images": "street/images", "masks": "street/masks/train"},
            "must hold the splits of images, such as test",
        ),
        ({"images": "street/masks/train", "masks": "street/masks/train"}, "must be two folders"),
    ],
)
def test_folders_that_do_not_fit_are_one_sentence(
    options: dict[str, str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path / "street", 2, 1)
    with pytest.raises(UserError, match=sentence):
        open_segmentation(MaskConfig(**options))  # type: ignore[arg-type]


def test_an_image_that_cannot_be_opened_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_data(tmp_path, 4, 2)
    (tmp_path / "images" / "train" / "002.png").write_bytes(b"no image")
    assert len(open_segmentation(MaskConfig(data=str(tmp_path))).train) == 3
    assert "left out    train/002.png" in capsys.readouterr().out


def dataset(folder: Path, crop: RandomCrop | None, seed: int = 0) -> PairDataset:
    lookup = Labels((0, 1), ("a", "b"), (255,), False).lookup()
    source = PairSource(Part("", folder / "images", folder / "masks"))
    return PairDataset(source, lookup, ValueRange(), 3, seed, crop, fill=(0.0, 1.0, 0.0))


def test_scale_crop_and_flip_keep_image_and_mask_aligned(tmp_path: Path) -> None:
    make_pairs(tmp_path / "images", tmp_path / "masks", 2, size=(96, 80))
    cut = dataset(tmp_path, RandomCrop(48))
    mirrored = set()
    for epoch in range(12):
        image, mask = cut[(epoch, 0, epoch % 2)].views
        assert image.shape == (3, 48, 48)
        assert mask.shape == (48, 48)
        red = image[0].int() - image[2].int()  # class 0 is red, class 1 is blue
        counted = mask >= 0
        agree = ((red < 0) == (mask == 1))[counted]
        assert agree.float().mean() > 0.9, epoch  # all but the blurred edges of the blocks
        assert (image[:, ~counted] == torch.tensor([0, 255, 0])[:, None]).all()
        mirrored.add(bool(counted[0, 0] and counted[-1, -1]))
    assert not torch.equal(cut[(0, 0, 0)].views[1], cut[(1, 0, 0)].views[1])
    assert torch.equal(cut[(3, 0, 1)].views[0], dataset(tmp_path, RandomCrop(48))[(3, 9, 1)].views[0])


def test_a_mirrored_sample_is_the_mirror_of_the_other(tmp_path: Path) -> None:
    make_pairs(tmp_path / "images", tmp_path / "masks", 1, size=(64, 64))
    always, never = (dataset(tmp_path, RandomCrop(32, flip=chance))[(0, 0, 0)].views for chance in (1.0, 0.0))
    assert all(torch.equal(one, other.flip(-1)) for one, other in zip(always, never, strict=True))
    assert not torch.equal(always[1], never[1])


def test_masks_are_resampled_by_the_nearest_pixel_alone() -> None:
    mask = np.array([[0, 7], [3, 200]], np.int16)
    assert nearest(mask, (4, 2)).tolist() == [[0, 7], [0, 7], [3, 200], [3, 200]]
    assert nearest(np.array([[1, 2, 3]], np.int16), (1, 1)).tolist() == [[2]]  # the middle, not the corner
    assert nearest(nearest(mask, (10, 6)).numpy(), (2, 2)).tolist() == mask.tolist()


def test_whole_images_stay_beside_their_whole_masks(tmp_path: Path) -> None:
    make_pairs(tmp_path / "images", tmp_path / "masks", 1)
    whole = dataset(tmp_path, None)
    whole.image_size = 16
    image, mask = whole[(0, 0, 0)].views
    assert image.shape == (3, 16, 20)
    assert (mask.numpy() == blocks(0)).all()
