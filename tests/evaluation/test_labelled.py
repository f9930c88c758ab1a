"""Data with labels: which part is learnt from, which tested, and what is refused."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from freqmask.data.pixels import Picture
from freqmask.data.sources import Source, open_source
from freqmask.errors import UserError
from freqmask.evaluation.labelled import SplitConfig, keep_parts, open_labelled


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_images(folder: Path, count: int, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng([seed, number]).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def write_classes(root: Path, count: int = 10) -> Path:
    for seed, name in enumerate(("cat", "dog")):
        write_images(root / name, count, seed + sum(root.name.encode()))
    return root


def parting(tmp_path: Path, **options: object) -> SplitConfig:
    return SplitConfig(splits_in=tmp_path / "splits", **options)  # type: ignore[arg-type]


def test_train_and_val_folders_are_used(tmp_path: Path) -> None:
    write_classes(tmp_path / "data" / "train")
    write_classes(tmp_path / "data" / "val", 4)
    data = open_labelled(tmp_path / "data")
    (one,) = data.rounds
    assert (len(one.train), len(one.test), data.class_names) == (20, 8, ["cat", "dog"])
    assert np.bincount(data.labels[one.test]).tolist() == [4, 4]


def test_a_training_split_that_is_named_leaves_the_usual_test_split(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_classes(tmp_path / "data" / part, 4)
    assert open_labelled(tmp_path / "data", parting(tmp_path, train_split="train")).split == "train / val"
    with pytest.raises(UserError, match=r"\(val, val\) must be two different splits"):
        open_labelled(tmp_path / "data", parting(tmp_path, train_split="val"))
    with pytest.raises(UserError, match=r"\(None, val\) must be two different splits"):
        open_labelled(tmp_path / "data", parting(tmp_path, train_split="all"))
    with pytest.raises(UserError, match=r"^split \(held\) must be one that .* holds"):
        open_labelled(write_classes(tmp_path / "whole"), parting(tmp_path, test_split="held"))


def test_a_split_of_ours_is_stratified_written_and_read_again(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "tree")
    first = open_labelled(folder, parting(tmp_path))
    (file,) = (tmp_path / "splits").iterdir()
    assert np.bincount(first.labels[first.rounds[0].test]).tolist() == [2, 2]
    lines = file.read_text().splitlines()
    swapped = [
        line.replace(",test,", ",X,").replace(",train,", ",test,").replace(",X,", ",train,") for line in lines
    ]
    file.write_text("\n".join(swapped) + "\n")
    again = open_labelled(folder, parting(tmp_path))
    assert np.array_equal(again.rounds[0].test, first.rounds[0].train)


def write_stacks(root: Path, files: int) -> Path:
    """Folders of classes with TIFFs of four pages."""
    for seed, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for number in range(files):
            pixels = np.random.default_rng([seed, number]).integers(0, 256, (4, 6, 6), dtype=np.uint8)
            tifffile.imwrite(root / name / f"{number}.tif", pixels, photometric="minisblack")
    return root


@pytest.mark.parametrize("how", [{"test_share": 0.25}, {"folds": 4}])
def test_pages_of_one_file_are_never_on_both_sides(tmp_path: Path, how: dict[str, Any]) -> None:
    data = open_labelled(write_stacks(tmp_path / "scans", 8), parting(tmp_path, pages="images", **how))
    for one in data.rounds:
        sides = [{data.source.name(int(k)).split("#")[0] for k in part} for part in (one.train, one.test)]
        assert [len(side) for side in sides] == [12, 4] and not sides[0] & sides[1]


def test_a_class_of_one_file_has_its_pages_parted_and_says_so(tmp_path: Path) -> None:
    data = open_labelled(
        write_stacks(tmp_path / "scans", 1), parting(tmp_path, pages="images", test_share=0.25)
    )
    assert [len(part) for part in (data.rounds[0].train, data.rounds[0].test)] == [6, 2]
    assert any("cat/0.tif is the only file of its class" in note for note in data.notes)


def test_files_of_pages_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    folders = [write_stacks(tmp_path / name, count) for name, count in (("first", 1), ("second", 2))]
    for name in ("cat", "dog"):
        (folders[1] / name / "1.tif").replace(folders[1] / name / "0.tif")  # other images of one name
    data = open_labelled(folders, parting(tmp_path, pages="images", folds=2))
    assert not any("the only file" in note for note in data.notes)
    for one in data.rounds:
        sides = [{data.source.name(int(k)).split("#")[0] for k in part} for part in (one.train, one.test)]
        assert [len(side) for side in sides] == [2, 2] and not sides[0] & sides[1]


def test_of_too_few_files_of_pages_these_are_parted_and_it_is_said(tmp_path: Path) -> None:
    folder = write_stacks(tmp_path / "scans", 2)
    few = open_labelled(folder, parting(tmp_path, pages="images", test_share=0.25))
    assert [len(part) for part in (few.rounds[0].train, few.rounds[0].test)] == [12, 4]
    assert any("4 groups" in note and "on both sides of splits" in note for note in few.notes)
    for way_out in ({"test_share": 0.5}, {"folds": 2}):
        data = open_labelled(folder, parting(tmp_path, pages="images", **way_out))
        assert [len(part) for part in (data.rounds[0].train, data.rounds[0].test)] == [8, 8]


def test_groups_of_a_table_go_before_those_of_pages(tmp_path: Path) -> None:
    folder = write_stacks(tmp_path / "scans", 4)
    pages = [(name, n, page) for name in ("cat", "dog") for n in range(4) for page in range(4)]
    lines = [f"{name}/{n}.tif#{page},{name},{name}-{n // 2}" for name, n, page in pages]
    (tmp_path / "t.csv").write_text("path,label,group\n" + "\n".join(lines))
    data = open_labelled(
        folder, parting(tmp_path, pages="images", labels=str(tmp_path / "t.csv"), test_share=0.5)
    )
    assert set(data.groups or ()) == {"cat-0", "cat-1", "dog-0", "dog-1"}
    groups = [set(data.groups_of(part) or ()) for part in (data.rounds[0].train, data.rounds[0].test)]
    assert not groups[0] & groups[1]


def write_tar(path: Path, count: int) -> Path:
    """Images with their labels beside them, every name in it twice."""
    with tarfile.open(path, "w") as tar:
        for number in range(2 * count):
            pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "png")
            contents = {"png": file.getvalue(), "cls": str(number % 2).encode()}
            for suffix, content in contents.items():
                member = tarfile.TarInfo(f"{number % count:03}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


class OneName(Source):
    """A user's own: images of a folder that all have one name."""

    def __init__(self, folder: Path) -> None:
        self.inner = open_source(folder)
        self.class_names, self._labels = self.inner.class_names, self.inner.all_labels()

    def __len__(self) -> int:
        return len(self.inner)

    def open(self, index: int) -> Picture:
        return self.inner.open(index)

    def name(self, index: int) -> str:
        return "image"

    def fingerprint(self) -> str:
        return self.inner.fingerprint()


