"""``freqmask evaluate`` as a user types it, and its twins in Python."""

import contextlib
import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from broken_runner import attempt
from PIL import Image
from tiny_runs import make_run

import freqmask
from freqmask.cli import COMMANDS, main
from freqmask.errors import UserError
from freqmask.evaluation import protocol
from freqmask.interop.weights import load_initial


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Bright and dark images: anything that sees tells them apart."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 24), ("test", 12)):
        labels = np.arange(count) % 2
        noise = generator.integers(0, 60, (count, 16, 16, 3))
        arrays |= {f"{split}_images": (noise + 120 * labels[:, None, None, None]).astype(np.uint8)}
        arrays |= {f"{split}_labels": labels}
    np.savez(tmp_path / "two.npz", **arrays)
    return str(tmp_path / "two.npz")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_one_table_over_all_models_and_rows_that_repeat_them(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "runs" / "mine").path
    main(
        ["evaluate", "knn", "pixels", f"random:{run}", str(run), "--data", data, "--k", "3", "--workers", "0"]
    )
    shown = capsys.readouterr().out
    assert "24 training images, 12 test images, 2 classes" in shown
    assert all(f"\n{name} " in shown for name in ("pixels", f"random:{run}", "mine"))
    assert "±" in shown  # of the random weights
    here, there = rows(tmp_path / "results.csv"), rows(run / "results.csv")
    assert [row["model"] for row in here] == ["pixels", *[f"random:{run}"] * 3]
    assert len({row["model_weights"] for row in here}) == 4
    assert (run / "knn.png").is_file()
    assert rows(run / "knn-classes.csv")[0]["class"] == "0"
    words = there[0]["command"].split()
    main(words[1:])
    again = rows(run / "results.csv")
    assert [row["accuracy"] for row in again[-1:]] == [there[0]["accuracy"]]


@pytest.mark.parametrize(("pixels", "words"), [(500e6, "3 of the 12 test images are identical"), (99, "")])
def test_test_images_that_are_training_images_too_are_counted(
    pixels: float,
    words: str,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "QUICKLY_READ", pixels)
    command = ["evaluate", "knn", "pixels", "--data", "two.npz", "--k", "3", "--workers", "0"]
    main(command)
    assert "identical" not in capsys.readouterr().out
    arrays = dict(np.load(data))
    arrays["test_images"][[1, 3, 10]] = arrays["train_images"][[5, 5, 20]]
    np.savez(data, **arrays)
    main(command)
    shown = capsys.readouterr().out
    assert "24 training images, 12 test images" in shown, "they stay as they are"
    assert (f"note: {words} to training images." in shown) == bool(words)
    assert ("identical" in shown) == bool(words)


def test_a_seed_that_takes_long_is_told(
    data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "knn", "pixels", "--data", data, "--k", "3", "--workers", "0"]
    main(words)
    assert "seed 0 in" not in capsys.readouterr().out
    monkeypatch.setattr(protocol, "LONG", -1.0)
    main(words)
    assert "measured    pixels: seed 0 in 0 s" in capsys.readouterr().out


