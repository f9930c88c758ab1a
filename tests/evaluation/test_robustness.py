"""``freqmask evaluate robustness`` as a user types it, on images small enough to corrupt in no time."""

import csv
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import make_run

import freqmask
from freqmask.cli import main
from freqmask.errors import UserError
from freqmask.evaluation import linear, results, robustness
from freqmask.evaluation.corruptions import ALEXNET, COMMON, SEVERITIES, corruption_errors, mce_applies
from freqmask.evaluation.eval_model import LOGITS
from freqmask.evaluation.labelled import LabelledData, Round
from freqmask.evaluation.protocol import check_results
from freqmask.evaluation.results import ClassificationResult, summarize
from freqmask.evaluation.robustness import (
    Robustness,
    RobustnessEval,
    TestFolder,
    check_tree,
    find_folders,
    main_lines,
    open_folder,
    together,
)
from tests.evaluation.test_classifier import write_classifier


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(linear, "LEAST_STEPS", 60)  # red and blue need no more


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Red images and blue ones, of one brightness."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 20), ("test", 10)):
        labels = np.arange(count) % 2
        images = generator.integers(90, 130, (count, 16, 16, 3))
        images[labels == 0, ..., 0] += 40
        images[labels == 1, ..., 2] += 40
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels}
    np.savez(tmp_path / "two.npz", **arrays)
    return str(tmp_path / "two.npz")