@pytest.mark.parametrize("folds", [None, 5])
@pytest.mark.parametrize("kind", ["tar", "source"])
def test_a_split_of_ours_is_the_same_again_where_names_repeat(
    kind: str, folds: int | None, tmp_path: Path
) -> None:
    if kind == "tar":
        data: Path | Source = write_tar(tmp_path / "twice.tar", 15)
    else:
        data = OneName(write_classes(tmp_path / "tree", 15))
    first, again = (open_labelled(data, parting(tmp_path, folds=folds)) for _ in range(2))
    assert len({first.source.name(index) for index in range(30)}) < 30 == len(first.source)
    for one, other in zip(first.rounds, again.rounds, strict=True):
        assert one.test.tolist() == other.test.tolist() and one.train.tolist() == other.train.tolist()
        assert len(one.test) == 6


def test_names_rule_over_the_order_of_rows_but_where_they_repeat(tmp_path: Path) -> None:
    file, words = tmp_path / "split.csv", ["train", "test"]
    file.write_text("path,split\nb,test\ntwice,test\na,train\ntwice,train\n")

    def parts(*names: str) -> list[int]:
        return keep_parts(file, names, words, lambda: pytest.fail("drawn again"), {}).tolist()

    assert parts("a", "twice", "b", "twice") == [0, 1, 1, 0]
    assert parts("twice", "twice", "b", "a") == [1, 0, 1, 0]
    with pytest.raises(UserError, match="does not list the images of DATA"):
        parts("a", "twice", "twice", "twice")


