"""The command line as a user types it."""

import subprocess
import sys
from pathlib import Path

import pytest

import freqmask
from freqmask.cli import COMMANDS, main


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


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = typed(capsys, "--help")
    assert code == 0
    assert all(name in out for name in COMMANDS)


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(capsys, "--version") == (0, f"freqmask {freqmask.__version__}\n", "")


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_and_version_import_no_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom freqmask.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 10


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["pretrian"], "command (pretrian) is unknown; did you mean 'pretrain'?"),
        (["pretrain", "--stepz", "1"], "option (--stepz) is unknown; did you mean 'steps'?"),
        (["pretrain", "x", "--steps", "abc"], "steps (abc) must be a whole number"),
        (["pretrain", "x", "--seed", "1.5"], "seed (1.5) must be a whole number"),
        (
            ["pretrain", "x", "--crop", "round"],
            "crop (round) must be one of 'resized', 'native', 'whole', 'center'",
        ),
        (["pretrain", "x", "--model_args", "7"], "model_args (7) must be a mapping such as '{depth: 4}'"),
        (["pretrain", "--steps"], "argument --steps: expected one argument"),
        (
            ["pretrain", "--config", "mfm-23"],
            "config (mfm-23) is neither a file nor a shipped recipe; did you mean",
        ),
        (["recipes", "a", "b"], "'b' is more than this command takes"),
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


def test_print_config_shows_a_recipe_and_what_overrides_it(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = typed(capsys, "pretrain", "x", "--config", "mfm-32", "--seed", "7", "--print_config")
    assert code == 0
    assert "seed: 7" in out
    assert "image_size: 32" in out


def test_help_documents_every_option_of_pretrain(capsys: pytest.CaptureFixture[str]) -> None:
    import inspect

    code, out, _ = typed(capsys, "pretrain", "--help")
    assert code == 0
    for name, parameter in inspect.signature(freqmask.pretrain).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            words = out[out.index(f"--{name} ") :].split("\n  --")[0].split("(type:")[0].split()
            assert len(words) > 4, f"--{name} has no help"


def test_hyphens_lists_and_bare_flags_are_accepted() -> None:
    from freqmask.commands.parser import _underscored, _with_whole_values

    words = ["a", "--crop-scale", "0.5", "1", "--dry-run", "--com_fractions", "0.1", "b"]
    words = [_underscored(word) for word in words]
    assert _with_whole_values(freqmask.pretrain, words) == [
        "a",
        "--crop_scale=[0.5,1]",
        "--dry_run=true",
        "--com_fractions=[0.1]",
        "b",
    ]


def test_help_calls_only_what_must_be_given_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert "(required)" not in typed(capsys, "pretrain", "--help")[1]
    assert "(required)" in typed(capsys, "convert", "--help")[1]
