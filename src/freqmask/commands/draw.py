"""``freqmask spectra`` and ``freqmask reconstruct``: what filters keep of images, and what a model fills in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from freqmask.commands.command import command
from freqmask.console import say
from freqmask.errors import UserError
from freqmask.imports import uncollected
from freqmask.interop.formats import check_model
from freqmask.options import Range, Seed


@command()
def spectra(
    image: list[str],
    *,
    out: str = "spectra.png",
    image_size: Annotated[int | None, Range(least=8)] = None,
    filters: list[str] | None = None,
    seed: Seed = 0,
) -> Path:
    """Draws what every filter keeps of an image and what it removes, and prints the shares of energy.

    For each filter: the kept part, the removed part, the spectrum with the kept bins, and the shares of
    bins and energy. Parts too faint to see, and parts with negative values, are stretched; the picture
    says by how much. Energy is counted without the image's mean. A mixture of filters, such as com, gives one
    for each of them.

    Args:
        image: image files, at most four; each is cropped to its middle square.
        out: the PNG to write.
        image_size: side in pixels that the square is resized to; the default is 224, or the image's own
            shorter side where it is smaller.
        filters: a list of the filters to draw, for example '["lowpass(radius=8)", com, mylab.filters:Wedge]';
            the default is one of every kind.
        seed: decides what random filters draw.

    Returns:
        The path of the picture.

    Raises:
        UserError: no image, more than four, one that cannot be read, or an unknown filter.
    """
    out = _check(image, 4, out)
    with uncollected():
        import torch

        from freqmask.filters import MIXTURES, OneOf, build_filter
        from freqmask.pretraining.figures import apply_filter, draw_filters, filter_table, read_squares
        from freqmask.rng import identity_of, sample_key

    squares = read_squares(image, image_size)
    size = next(iter(squares.values())).shape[-1]
    built = dict[str, Any]()
    for text in filters or default_filters(size):
        one = build_filter(text, size)
        names, parts = (one.names, one.filters) if isinstance(one, OneOf) else ([text], [one])
        for name, part in zip(names, parts, strict=True):
            built[name if name == text or text in MIXTURES else f"{name} of {text}"] = part
    keys = {name: torch.tensor([sample_key(seed, 0, identity_of(name))]) for name in squares}
    filterings = [
        [apply_filter(text, one, square, keys[name]) for name, square in squares.items()]
        for text, one in built.items()
    ]
    say(filter_table(list(squares), filterings))
    path = draw_filters(out, squares, filterings)
    say(f"\n{path} shows them")
    return path


def default_filters(size: int) -> list[str]:
    """One filter of every kind, its radii scaled to a side in pixels from those meant for 224."""
    from freqmask.filters import FILTERS

    band = f"(low={max(1, round(8 * size / 224))}, high={max(2, round(32 * size / 224))})"
    arguments = {
        **dict.fromkeys(("bandpass", "bandstop"), band),
        **dict.fromkeys(("com", "rcom"), "(fractions=[0.01])"),
        **dict.fromkeys(("energy", "renergy"), "(share=0.9)"),
        "randombins": "(fraction=0.5)",
    }
    return [name + arguments.get(name, "") for name in FILTERS if name != "oneof"]


@command()
def reconstruct(
    model: str,
    image: list[str],
    *,
    filter: str | None = None,
    out: str = "reconstruction.png",
    seed: Seed = 0,
) -> Path:
    """Draws what a model fills in, and prints how well: the PSNR of every band of frequencies.

    For each image and filter: the original, the filtered input, the prediction, the missing part filled
    in, the error of that, and the spectra. A mixture of filters, such as MFM's, gives a row for each of them.

    Args:
        model: a run folder, or a converted MFM checkpoint with its decoder.
        image: image files, at most eight; each is cropped to its middle and brought to the model's size.
        filter: another filter than the run's, such as "lowpass(radius=8)", com or fixed.
        out: the PNG to write.
        seed: decides what random filters draw.

    Returns:
        The picture.

    Raises:
        UserError: no decoder, an image that cannot be read, or an unknown filter.
    """
    out = _check(image, 8, out)
    check_model(model)
    with uncollected():
        from freqmask.commands.sheets import band_lines, draw_reconstructions, turns
        from freqmask.interop.models import open_method, psnr_by_band, read_image

    method, opened = open_method(model, filter)
    images = {file: read_image(file, opened) for file in image}
    pictures = [
        (Path(file).name, name, method.reconstruct(pixels, key))
        for file, pixels in images.items()
        for name, key in turns(method, file, seed)
    ]
    names = dict.fromkeys(name for _, name, _ in pictures)
    for name in names:
        done = filter if filter is not None and len(names) == 1 else name
        bands = [psnr_by_band(tensors) for _, of, tensors in pictures if of == name]
        heading = f"{done}: PSNR in dB, mean of {len(bands)} image{'s' if len(bands) > 1 else ''}"
        say("\n".join([heading, *band_lines(bands), ""]))
    path = draw_reconstructions(out, pictures, f"{opened.name}, {method.name}")
    say(f"figure      {path}")
    return path


def _check(image: Sequence[str], most: int, out: str) -> str:
    """The PNG to write, home folder and all, refused where it cannot be, or is one of the images."""
    from freqmask.training.files import check_kept, check_writable

    path = Path(out).expanduser()
    if not 1 <= len(image) <= most:
        raise UserError(f"image ({len(image)} files) must be 1 to {most} files; name fewer")
    if path.suffix.lower() != ".png":
        raise UserError(f"out ({out}) must be a .png file; try --out {path.with_suffix('.png')}")
    check_kept(path, image)
    check_writable(path)
    return str(path)
