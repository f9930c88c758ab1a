"""The command line as a user types it."""

import contextlib
import gc
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_runs import make_run, result

import freqmask
from freqmask import imports
from freqmask.cli import COMMANDS, load, main
from freqmask.commands.command import command, declared, given_values, read_words
from freqmask.errors import UserError


def typed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    capsys.readouterr()
    try:
        main(words)
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@command()
def trained(*, seed: int = 0) -> torch.nn.Linear:
    """A step of a training that seeds torch as Lightning's do."""
    torch.manual_seed(seed)
    layer = torch.nn.Linear(2, 1)
    layer(torch.rand(4, 2)).sum().backward()
    return layer


def test_a_program_s_own_settings_of_torch_change_no_command_and_are_kept() -> None:
    plain = trained()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode():
            before = torch.get_rng_state()
            layer = trained()
            assert torch.is_inference_mode_enabled()
            assert torch.empty(1).is_meta
        with torch.no_grad(), pytest.raises(UserError):
            trained(seed="none")
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(layer.weight, plain.weight, atol=0, rtol=0)  # also of one dtype and device
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, atol=0, rtol=0)


EVERY = [
    [name, *part]
    for name, command in COMMANDS.items()
    for part in ([[p] for p in command.parts or ()] or [[]])
]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = typed(capsys, "--help")
    assert code == 0
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert listed == list(COMMANDS)
    code, out, _ = typed(capsys, "evaluate", "--help")
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and line[2] != " "]
    assert listed == list(COMMANDS["evaluate"].parts or ())


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(capsys, "--version") == (0, f"freqmask {freqmask.__version__}\n", "")


