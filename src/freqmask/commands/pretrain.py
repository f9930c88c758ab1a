"""``freqmask pretrain``: its options stand in ``freqmask.options``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from freqmask.commands.command import command, given_options
from freqmask.imports import uncollected
from freqmask.interop.formats import PUBLIC, find_backbone
from freqmask.options import Option
from freqmask.options.of_methods import built_in_options, check_method, options_of_class, typed_options
from freqmask.options.of_training import First, Images, Machine, Optimization, RunRecords, Views
from freqmask.training.run_folder import RunFolder


def options_of_method(method: Any) -> Mapping[str, Option]:
    """The options of a method of one's own, by its import path or class; those of the built-in ones are known."""
    if isinstance(method, str) and ":" not in method:
        return {}
    from freqmask.methods import find_method

    return typed_options(options_of_class(find_method(method) if isinstance(method, str) else method))


@command(
    *(First, Images, Views, Optimization, built_in_options(), Machine, RunRecords), more=options_of_method
)
def pretrain(data: list[Any] | None = None, *, config: str | None = None, **options: Any) -> Path:
    """Pre-train a backbone on images without labels.

    With no argument at all it trains a small ViT on photographs that come with scikit-image: three minutes
    on a laptop that show what the method does. Interrupted, it resumes where it was when you type the same
    command again.

    Args:
        data: training images: folders, image files, shards (of `freqmask prepare`, or any WebDataset tars) or
            parquet tables, each also behind s3://, gs://, https:// or hf://datasets/NAME; .npy or .npz arrays,
            hf:NAME, builtin:photos, builtin:digits, or an import path such as mylab.data:MySource. Several are joined.
        config: a YAML file of these options, or the name of a shipped recipe (`freqmask recipes`).

    Returns:
        The run folder.

    Raises:
        UserError: an option that cannot be, with the way out.
    """
    method, init = options["method"], options["init"]
    if isinstance(method, str) and method != "auto":
        check_method(method)
    is_resumed = options["out"] is not None and RunFolder(options["out"]).exists()
    if init is not None and not init.startswith(PUBLIC) and not is_resumed:
        find_backbone(init, "init")
    with uncollected():
        from freqmask.pretraining.job import run_job

    return run_job({"data": data, **options}, given_options())