@pytest.mark.parametrize(
    ("renamed", "sentence"),
    [(True, "must say train or test for every image"), (False, "does not list the images of DATA")],
)
def test_a_split_of_ours_that_was_edited_is_refused(tmp_path: Path, renamed: bool, sentence: str) -> None:
    folder = write_classes(tmp_path / "tree")
    open_labelled(folder, parting(tmp_path))
    (file,) = (tmp_path / "splits").glob("*.csv")
    text = file.read_text()
    file.write_text(text.replace("test", "held") if renamed else text.partition("\n")[0] + "\n")
    with pytest.raises(UserError, match=f"{sentence}.*; delete it to have it drawn again"):
        open_labelled(folder, parting(tmp_path))


def test_folds_test_every_image_once(tmp_path: Path) -> None:
    data = open_labelled(write_classes(tmp_path / "tree"), parting(tmp_path, folds=5))
    assert sorted(data.tested.tolist()) == list(range(20))
    assert all(len(np.intersect1d(one.train, one.test)) == 0 for one in data.rounds)
    again = open_labelled(tmp_path / "tree", parting(tmp_path, folds=5))
    assert all(np.array_equal(a.test, b.test) for a, b in zip(data.rounds, again.rounds, strict=True))


@pytest.mark.parametrize(
    ("parts", "folds", "why"),
    [
        (("",), None, "DATA has no test part: 20% held out by us"),
        (("",), 5, "DATA has no test part: 5 folds by us"),
        (("train",), 5, "DATA has no test part: 5 folds by us"),
        (("train", "val"), 5, "DATA's own parts (train, val) are joined and parted anew: 5 folds by us"),
        (("test",), 5, "DATA's own parts (test) are joined and parted anew: 5 folds by us"),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_why_a_split_is_one_of_ours_is_true(
    parts: tuple[str, ...], folds: int | None, why: str, several: bool, tmp_path: Path
) -> None:
    for part in parts:
        write_classes(tmp_path / "data" / part)
    more = [write_classes(tmp_path / "more" / "pictures", 3).parent / "pictures"] if several else []
    opened = open_labelled([tmp_path / "data", *more], parting(tmp_path, folds=folds))
    (note,) = [note for note in opened.notes if "by us" in note]
    assert note.startswith(why)
    assert len(opened.source) == 20 * len(parts) + 6 * several, "all that DATA holds"


def test_several_data_with_parts_of_their_own_are_not_said_to_have_none(tmp_path: Path) -> None:
    for root, part in (("one", "train"), ("one", "test"), ("two", "train"), ("two", "test")):
        write_images(tmp_path / root / part / "cat", 4, seed=len(root + part) * 7 + ord(root[0]))
        write_images(tmp_path / root / part / "dog", 4, seed=len(root + part) * 7 + ord(root[0]) + 1)
    opened = open_labelled([tmp_path / "one", tmp_path / "two"], parting(tmp_path))
    assert "DATA's own parts (test, train) are joined and parted anew: 20% held out" in opened.notes[-1]
    assert opened.name == f"{tmp_path / 'one'} {tmp_path / 'two'}"


def test_folds_cannot_train_and_test_on_the_only_image_of_a_class(tmp_path: Path) -> None:
    write_images(tmp_path / "flat", 13)
    rows = [f"{n}.png,{'ab'[n % 2] if n else 'lonely'}" for n in range(13)]
    (tmp_path / "labels.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    with pytest.raises(
        UserError, match=r"folds \(3\) leave 1 class without an image to train on \(lonely\); add"
    ):
        open_labelled(tmp_path / "flat", parting(tmp_path, labels=str(tmp_path / "labels.csv"), folds=3))


def test_identical_images_are_refused_or_kept_together(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "tree")
    (folder / "cat" / "copy.png").write_bytes((folder / "cat" / "3.png").read_bytes())
    with pytest.raises(UserError, match="identical to others"):
        open_labelled(folder, parting(tmp_path))
    for seed in range(4):
        data = open_labelled(folder, parting(tmp_path, duplicates="together", split_seed=seed))
        names = {data.source.name(int(index)) for index in data.rounds[0].test}
        assert ("cat/copy.png" in names) == ("cat/3.png" in names)


def test_groups_of_a_table_are_not_divided(tmp_path: Path) -> None:
    write_images(tmp_path / "flat", 20)
    rows = [f"{n}.png,{'ab'[n % 2]},{n // 4}" for n in range(20)]
    (tmp_path / "labels.csv").write_text("path,label,group\n" + "\n".join(rows) + "\n")
    data = open_labelled(tmp_path / "flat", parting(tmp_path, labels=str(tmp_path / "labels.csv")))
    assert data.groups is not None
    groups = [{data.groups[i] for i in part} for part in (data.rounds[0].train, data.rounds[0].test)]
    assert not groups[0] & groups[1]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["0.png,a,train", "1.png,b,train", "2.png,c,test"], "training part misses 1 class of the test part"),
        (["0.png,a,train", "1.png,a,train", "2.png,a,test"], "one class only"),
        (["0.png,,train", "1.png,,test"], "has no labels"),
        (["0.png,a,train", "1.png,b,train", "2.png,,test"], "the test part is empty"),
        (["0.png,a,train", "nowhere.png,b,test"], "DATA lacks"),
    ],
)
def test_labels_that_cannot_be_used_are_one_sentence(tmp_path: Path, lines: list[str], sentence: str) -> None:
    write_images(tmp_path / "flat", 4)
    (tmp_path / "labels.csv").write_text("path,label,split\n" + "\n".join(lines) + "\n")
    with pytest.raises(UserError, match=sentence):
        open_labelled(tmp_path / "flat", parting(tmp_path, labels=str(tmp_path / "labels.csv")))


