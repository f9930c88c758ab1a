"""A backbone on the Hugging Face hub: private unless asked, with a card made from the run."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from freqmask import __version__
from freqmask.errors import UserError, brief
from freqmask.interop.exporters import write_timm
from freqmask.interop.models import OpenedModel
from freqmask.interop.weights import check_reachable
from freqmask.training.files import read_rows
from freqmask.training.run_folder import RunFolder

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# options of a run that name places on this machine, or say nothing of the backbone
_LOCAL = "data out init config probe_data logger workers devices strategy num_nodes".split()  # noqa: SIM905
_LOCAL_COLUMNS = re.compile(r"data|path|file|out|folder|model", re.IGNORECASE)


def check_hub(repository: str) -> None:
    """Refuse early what cannot be pushed.

    Args:
        repository: ``USER/NAME``.

    Raises:
        UserError: the name is none of the hub's, nobody is logged in, or the hub does not answer.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(f"push ({repository}) must be USER/NAME, a repository of the Hugging Face hub")
    from huggingface_hub import get_token

    if not get_token():
        raise UserError("push needs a token of the Hugging Face hub; run `hf auth login`, or set HF_TOKEN")
    check_reachable(f"push ({repository})")


def push_model(
    opened: OpenedModel, repository: str, *, public: bool = False, with_images: bool = False, api: Any = None
) -> str:
    """Send the timm folder and a model card.

    Args:
        opened: the model.
        repository: ``USER/NAME``, made where it is missing.
        public: False makes it private.
        with_images: True adds previews, and the data's names and paths to the card.
        api: a ``huggingface_hub.HfApi``; None makes one.

    Returns:
        The repository's address.

    Raises:
        UserError: the hub refuses or does not answer.
    """
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi(library_name="freqmask", library_version=__version__)
    run = opened.run
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        write_timm(opened, folder)
        previews = sorted(run.previews.glob("step-*.png"))[-1:] if with_images and run is not None else []
        for preview in previews:
            shutil.copy(preview, folder)
        card = model_card(opened, repository, [preview.name for preview in previews], with_images)
        (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
        try:
            address = api.create_repo(repository, private=not public, exist_ok=True)
            api.upload_folder(
                repo_id=repository,
                folder_path=str(folder),
                commit_message=f"{opened.name}, freqmask {__version__}",
            )
        except Exception as error:  # the hub's library raises its own, httpx's and the system's
            reason = brief(error, 200)
            raise UserError(f"push ({repository}) failed ({type(error).__name__}: {reason})") from error
    return str(address)


def model_card(opened: OpenedModel, repository: str, previews: list[str], with_images: bool) -> str:
    """The README.md of a pushed backbone.

    Args:
        opened: the model.
        repository: ``USER/NAME``.
        previews: pictures in the folder to show.
        with_images: True names the data.
    """
    from huggingface_hub import ModelCardData

    run = opened.run
    options = run.config() if run is not None else {}
    header = ModelCardData(
        library_name="timm", pipeline_tag="image-feature-extraction", tags=["freqmask", "timm"]
    )
    parts = [
        f"---\n{header}\n---",
        f"# {repository.split('/')[1]}",
        f"A {opened.module.pretrained_cfg.get('architecture', 'timm')} backbone, pre-trained without labels by "
        f"[freqmask](https://pypi.org/project/freqmask/) {__version__}"
        + (f" ({options['method']})." if options else "."),
        f"```python\nimport timm\nmodel = timm.create_model('hf-hub:{repository}', pretrained=True).eval()\n```",
        f"Images of {opened.input_size[0]} channels, {opened.input_size[1]}x{opened.input_size[2]} pixels; values "
        f"`{opened.value_range}` become [0, 1], then mean {list(opened.mean)} and std {list(opened.std)}.",
    ]
    if run is not None:
        parts += ["## Data", _data(run, options, with_images), "## Recipe", _recipe(options)]
        parts += ["## Results", _results(run)]
    parts += [f"![preview]({name})" for name in previews]
    return "\n\n".join(parts) + "\n"


def _data(run: RunFolder, options: Mapping[str, Any], with_images: bool) -> str:
    state = run.state()
    images = f"{state['images']:,} images" if isinstance(state.get("images"), int) else "Images"
    source = f", from {', '.join(map(str, options.get('data') or []))}" if with_images else ""
    return f"{images}, fingerprint `{state.get('data')}`{source}."


def _recipe(options: Mapping[str, Any]) -> str:
    public = {name: value for name, value in options.items() if name not in _LOCAL and not _is_path(value)}
    return "```yaml\n" + yaml.safe_dump(public, sort_keys=False) + "```"


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and ("/" in value or "\\" in value)


def _results(run: RunFolder) -> str:
    summary, rows = run.summary(), read_rows(run.path / "results.csv")
    names = ("steps", "loss", "relative_loss", "held_out_loss", "held_out_relative_loss")
    lines = [f"- {name.replace('_', ' ')}: {summary[name]:.4g}" for name in names if name in summary]
    columns = [name for name in (rows[0] if rows else {}) if not _LOCAL_COLUMNS.search(name)]
    columns = [name for name in columns if not any(_is_path(row[name]) for row in rows)]
    if columns:
        lines += ["", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(str(row[name] or '') for name in columns)} |" for row in rows]
    return "\n".join(lines) or "The run has not ended yet."
