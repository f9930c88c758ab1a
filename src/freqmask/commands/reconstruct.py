"""``freqmask reconstruct``: what a model fills in."""

from __future__ import annotations

from pathlib import Path

from freqmask.commands.given import command
from freqmask.console import say
from freqmask.errors import UserError
from freqmask.options import Seed

_MOST_IMAGES = 8


@command(imports="freqmask.commands.sheets")
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
    from freqmask.commands.sheets import band_lines, draw_reconstructions, turns
    from freqmask.interop.reconstruction import open_method, psnr_by_band, read_image
    from freqmask.training.files import check_writable

    files = [image] if isinstance(image, str) else list(image)
    if not 1 <= len(files) <= _MOST_IMAGES:
        raise UserError(f"image ({len(files)} files) must be 1 to {_MOST_IMAGES} files; name fewer")
    if Path(out).suffix.lower() != ".png":
        raise UserError(f"out ({out}) must be a .png file; try --out {Path(out).with_suffix('.png')}")
    check_writable(out)
    method, opened = open_method(model, filter)
    images = {file: read_image(file, opened) for file in files}
    pictures = [
        (Path(file).name, name, method.reconstruct(pixels, key))
        for file, pixels in images.items()
        for name, key in turns(method, file, seed)
    ]
    for name in dict.fromkeys(name for _, name, _ in pictures):
        mine = [tensors for _, of, tensors in pictures if of == name]
        say(f"{name}: PSNR in dB, mean of {len(mine)} image{'s' if len(mine) > 1 else ''}")
        for line in band_lines([psnr_by_band(tensors) for tensors in mine]):
            say(line)
        say()
    path = draw_reconstructions(out, pictures, f"{opened.name}, {method.name}")
    say(f"look at     {path}")
    return path