def test_a_second_evaluation_takes_features_from_the_cache(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from freqmask.evaluation import features

    run = str(make_run(tmp_path / "run").path)
    first = freqmask.evaluate.knn(run, data=data, k=[3], workers=0)
    monkeypatch.setattr(features, "_compute", lambda *_: pytest.fail("computed again"))
    assert freqmask.evaluate.knn(run, data=data, k=[3], workers=0)[0].accuracies == first[0].accuracies


def test_changed_weights_are_noticed(data: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run = make_run(tmp_path / "run")
    freqmask.evaluate.knn(str(run.path), data=data, k=[3], workers=0)
    file = run.backbone / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    freqmask.evaluate.knn(str(run.path), data=data, k=[3], workers=0)
    assert len({row["model_weights"] for row in rows(run.path / "results.csv")}) == 2


def test_linear_fewshot_and_bands_answer(data: str, tmp_path: Path) -> None:
    run, out = str(make_run(tmp_path / "run").path), tmp_path / "out"
    common = {"data": data, "workers": 0, "out": str(out), "seeds": [0]}
    linear = freqmask.evaluate.linear([run, "pixels"], rates=[0.1], **common)
    assert [summary.name for summary in linear] == ["run", "pixels"]
    assert linear[1].scores.accuracy == 1.0
    few = freqmask.evaluate.fewshot(["pixels"], shots=["1", "50%"], **common)
    assert [summary.variant for summary in few] == ["1 a class", "50%"]
    bands = freqmask.evaluate.bands(["pixels"], head="knn", radii=[4], **common)
    found = {summary.variant: summary.scores.accuracy for summary in bands}
    assert found["whole"] == found["low 4"] == 1.0
    assert (out / "bands.png").is_file()
    assert {row["protocol"] for row in rows(out / "results.csv")} == {"linear", "fewshot", "bands"}
    chosen = next(row for row in rows(out / "results.csv") if row["model"] == "run")["chosen"]
    assert "rate 0.1" in chosen


def test_folds_that_differ_by_an_image_vote_with_as_many_neighbors(tmp_path: Path) -> None:
    labels = np.arange(13) % 2
    images = np.random.default_rng(0).integers(0, 60, (13, 16, 16, 3)) + 120 * labels[:, None, None, None]
    np.savez(tmp_path / "few.npz", images=images.astype(np.uint8), labels=labels)
    words = ["evaluate", "knn", "pixels", "--data", "few.npz", "--folds", "5", "--workers", "0", "--k"]
    main([*words, "20", "3"])
    found = rows(tmp_path / "results.csv")
    assert [(row["variant"], row["test_images"]) for row in found] == [("k=3", "13")]
    main([*words, "20"])
    found = rows(tmp_path / "results.csv")[1:]
    assert [(row["variant"], row["test_images"]) for row in found] == [("k=10", "13")], "10 or 11 train"


def test_frequencies_stand_above_the_models_of_their_size(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, side in (("a", 16), ("b", 32), ("c", 16)):
        make_run(tmp_path / name, image_size=side)
    main(["evaluate", "bands", "a", "b", "c", "--data", data, "--head", "knn", "--radii", "2", "4"])
    shown = capsys.readouterr().out.split("low-pass: below", 1)[1]
    above = {"a": ["0.125", "0.250"], "b": ["0.062", "0.125"], "c": ["0.125", "0.250"]}
    header: list[str] = []
    for words in map(str.split, shown.splitlines()):
        if words[:1] in (["a"], ["b"], ["c"]):
            assert header == above.pop(words[0])
            assert len(words) == 4
        else:
            header = [word for word in words if word.startswith("0.")] or header
        if not above:
            break
    assert not above


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, data: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run = make_run(tmp_path / "run")
    file = run.backbone / "model.safetensors"
    weights = load_file(file)
    weights["blocks.1.mlp.fc1.bias"][3] = value
    save_file(weights, file, {"format": "pt"})
    model, to = str(run.path), ["--workers", "0"]
    commands = [
        ["evaluate", "knn", model, "--data", data, *to],
        ["embed", model, data, "--out", str(tmp_path / "e.parquet"), *to],
        ["export", model, "--out", str(tmp_path / "exported")],
    ]
    for command in commands:
        code, text = attempt(command)
        assert code == 2, (command, text)
        assert "blocks.1.mlp.fc1.bias holds NaN or infinity" in text, (command, text)
    with pytest.raises(UserError, match=r"init .* blocks\.1\.mlp\.fc1\.bias holds NaN"):
        load_initial(freqmask.load_method(run.path), str(run.backbone))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["evaluate", "kn"], "command (evaluate kn) is unknown; did you mean 'knn'?"),
        (["evaluate", "knn", "nowhere", "--data", "DATA"], "model (nowhere) must be"),
        (["evaluate", "knn", "pixels", "--data", "DATA", "--seeds", "1", "1"], "seeds ([1, 1]) must be"),
        (["evaluate", "knn", "pixels", "--data", "builtin:photos"], "DATA (builtin:photos) has no labels"),
        (["evaluate", "fewshot", "pixels", "--data", "DATA", "--shots", "some"], "shots (some) must be"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([data if word == "DATA" else word for word in words])
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")
    assert not (tmp_path / "results.csv").exists()


def test_a_folder_that_cannot_take_results_is_found_before_measuring(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from freqmask.evaluation import features

    monkeypatch.setattr(features, "_compute", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "results.csv").mkdir(parents=True)
    for out in ("file", "file/inside", "taken", "/proc/nowhere"):
        with pytest.raises(
            UserError, match=rf"(out|results) \({out}.*\) (is a file|is a folder|cannot be written)"
        ):
            freqmask.evaluate.knn("pixels", data=data, k=[3], workers=0, out=out)


def test_rows_are_kept_where_a_figure_fails(data: str, tmp_path: Path) -> None:
    (tmp_path / "out" / "knn-classes.csv").mkdir(parents=True)
    with pytest.raises(UserError, match=r"knn-classes\.csv"):
        freqmask.evaluate.knn("pixels", data=data, k=[3], workers=0, out="out")
    assert [row["model"] for row in rows(tmp_path / "out" / "results.csv")] == ["pixels"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["linear", "pixels"],
            "a linear head is chosen on 30% of the training images, held out, and 3 images of 3",
        ),
        (["knn", "pixels", "--features", "auto"], "features are chosen on 30% .* or leave --features out"),
        (
            ["finetune", "random:resnet10t", "--image_size", "32", "--held_out", "0.3"],
            "accuracy is watched on 30% .* or give --held_out 0",
        ),
    ],
)
def test_an_image_a_class_is_too_few_to_hold_any_out(words: list[str], sentence: str) -> None:
    images = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(3)
    np.savez(
        "few.npz", train_images=images[:3], train_labels=labels, test_images=images[3:], test_labels=labels
    )
    code, text = attempt(["evaluate", *words, "--data", "few.npz", "--workers", "0", "--accelerator", "cpu"])
    assert code == 2
    assert re.search(sentence, text)


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ("test/*/*.png", "the test part is empty"),
        ("train/*/*.png", "the training part is empty"),
        ("train/a/*.png", "the training part misses 1 class of the test part (a)"),
        ("t*/[ab]/*.png", "has one class only (c)"),
    ],
)
def test_parts_of_which_nothing_can_be_read_are_told(tmp_path: Path, broken: str, sentence: str) -> None:
    for number in range(12):
        path = tmp_path / "d" / ("train" if number < 9 else "test") / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)).save(path)
    for path in (tmp_path / "d").glob(broken):
        path.write_bytes(path.read_bytes()[:50])
    code, text = attempt(["evaluate", "knn", "pixels", "--data", "d", "--workers", "0"])
    assert code == 2 and sentence in text
    assert not (tmp_path / "results.csv").exists()