def test_help_and_version_of_every_command_import_no_torch() -> None:
    asked = [["--help"], ["--version"], ["evaluate", "--help"], *([*words, "--help"] for words in EVERY)]
    code = (
        "import sys\nfrom freqmask.cli import main\n"
        f"for words in {asked!r}:\n"
        "    main(words)\n    print('END', words, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.split("END ")
    assert len(shown) == len(asked) + 1
    assert min(len(text) for text in shown[:-1]) > 10
    assert "True" not in [text.splitlines()[0].split()[-1] for text in shown[1:]]


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_help_documents_every_option_and_nothing_of_the_docstring_s_tail(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = typed(capsys, *words, "--help")
    assert code == 0
    assert "Returns:" not in out and "Raises:" not in out
    shown, function = " ".join(out.split()), load(*words)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            told = re.search(rf"^    {name}: (\S+ \S+)", inspect.getdoc(function) or "", re.MULTILINE)
            assert told, f"--{name} has no help"
            assert f"--{name} " in shown
            assert told[1].rstrip(".") in shown


def test_every_command_has_a_twin_but_recipes_which_is_the_name_of_a_module() -> None:
    for words in EVERY:
        if words[0] != "recipes":
            twin = getattr(freqmask, words[0])
            assert (getattr(twin, words[1]) if words[1:] else twin) is load(*words)
            assert words[0] in freqmask.__all__


def test_help_says_where_runs_are_looked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert "(default: runs)" in typed(capsys, "runs", "--help")[1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["pretrian"], "command (pretrian) is unknown; did you mean 'pretrain'?"),
        (["pretrain", "x", "-o", "y"], "option (-o) is unknown; options begin with --, such as --out"),
        (["pretrain", "--stepz", "1"], "option (--stepz) is unknown; did you mean 'steps'?"),
        (["pretrain", "--learning_rate", "1"], "option (--learning_rate) is unknown; did you mean 'lr'?"),
        (["pretrain", "--lerning_rate", "1"], "option (--lerning_rate) is unknown; did you mean 'lr'?"),
        (["pretrain", "--num-workers", "1"], "option (--num_workers) is unknown; did you mean 'workers'?"),
        (
            ["pretrain", "x", "--method", "denoisng"],
            "method (denoisng) must be a known method or an import path; did you",
        ),
        (["tran"], "command (tran) is unknown; did you mean 'pretrain'?"),
        (["evaluate", "fine-tuning"], "command (evaluate fine-tuning) is unknown; did you mean 'finetune'?"),
        (["pretrain", "x", "--steps", "abc"], "steps (abc) must be a whole number at least 1"),
        (["pretrain", "x", "--seed", "1.5"], "seed (1.5) must be a whole number from 0 to below 2^63"),
        (
            ["pretrain", "x", "--crop", "round"],
            "crop (round) must be one of 'resized', 'native', 'whole', 'center'",
        ),
        (["pretrain", "x", "--model_args", "7"], "model_args (7) must be a mapping such as '{depth: 4}'"),
        (["pretrain", "--steps"], "--steps needs a value: a whole number at least 1"),
        (["pretrain", "--steps", "--lr", "1"], "--steps needs a value: a whole number at least 1"),
        (["evaluate", "knn"], "MODEL is missing: run folders"),
        (
            ["evaluate", "knn", "--data", "x", "pixels"],
            "MODEL is missing: run folders, exported folders, timm:NAME (public weights), random:NAME or random:RUN "
            "(fresh weights), pixels (the images themselves, where nothing is trained); name it before --data: an",
        ),
        (["evaluate", "knn", "pixels"], "--data is missing: images with labels"),
        (["predict", "run", "x"], "--out is missing: a .csv file for classes, a folder for masks"),
        (
            ["pretrain", "--config", "mfm-23"],
            "config (mfm-23) is neither a file nor a shipped recipe; did you mean",
        ),
        (
            ["export", "resnet18.a1_in1k", "--out", "x"],
            "model (resnet18.a1_in1k) must be a run folder, an exported",
        ),
        (["prepare", "~nobody of that name/x", "--out", "y"], "a path begins with ~ and the name of no user"),
        (["evaluate", "runs/mine"], "command (evaluate runs/mine) is unknown; choose from 'knn',"),
        (["runs/mine"], "command (runs/mine) is unknown; choose from 'pretrain',"),
        (["recipes", "a", "b"], "'b' is more than this command takes"),
        (["pretrain", "cats", "--data", "dogs"], "'cats' is more than this command takes beside --data;"),
        (["prepare", "--data", "cats", "--data=dogs", "--out", "x"], "--data is given twice; give all its"),
        (["evaluate", "robustness", "a", "--folder", "c", "--folder", "d"], "--folder is given twice"),
        (
            ["evaluate", "knn", "a", "--model", "b", "--data", "x"],
            "'a' is more than this command takes beside --model;",
        ),
        (["embed", "--model", "runs/none", "photos"], "model (runs/none)"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    code, out, err = typed(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {sentence}")
    assert err.count("\n") == 1


def test_an_unknown_option_in_a_config_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("stepz: 5\n")
    code, _, err = typed(capsys, "pretrain", "x", "--config", str(tmp_path / "c.yaml"))
    assert code == 2
    assert "stepz" in err
    assert "did you mean 'steps'?" in err


def test_out_may_be_in_somebody_s_home_where_no_shell_has_looked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    words = ("evaluate", "knn", "pixels", "--data", "builtin:digits", "--out=~/results")
    assert typed(capsys, *words)[0] == 0
    assert (tmp_path / "home" / "results" / "results.csv").is_file()
    assert not Path("~").exists()
    (tmp_path / "c.yaml").write_text("out: ~/run\n")
    given = given_values({"config": tmp_path / "c.yaml"}, declared(freqmask.pretrain))
    assert given["out"] == str(tmp_path / "home" / "run")


@pytest.mark.parametrize(
    "words",
    [["--config", "mfm-32", "--lr", "7.5"], ["--lr", "7.5", "--config=mfm-32"]],
    ids=["after", "before"],
)
def test_what_is_typed_overrides_a_recipe_wherever_it_stands(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = typed(capsys, "pretrain", "x", *words, "--print_config")
    assert code == 0
    assert "\nlr: 7.5" in out
    assert "image_size: 32" in out


def test_hyphens_lists_and_bare_flags_are_accepted() -> None:
    words = ["a", "--crop-scale", "0.5", "1", "--dry-run", "--com_fractions", "0.1", "b", "--flip=no"]
    known = declared(freqmask.pretrain)
    given = given_values(read_words(known, words), known)
    assert given == {
        "data": ["a", "b"],
        "crop_scale": [0.5, 1.0],
        "dry_run": True,
        "com_fractions": [0.1],
        "flip": False,
    }


def test_a_flag_that_may_be_auto_takes_that_word_and_no_data() -> None:
    known = declared(freqmask.pretrain)
    for words, value in ((["--convert_channels", "auto", "a"], "auto"), (["--convert_channels", "a"], True)):
        assert given_values(read_words(known, words), known) == {"convert_channels": value, "data": ["a"]}


def test_the_last_of_a_single_value_that_is_given_twice_counts() -> None:
    known = declared(freqmask.pretrain)
    words = ["--image_size", "32", "--lr", "1", "--image_size", "64", "--lr=2", "a"]
    assert given_values(read_words(known, words), known) == {"image_size": 64, "lr": 2.0, "data": ["a"]}


def test_a_key_of_a_mapping_is_set_on_top_of_what_a_file_says(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model_args: {depth: 2, name: '4'}\n")
    known = declared(freqmask.pretrain)
    words = ["--model-args.num_heads", "2", "--config", str(tmp_path / "c.yaml"), "--model_args.depth=1"]
    given = given_values(read_words(known, words), known)
    assert given == {"model_args": {"depth": 1, "name": "4", "num_heads": 2}}
    whole = ["--config", str(tmp_path / "c.yaml"), "--model_args", "{depth: 1}"]
    assert given_values(read_words(known, whole), known) == {"model_args": {"depth": 1}}
    none = ["--model_args", "null", "--model_args.depth", "1"]
    assert given_values(read_words(known, none), known) == {"model_args": {"depth": 1}}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model_args", "tiny", "--model_args.depth", "4"], "model_args (tiny) must be a mapping"),
        (["--model_args", "{a: ", "--model_args.depth", "4"], "model_args ({a: ) must be a mapping"),
        (["--model_args.depth", "{"], "model_args.depth ({) must be YAML"),
        (["--lr", "0.1", "--lr.x", "4"], "option (--lr.x) is unknown; did you mean 'lr'?"),
    ],
)
def test_a_key_of_what_is_no_mapping_is_a_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = typed(capsys, "pretrain", "photos", "--dry_run", *words)
    assert (code, out) == (2, "") and sentence in err


@pytest.mark.parametrize(
    ("words", "some"),
    [
        (["ev"], ["evaluate", "pretrain"]),
        (["evaluate", "k"], ["knn", "bands"]),
        (["pretrain", "x", "--cro"], ["--crop", "--crop_scale", "--help"]),
        (["pretrain", "--crop", ""], ["native", "whole"]),
        (["evaluate", "knn", "--cache", ""], ["true", "false"]),
        (["evaluate", "finetune", "--flip", ""], ["auto", "true", "false"]),
        (["nothing", ""], []),
    ],
)
def test_a_shell_is_told_what_a_word_may_become(
    words: list[str], some: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = typed(capsys, "--complete", *words)
    assert (code, err) == (0, "")
    assert set(some) <= set(out.split())
    assert bool(some) == bool(out.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_a_word(tmp_path: Path) -> None:
    script = (
        f'freqmask() {{ {sys.executable} -m freqmask "$@"; }}\n'
        'eval "$(freqmask --completion bash)"\n'
        "COMP_WORDS=(freqmask pretrain --cro); COMP_CWORD=2; _freqmask freqmask --cro pretrain\n"
        'echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["--crop", "--crop_scale"], done.stderr


def test_help_calls_only_what_must_be_given_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert "(required)" not in typed(capsys, "pretrain", "--help")[1]
    assert "(required)" in typed(capsys, "convert", "--help")[1]


@pytest.mark.parametrize("fails", [False, True])
def test_no_garbage_is_collected_while_a_command_of_its_own_process_imports(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with imports.uncollected():
        assert gc.isenabled(), "a program that calls us keeps its collector"
    monkeypatch.setattr(imports, "own_process", True)
    try:
        with contextlib.suppress(ImportError), imports.uncollected():
            assert not gc.isenabled()
            if fails:
                raise ImportError("no")
        assert gc.isenabled() and gc.get_freeze_count() > 1_000
    finally:
        gc.unfreeze()


HEAVY = {"torch", "torchvision", "timm", "lightning", "matplotlib", "scipy", "sklearn"}
LIGHT = {  # commands that import none of them, each as far as it goes
    "recipes": [["recipes"], ["recipes", "mfm-32"]],
    "runs": [["runs", "."]],
    "report": [["report", "run"], ["report", "run", "--table", "md"]],
}
CALLS = {  # as short as a command can be typed, beside MODEL and DATA
    "pretrain": ["DATA"],
    "info": [],
    "prepare": ["DATA", "--out", "OUT"],
    "spectra": ["1.png"],
    "reconstruct": ["timm:MODEL", "1.png"],
    "export": ["timm:MODEL", "--out", "OUT"],
    "convert": ["there", "--out", "OUT"],
    "embed": ["timm:MODEL", "DATA"],
    "predict": ["timm:MODEL", "DATA", "--out", "OUT"],
    "evaluate": ["timm:MODEL", "--data", "DATA"],
}
MISTAKES = [  # that need nothing heavy to be found
    ["export", "MODEL"],
    ["export", "MODEL", "--push", "ME/IT", "--format", "onnx"],
    ["export", "MODEL", "--out", "OUT", "--public"],
    ["export", "no/MODEL", "--out", "OUT"],
    ["export", "resnet19x", "--out", "OUT"],
    ["export", "resnet18", "--out", "OUT"],
    ["embed", "no/MODEL", "DATA"],
    ["predict", "no/MODEL", "DATA", "--out", "x.csv"],
    ["reconstruct", "no/MODEL", "1.png"],
    ["embed", "MODEL", "DATA", "--out", "x.csv"],
    ["embed", "MODEL", "DATA", "--out", "x.npy", "--patches", "--blocks", "1"],
    ["spectra", *"12345"],
    ["spectra", "1.png", "--out", "x.pdf"],
    ["reconstruct", "MODEL", "1.png", "--out", "x.pdf"],
    ["convert", "FILE", "--out", "."],
    ["evaluate", "fewshot", "pixels", "--data", "DATA", "--epochs", "3"],
    ["evaluate", "linear", "pixels", "no/MODEL", "--data", "DATA"],
    ["pretrain", "DATA", "--lerning_rate", "3"],
    ["pretrain", "DATA", "--method", "nonsense"],
    ["pretrain", "DATA", "--init", "no/MODEL"],
]


def first_heavy_imports(calls: list[list[str]], folder: Path) -> list[str]:
    """For each call of a fresh process: which library is imported first, and whether garbage is collected then.

    The import itself is not made: every call ends there, or with a sentence before it.
    """
    code = f"""
import contextlib, gc, io, sys
from freqmask.cli import main

class Stopped(BaseException):
    pass

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in {HEAVY!r}:
            raise Stopped(f"{{name}} {{gc.isenabled()}}")

sys.meta_path.insert(0, Watch())
for words in {calls!r}:
    sys.argv = ["freqmask", *words]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            main()
            ended = "nothing"
        except (Stopped, SystemExit) as error:
            ended = told.getvalue() or str(error)
    print(" ".join(ended.split()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_command_imports_what_is_heavy_without_collecting_garbage(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    calls = [[*words, *CALLS[words[0]]] for words in EVERY if words[0] not in LIGHT]
    assert set(first_heavy_imports(calls, tmp_path)) <= {f"{library} False" for library in HEAVY}
    make_run(tmp_path / "run", results=[result("run", 0.5)])
    light = [words for calls in LIGHT.values() for words in calls]
    assert set(first_heavy_imports(light, tmp_path)) == {"nothing"}


def test_a_mistake_that_needs_nothing_heavy_is_told_before_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    for words, ended in zip(MISTAKES, first_heavy_imports(MISTAKES, tmp_path), strict=True):
        assert ended.startswith("error: "), (words, ended)
