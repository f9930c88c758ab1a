"""Every snippet of docs/using-it.md runs as it stands, and its commands are commands."""

import importlib.util
import re
import shlex
import warnings
from pathlib import Path

import pytest
from tiny_runs import make_run

from freqmask.cli import COMMANDS

PAGE = (Path(__file__).parents[2] / "docs" / "using-it.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
SNIPPETS = [
    (title, code) for title, body in SECTIONS for code in re.findall(r"```python\n(.*?)```", body, re.DOTALL)
]
COMMAND_LINES = re.findall(r"^(freqmask .*)$", PAGE, re.MULTILINE)
EXTRAS = ("transformers", "segmentation_models_pytorch", "onnxruntime")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("using-it")
    make_run(folder / "runs" / "vit")
    make_run(folder / "runs" / "resnet", backbone="resnet18", image_size=64, patch_size=None, model_args={})
    return folder


@pytest.mark.parametrize(("title", "code"), SNIPPETS, ids=[title.split(":")[0] for title, _ in SNIPPETS])
def test_the_snippet_runs(title, code, workplace, monkeypatch):
    for name in EXTRAS:
        if f"import {name}" in code or f"from {name}" in code:
            if importlib.util.find_spec(name) is None:
                pytest.skip(f"{name} is not installed (an extra)")
            if name == "onnxruntime" and importlib.util.find_spec("onnxscript") is None:
                pytest.skip("onnxscript is not installed (an extra)")
    monkeypatch.chdir(workplace)
    for name in ("backbone.onnx", "mfm.pth"):
        if not (
            title.startswith("Somebody") and name == "mfm.pth"
        ):  # which takes the file of the section above
            Path(name).unlink(missing_ok=True)
    if title.startswith("Somebody") and not Path("mfm.pth").exists():
        import freqmask

        freqmask.export("runs/vit", format="mfm-checkpoint", out="mfm.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other libraries' plans for their own future
        exec(compile(code, title, "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_the_commands_and_their_options_exist(line):
    import inspect

    from freqmask.cli import load

    words = shlex.split(line, comments=True)
    assert words[1] in COMMANDS
    known = set(inspect.signature(load(words[1])).parameters)
    assert {word[2:] for word in words if word.startswith("--")} <= known