def write_classes(folder: Path, names: tuple[str, ...], value: int, count: int = 3) -> Path:
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for image in range(count):
            pixels = np.random.default_rng([number, image]).integers(0, value, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{image}.png")
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_test_sets_of_one_name_are_told_before_anything_is_measured(tmp_path: Path) -> None:
    folders = [write_classes(tmp_path / side / "sketch", ("cat", "dog"), 200) for side in ("a", "b")]
    alone = {
        name: write_classes(tmp_path / name, ("cat", "dog"), 200)
        for name in ("data", "clean", "corrupted", "imagenet-c", "fog 3")
    }
    for given, taken in ((folders, "sketch"), *(([folder], name) for name, folder in alone.items())):
        with pytest.raises(UserError, match=f"{taken} is taken"):
            check_tree([(found, None) for path in given for found in find_folders(path, [], [])])  # type: ignore[misc]


def test_a_damaged_table_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("model,accuracy\na," + "x" * 200_000 + "\n")
    with pytest.raises(UserError, match=r"results\.csv"):
        check_results(tmp_path)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_table_that_is_not_ours_is_left_alone(tmp_path: Path, separator: str) -> None:
    (tmp_path / "results.csv").write_text(f"protocol{separator}model\nknn{separator}a\n")
    with pytest.raises(UserError, match=r"no table of ours.*another --out"):
        check_results(tmp_path)


def test_a_damaged_table_is_told_at_the_start_without_data_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results.csv").write_text("model,accuracy\na," + "x" * 200_000 + "\n")
    write_classifier(tmp_path / "model", ["cat", "dog", "wolf"])
    write_classes(tmp_path / "sketch", ("dog", "wolf"), 200)
    monkeypatch.setattr(Robustness, "evaluate", None)  # it must not come as far
    with pytest.raises(UserError, match=r"results\.csv is damaged"):
        freqmask.evaluate.robustness("model", head="own", folder=["sketch"], workers=0)


def test_the_interval_of_a_row_is_drawn_once(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    whole = results.bootstrap_interval
    monkeypatch.setattr(
        results, "bootstrap_interval", lambda units, of: drawn.append(len(units)) or whole(units, of)
    )
    found = freqmask.evaluate.robustness(
        "pixels", data=data, corruptions=["fog"], severities=[1], attacks=["none"], workers=0
    )
    assert [one.variant for one in found] == ["clean", "corrupted", "fog 1"]
    assert len(drawn) == 3


def test_one_table_over_all_models_with_rows_and_pictures(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(make_run(tmp_path / "run").path)
    words = ["pixels", run, "--data", data, "--image_size", "16", "--workers", "0"]
    words += ["--corruptions", "fog", "saturate", "gaussian-noise", "--severities", "1", "5", "--out", "out"]
    main(["evaluate", "robustness", *words, "--epsilon", "16/255"])
    shown = capsys.readouterr().out
    assert "constants   CIFAR-10-C's, lengths x 0.5" in shown
    for part in ("clean", "corrupted", "fgsm linf 16/255", "pgd linf 16/255", "of clean"):
        assert part in shown
    assert "\ngaussian_noise " in shown and "\nsaturate " in shown
    found = rows(tmp_path / "out" / "results.csv")
    own = [row for row in found if row["model"] == "pixels"]
    assert [row["variant"] for row in own] == [
        "clean", "corrupted", "fgsm linf 16/255", "pgd linf 16/255",
        "gaussian_noise 1", "gaussian_noise 5", "fog 1", "fog 5", "saturate 1", "saturate 5",
    ]  # fmt: skip
    each = [float(row["accuracy"]) for row in own[4:]]
    assert float(own[1]["accuracy"]) == pytest.approx(np.mean(each))
    assert {row["test_images"] for row in own} == {"10"}
    assert float(own[3]["adversarial_loss"]) >= float(own[3]["loss"])
    assert float(own[3]["largest_change"]) <= 16 / 255 + 1e-6
    assert (tmp_path / "out" / "robustness.png").is_file() and (
        tmp_path / "out" / "corruptions.png"
    ).is_file()


def test_the_command_of_a_row_gives_the_row_again(data: str, tmp_path: Path) -> None:
    freqmask.evaluate.robustness(
        "pixels", data=data, workers=0, corruptions=["shot_noise"], severities=[5], epsilon="2/255"
    )
    first = rows(tmp_path / "results.csv")
    main(first[1]["command"].split()[1:])
    again = rows(tmp_path / "results.csv")  # in the place of the first ones
    assert [row["accuracy"] for row in again] == [row["accuracy"] for row in first]


def test_a_model_with_its_own_head_needs_no_training_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classifier(tmp_path / "model", ["cat", "dog", "wolf"])
    write_classes(tmp_path / "sketch", ("dog", "wolf"), 200)
    found = freqmask.evaluate.robustness("model", head="own", folder=["sketch"], workers=0)
    assert [one.variant for one in found] == ["sketch"]
    assert "sketch" in capsys.readouterr().out
    # among two classes the third cannot be answered, whatever its logit
    (row,) = rows(tmp_path / "results.csv")
    assert (row["classes"], row["test_images"], row["head"]) == ("2", "6", "own")


@pytest.mark.parametrize("protocol", ["robustness", "bands"])
@pytest.mark.parametrize("part", ["test", "."])
def test_a_classifier_needs_one_test_image_a_class(tmp_path: Path, protocol: str, part: str) -> None:
    write_classifier(tmp_path / "model", ["cat", "dog"])
    write_classes(tmp_path / "few" / part, ("cat", "dog"), 200)
    for path in sorted((tmp_path / "few" / part).rglob("*.png"))[1::3]:
        path.unlink()
    options = {"corruptions": ["fog"], "severities": [1]} if protocol == "robustness" else {"radii": [4]}
    getattr(freqmask.evaluate, protocol)("model", head="own", data="few", workers=0, **options)
    assert {row["test_images"] for row in rows(tmp_path / "results.csv")} == {"4"}
    assert not (tmp_path / "runs").exists()


def test_imagenet_c_trees_are_read_and_their_mean_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classifier(tmp_path / "model", ["cat", "dog", "wolf"])
    write_classes(tmp_path / "val" / "val", ("cat", "dog", "wolf"), 255)
    write_classes(tmp_path / "val" / "train", ("cat", "dog", "wolf"), 250)
    for severity, value in ((1, 200), (3, 100)):
        write_classes(tmp_path / "c" / "weather" / "fog" / str(severity), ("cat", "dog", "wolf"), value)
    words = [
        "model",
        "--head",
        "own",
        "--data",
        "val",
        "--folder",
        "c",
        "--corruptions",
        "fog",
        "--workers",
        "0",
    ]
    main(["evaluate", "robustness", *words, "--severities", "1", "3", "--attacks", "none"])
    assert "imagenet-c" in capsys.readouterr().out
    found = {row["variant"]: row for row in rows(tmp_path / "results.csv")}
    assert set(found) == {"clean", "corrupted", "fog 1", "fog 3"}
    both = [float(found[name]["accuracy"]) for name in ("fog 1", "fog 3")]
    assert float(found["corrupted"]["accuracy"]) == pytest.approx(np.mean(both))
    with pytest.raises(UserError, match="has no fog/2"):
        find_folders(Path("c"), ["fog"], [1, 2])


def test_files_of_a_tree_are_not_cut_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("cat", "dog", "wolf")
    model = write_classifier(
        tmp_path / "model", [*names]
    )  # which keeps 0.875 of an image's side, as timm's do
    files = sorted(write_classes(tmp_path / "c" / "fog" / "1", names, 200).rglob("*.png"))
    write_classes(tmp_path / "sketch", names, 200)
    tables, compute = list[Any](), robustness.compute_features

    def noting(*arguments: Any, **options: Any) -> Any:
        tables.append(compute(*arguments, **options))
        return tables[-1]

    monkeypatch.setattr(robustness, "compute_features", noting)
    options = {"folder": ["c", "sketch"], "corruptions": ["fog"], "severities": [1], "workers": 0}
    freqmask.evaluate.robustness("model", head="own", attacks=["none"], **options)
    images = torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files])).movedim(-1, 1)
    whole = model((images / 255 - 0.5) / 0.2).detach().numpy()
    tree, sketch = (table.values[LOGITS] for table in tables)
    np.testing.assert_allclose(tree, whole, atol=1e-4)
    assert not np.allclose(sketch, whole, atol=1e-2), "others are cut as the model was tested"