def test_a_model_that_takes_all_images_for_one_class_is_pointed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (44, 8, 8, 3), dtype=np.uint8)
    arrays = {
        "train_images": images[:24],
        "train_labels": np.arange(24) % 12 // 11,
        "test_images": images[24:],
    }
    np.savez(tmp_path / "rare.npz", **arrays, test_labels=np.arange(20) % 2)
    freqmask.evaluate.knn("pixels", data=str(tmp_path / "rare.npz"), k=[20], workers=0)
    assert "warning: pixels (k=20, seed 0) takes every image for '0'" in capsys.readouterr().out


def test_a_command_that_is_killed_after_its_rows_and_repeated_leaves_them_once(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from freqmask.evaluation import protocol

    def measure(k: int) -> list[tuple[str, str]]:
        models = ["pixels", "random:resnet10t"]
        with contextlib.suppress(KeyboardInterrupt):
            freqmask.evaluate.knn(models, data=data, k=[k], image_size=32, seeds=[0, 1], workers=0)
        return [(row["model"], row["variant"]) for row in rows(tmp_path / "results.csv")]

    finish = protocol.add_rows
    with monkeypatch.context() as patch:

        def killed(*arguments: Any) -> None:
            finish(*arguments)
            raise KeyboardInterrupt

        patch.setattr(protocol, "add_rows", killed)
        first = measure(3)
    whole = [("pixels", "k=3"), *[("random:resnet10t", "k=3")] * 2]
    assert first == whole
    table = (tmp_path / "results.csv").read_text().splitlines(keepends=True)
    (tmp_path / "results.csv").write_text("".join(table[:-1]))  # as if killed between two rows
    assert measure(3) == whole
    assert measure(5) == [*whole, *((model, "k=5") for model, _ in whole)]  # other options are history


def test_help_of_the_group_names_its_protocols_without_torch() -> None:
    for words in (["evaluate", "--help"], ["evaluate", "linear", "--help"]):
        code = (
            "import sys\nfrom freqmask.cli import main\n"
            f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\nsys.exit('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "pixels random:RUN timm:" in " ".join(done.stdout.split())
    assert COMMANDS["evaluate"].parts is not None


def test_the_namespace_is_lazy() -> None:
    code = "import sys, freqmask; freqmask.evaluate.knn; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_missing_option_of_the_twin_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        freqmask.evaluate.knn("pixels")
    with pytest.raises(UserError, match="MODEL is missing"):
        freqmask.evaluate.knn([], data="builtin:digits")