@pytest.mark.parametrize(
    ("parts", "tested"),
    [(("test",), "test/"), (("train", "test"), "test/"), (("val",), "val/"), (("",), "")],
    ids=["test", "train and test", "val", "no splits"],
)
def test_where_nothing_is_learnt_everything_but_train_is_tested(
    tmp_path: Path, parts: tuple[str, ...], tested: str
) -> None:
    for part in parts:
        write_classes(tmp_path / "data" / part, 1)
    data = open_labelled(tmp_path / "data", parting(tmp_path, train=False))
    names = [data.source.name(int(index)) for index in data.tested]
    assert [name.removeprefix("1:") for name in names] == [f"{tested}cat/0.png", f"{tested}dog/0.png"]
    assert all(len(one.train) == 0 for one in data.rounds)
    assert len(data.rounds[0].train) == 0 and data.class_names == ["cat", "dog"]
    assert not (tmp_path / "splits").exists()


def test_a_test_part_without_class_folders_is_named(tmp_path: Path) -> None:
    write_classes(tmp_path / "data" / "train")
    write_images(tmp_path / "data" / "val", 4)
    with pytest.raises(
        UserError, match="the images of val have no labels: its images lie in the folder itself"
    ):
        open_labelled(tmp_path / "data")


def test_images_beside_class_folders_are_named(tmp_path: Path) -> None:
    write_classes(tmp_path / "data")
    (tmp_path / "data" / "loose.png").write_bytes((tmp_path / "data" / "cat" / "1.png").read_bytes())
    with pytest.raises(
        UserError, match=r"no labels: 1 images \(first 'loose.png'\) lie beside the class folders"
    ):
        open_labelled(tmp_path / "data", parting(tmp_path))