def write_colours(folder: Path, channels: dict[str, int]) -> None:
    for name, channel in channels.items():
        (folder / name).mkdir(parents=True)
        for number in range(6):
            pixels = np.random.default_rng([channel, number]).integers(60, 100, (16, 16, 3), dtype=np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def test_folders_of_classes_are_answered_among_their_classes_by_a_learnt_head(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_colours(tmp_path / "colours" / part, {"a red": 0, "blue": 2, "green": 1})
    write_colours(tmp_path / "cold", {"blue": 2, "green": 1})
    options = {"data": "colours", "corruptions": ["none"], "attacks": ["none"], "workers": 0}
    found = freqmask.evaluate.robustness("pixels", folder=["cold"], **options)
    assert {one.variant: one.scores.accuracy for one in found} == {"clean": 1.0, "cold": 1.0}
    write_colours(tmp_path / "other", {"blue": 2, "white": 1})
    with pytest.raises(UserError, match="1 classes that DATA lacks \\(white\\)"):
        freqmask.evaluate.robustness("pixels", folder=["other"], **options)


def test_test_sets_of_one_name_are_told_apart_by_linking_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("here", "there"):
        write_colours(tmp_path / place / "val", {"blue": 2, "green": 1})
    paths = [Path("here/val"), Path("there/val")]
    sets = [(folder, open_folder(folder, None)) for path in paths for folder in find_folders(path, [], [])]
    with pytest.raises(UserError, match="val is taken; rename or link one"):
        check_tree(sets)
    Path("theirs").symlink_to(tmp_path / "there" / "val")
    (linked,) = find_folders(Path("theirs"), [], [])
    assert linked.name == "theirs"
    check_tree([sets[0], (linked, open_folder(linked, None))])
    monkeypatch.chdir(tmp_path / "here" / "val")
    assert find_folders(Path(), [], [])[0].name == find_folders(Path("../val"), [], [])[0].name == "val"


def test_folders_that_tell_nothing_beside_data_or_each_other_are_refused(tmp_path: Path) -> None:
    write_colours(tmp_path / "one", {"blue": 2})
    with pytest.raises(UserError, match=r"folder \(one\) must hold two folders or more"):
        open_folder(TestFolder("one", Path("one")), None)
    write_colours(tmp_path / "two", {"blue": 2, "red": 0})
    Image.new("RGB", (16, 16)).save(tmp_path / "two" / "sample.png")
    with pytest.raises(UserError, match=r"first 'sample\.png'\) lie beside the class folders \(blue, red\)"):
        open_folder(TestFolder("two", Path("two")), None)
    for number, names in enumerate((("cat", "dog"), ("cat", "dog"), ("cat", "wolf"))):
        write_classes(tmp_path / f"tree{number}" / "fog" / "1", names, 200)
    opened = [
        (folder, open_folder(folder, None))
        for number in range(3)
        for folder in find_folders(Path(f"tree{number}"), ["fog"], [1])
    ]
    with pytest.raises(UserError, match="two ImageNet-C trees"):
        check_tree(opened[:2])
    other = dataclasses.replace(opened[2][0], corruption=("fog", 2))
    with pytest.raises(UserError, match="must hold the same images as tree0"):
        check_tree([opened[0], (other, opened[2][1])])
    write_colours(tmp_path / "colours", {"blue": 2, "green": 1})
    write_colours(tmp_path / "cold", {"blue": 2, "green": 1})
    with pytest.raises(UserError, match="folder needs one head and --folds makes several"):
        freqmask.evaluate.robustness("pixels", data="colours", folder=["cold"], folds=2, workers=0)


def test_a_table_of_imagenet_s_classes_has_an_mce(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.data.imagenet_info import ImageNetInfo

    monkeypatch.setattr(results, "RESAMPLES", 2)
    names, truth = list(ImageNetInfo("imagenet-1k").label_names()), np.array([3, 4])
    data: Any = LabelledData(None, truth, None, names, [Round(truth[:0], np.arange(2))], "d", "s")  # type: ignore[arg-type]
    model: Any = SimpleNamespace(text="m", name="m", input_size=(3, 224, 224))
    rows_of = [
        ClassificationResult(model, data, f"{name} {severity}", 0, np.arange(2), np.array([3, 5]))
        for name in COMMON
        for severity in SEVERITIES
    ]
    expected = np.mean([0.5 * 5 / sum(ALEXNET[name]) for name in COMMON])
    lines = main_lines({"data": results.ResultTable("t", "clean", rows_of)})
    assert "mCE (made)" in lines[0] and lines[1].endswith(f"{100 * expected:.1f}")


def test_folds_test_every_image_with_the_head_that_did_not_learn_it(data: str, tmp_path: Path) -> None:
    found = freqmask.evaluate.robustness(
        "pixels", data=data, folds=3, corruptions=["contrast"], severities=[1], attacks=["fgsm"], workers=0
    )
    assert [one.variant for one in found] == ["clean", "corrupted", "fgsm linf 4/255", "contrast 1"]
    assert rows(tmp_path / "results.csv")[0]["test_images"] == "30"


def test_folds_do_not_test_what_a_head_has_learnt_by_heart(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    noise = generator.integers(
        0, 256, (40, 16, 16, 3), dtype=np.uint8
    )  # 768 numbers an image: enough for a name
    np.savez(tmp_path / "noise.npz", images=noise, labels=generator.permutation(40) % 2)
    found = freqmask.evaluate.robustness(
        "pixels", data=str(tmp_path / "noise.npz"), folds=4, corruptions=["none"], attacks=["fgsm"], workers=0
    )
    assert found[0].variant == "clean"
    assert 0.2 < found[0].accuracies[0] < 0.8  # of a head that had learnt them: 1


def test_fewer_test_images_are_taken_evenly(
    data: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tested: list[np.ndarray] = []
    whole = RobustnessEval.clean

    def noting(self: RobustnessEval) -> ClassificationResult:
        result = whole(self)
        tested.append(result.images)
        return result

    monkeypatch.setattr(RobustnessEval, "clean", noting)
    for count in (10, 4):
        freqmask.evaluate.robustness(
            "pixels", data=data, corruptions=["none"], attacks=["fgsm"], test_images=count, workers=0
        )
    assert "4 of 10 test images" in capsys.readouterr().out
    every, some = tested
    assert len(every) == 10
    places = np.searchsorted(np.sort(every), np.sort(some))
    assert places.tolist() == [0, 3, 6, 9]


def test_the_mean_of_several_results_draws_whole_images(data: str) -> None:
    from freqmask.evaluation.eval_model import PixelModel
    from freqmask.evaluation.knn import Knn
    from freqmask.evaluation.protocol import EvalConfig

    knn = Knn()
    knn.open(EvalConfig(models=["pixels"], data=[data]))
    opened, model = knn.data, PixelModel(knn.survey)
    tested = opened.tested
    half = np.where(np.arange(10) < 5, opened.labels[tested], 1 - opened.labels[tested])
    three_times = [
        ClassificationResult(model, opened, f"fog {s}", 0, tested, half, metadata={"severity": s})
        for s in (1, 2, 3)
    ]
    (one,) = summarize(three_times[:1])
    (three,) = summarize([together(three_times)])
    assert three.accuracies == one.accuracies == [0.5]
    assert three.interval == pytest.approx(one.interval, abs=0.02)  # three times the same image tells no more


def test_alexnet_has_an_mce_of_one_and_published_means() -> None:
    perfect = {(name, severity): 1.0 for name in COMMON for severity in SEVERITIES}
    alexnet = {(name, s): 1 - ALEXNET[name][s - 1] for name in COMMON for s in SEVERITIES}
    assert list(corruption_errors(alexnet).values()) == pytest.approx([1.0] * 15)
    assert set(corruption_errors(perfect).values()) == {0.0}
    assert np.mean(ALEXNET["gaussian_noise"]) == pytest.approx(0.886428)
    assert np.mean(ALEXNET["jpeg_compression"]) == pytest.approx(0.606500)
    assert np.mean(ALEXNET["elastic_transform"]) == pytest.approx(0.646056)


def test_mce_is_for_the_thousand_classes_at_224_alone() -> None:
    from timm.data.imagenet_info import ImageNetInfo

    names = sorted(ImageNetInfo("imagenet-1k").label_names())
    measured = {(name, severity): 0.5 for name in COMMON for severity in SEVERITIES}
    assert mce_applies(names, 224, measured)
    assert not mce_applies(names[:200], 224, measured)
    assert not mce_applies([str(n) for n in range(1000)], 224, measured)
    assert not mce_applies(names, 192, measured)
    assert not mce_applies(names, 224, dict.fromkeys(list(measured)[1:], 0.5))


def test_nothing_right_on_clean_images_is_a_number_too(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = 1 - np.load(data)["test_labels"]
    monkeypatch.setattr(linear.ClassifierHead, "predict", lambda *arguments: wrong)
    found = freqmask.evaluate.robustness(
        "pixels", data=data, corruptions=["fog"], severities=[1], attacks=["none"], workers=0
    )
    assert {one.variant: one.mean for one in found} == {"clean": 0, "corrupted": 0, "fog 1": 0}


@pytest.mark.parametrize("head", ["linear", "own"])
def test_a_model_is_opened_once_to_be_checked_and_once_to_be_measured(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    from freqmask.evaluation import eval_model

    opened = []
    opener = "open_model" if head == "linear" else "open_classifier"
    whole = getattr(eval_model, opener)
    monkeypatch.setattr(eval_model, opener, lambda text, **more: opened.append(text) or whole(text, **more))
    model = "random:resnet10t" if head == "linear" else str(tmp_path / "own")
    if head == "own":
        write_classifier(tmp_path / "own", ["0", "1", "2"])
    freqmask.evaluate.robustness(
        model, data=data, head=head, image_size=32, corruptions=["none"], attacks=["none"], workers=0
    )
    assert opened == [model] * (2 if head == "linear" else 1)  # a classifier is kept


def test_attacks_reach_through_backbone_and_head(data: str) -> None:
    found = freqmask.evaluate.robustness(
        "random:resnet10t",
        data=data,
        image_size=32,
        corruptions=["none"],
        attacks=["fgsm", "pgd"],
        norm="l2",
        epsilon="8",
        workers=0,
        cache=False,
    )
    scores = {one.variant: one.scores.accuracy for one in found}
    assert scores["pgd l2 8"] < scores["clean"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--corruptions", "fogg"], "corruptions (fogg) must be"),
        (["--severities", "6"], "severities (6) must be"),
        (["--norm", "l1"], "norm (l1) must be"),
        (["--steps", "0"], "steps (0) must be"),
        (["--folds", "1"], "folds (1) must be"),
        (["--test_share", "1"], "test_share (1) must be"),
        (["--constants", "imagenet"], "constants (imagenet) must be"),
        (["--frost", "nowhere"], "frost (nowhere) must be a folder"),
        (["--folder", "nowhere"], "folder (nowhere) must be a folder"),
        (["--epsilon", "four"], "epsilon (four) must be"),
        (["--test_images", "0"], "test_images (0) must be"),
        (["--head", "own"], "model (pixels) has no classifier of its own; try --head linear"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["evaluate", "robustness", "pixels", "--data", data, *words])
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")
    assert not (tmp_path / "results.csv").exists()


def test_data_is_asked_for_where_a_head_is_learnt() -> None:
    with pytest.raises(UserError, match="data is missing"):
        freqmask.evaluate.robustness("pixels")


@pytest.mark.parametrize(("protocol", "options"), [("robustness", {}), ("knn", {"k": [3]}), ("bands", {})])
def test_features_that_are_not_finite_give_a_row_without_a_number(
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    protocol: str,
    options: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    from freqmask.evaluation.eval_model import PixelModel

    broken = PixelModel.features
    monkeypatch.setattr(
        PixelModel, "features", lambda *a: {name: torch.log(-1 - f.abs()) for name, f in broken(*a).items()}
    )
    measure = getattr(freqmask.evaluate, protocol)
    (summary,) = measure("pixels", data=data, workers=0, cache=False, **options)
    assert "not finite" in summary.error
    assert [row["accuracy"] for row in rows(tmp_path / "results.csv")] == [""]
    told = capsys.readouterr().out.partition("figures     ")[2].split()
    assert told and all(Path(name.strip(",")).is_file() for name in told)
