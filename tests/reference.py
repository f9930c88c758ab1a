"""The mathematics once more: slow, float64, numpy, full shifted spectra with DC at (H // 2, W // 2).

Written from the papers' definitions alone and sharing no code with the package, so that they can only be
wrong apart. Nothing here is optimised; images are (batch, channel, H, W).
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

LUMA = np.array([0.299, 0.587, 0.114])


def spectrum(images):
    """Ortho-normal DFT, DC in the centre."""
    return np.fft.fftshift(np.fft.fft2(np.asarray(images, np.float64), norm="ortho"), axes=(-2, -1))


def filtered(images, keep):
    """Re F^-1(F keep)."""
    kept = np.fft.ifftshift(spectrum(images) * keep, axes=(-2, -1))
    return np.fft.ifft2(kept, norm="ortho").real


def low_pass(height, width, radius):
    """r^2 < radius^2 in Python's unbounded integers; a fractional radius counts as its decimals say."""
    short, radius = min(height, width), Fraction(str(radius))
    keep = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            ky, kx = row - height // 2, column - width // 2
            left = short**2 * (ky**2 * width**2 + kx**2 * height**2)
            keep[row, column] = left < radius**2 * height**2 * width**2
    return keep


def radius(height, width):
    """Distance from DC in cycles per shorter side."""
    ky = (np.arange(height) - height // 2)[:, None] / height
    kx = (np.arange(width) - width // 2) / width
    return min(height, width) * np.sqrt(ky**2 + kx**2)


def pairs(height, width):
    """Every conjugate pair of unshifted places once, as a set of one or two places."""
    seen, found = set(), []
    for ky in range(height):
        for kx in range(width):
            pair = frozenset({(ky, kx), (-ky % height, -kx % width)})
            if pair not in seen:
                seen.add(pair)
                found.append(sorted(pair, key=lambda place: (place[1] > width // 2, place)))
    return found


def com_power(images, magnitude="luma"):
    """What Com ranks: (masks, H, W), unshifted, for one image (C, H, W)."""
    parts = np.fft.fft2(np.asarray(images, np.float64), norm="ortho")
    if magnitude == "each":
        return np.abs(parts) ** 2
    if magnitude == "luma" and len(parts) == 3:
        return np.abs(np.tensordot(LUMA, parts, 1))[None] ** 2
    without_dc = np.abs(parts) ** 2
    without_dc[:, 0, 0] = 0
    rms = np.sqrt(without_dc.sum((1, 2)) / (without_dc[0].size - 1))
    scaled = [part / value if value > 1e-9 else 0 * part for part, value in zip(parts, rms, strict=True)]
    return np.abs(np.mean(scaled, axis=0))[None] ** 2


def strongest(power, count):
    """Pairs by falling power, as many as fit into ``count`` bins of the full spectrum; shifted mask."""
    height, width = power.shape
    ranked = sorted(pairs(height, width), key=lambda pair: (-power[pair[0]], pair[0]))
    keep, kept = np.zeros((height, width)), 0
    for pair in ranked:
        if kept + len(pair) > count:
            break
        kept += len(pair)
        for place in pair:
            keep[place] = 1
    return np.fft.fftshift(keep)


def com(image, fraction, magnitude="luma"):
    """Com's mask of one image (C, H, W): (1 or C, H, W), shifted."""
    count = max(1, round(fraction * image.shape[-2] * image.shape[-1]))
    return np.stack([strongest(power, count) for power in com_power(image, magnitude)])


def energy(image, share, magnitude="luma"):
    """DC and the fewest strongest pairs that hold a share of the energy without DC; shifted."""
    masks = []
    for power in com_power(image, magnitude):
        power = power.copy()
        power[0, 0] = 0
        ranked = sorted(pairs(*power.shape), key=lambda pair: (-power[pair[0]], pair[0]))
        keep, held = np.zeros(power.shape), 0.0
        keep[0, 0] = 1
        for pair in ranked:
            if held >= share * power.sum():
                break
            held += power[pair[0]] * len(pair)
            for place in pair:
                keep[place] = 1
        masks.append(np.fft.fftshift(keep))
    return np.stack(masks)


def full_mask(half, width):
    """A half spectrum's map as the full, shifted one, place by place."""
    half = np.asarray(half, np.float64)
    height = half.shape[-2]
    full = np.zeros((*half.shape[:-1], width))
    for ky in range(height):
        for kx in range(width):
            source = (ky, kx) if kx <= width // 2 else (-ky % height, width - kx)
            full[..., ky, kx] = half[..., source[0], source[1]]
    return np.fft.fftshift(full, axes=(-2, -1))


def spectrum_loss(prediction, target, keep, masked=1.0, kept=0.0, reduce="batch", gamma=1.0, focal=None):
    """sum(w d) / sum(w) over full spectra; keep is full and shifted, of one or all channels."""
    difference = spectrum(prediction) - spectrum(target)
    magnitude = np.sqrt(difference.real**2 + difference.imag**2 + 1e-12)
    distance = magnitude**gamma
    if focal is not None:
        weight = magnitude**focal
        distance = distance * weight / weight.max(axis=(-2, -1), keepdims=True)
    weight = np.broadcast_to(masked * (1 - keep) + kept * keep, distance.shape)
    if reduce == "batch":
        return (weight * distance).sum() / weight.sum()
    return np.mean([(w * d).sum() / w.sum() for w, d in zip(weight, distance, strict=True)])


def softmax(logits):
    """Probabilities along the last axis."""
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def distillation_loss(student, teacher, center, student_temperature, teacher_temperature):
    """Cross-entropy of the student with the centred and sharpened teacher, mean over images."""
    targets = softmax((teacher - center) / teacher_temperature)
    return -np.mean((targets * np.log(softmax(student / student_temperature))).sum(-1))


def splitmix64(state, count):
    """The generator's published definition: ``count`` outputs from a state, in unbounded integers."""
    outputs, mask = [], 2**64 - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        outputs.append(mixed ^ (mixed >> 31))
    return outputs


def bicubic_matrix(before, after):
    """(after, before): Keys' cubic with a = -0.75, pixel centres, edge repeated, no antialiasing."""
    a, matrix = -0.75, np.zeros((after, before))
    for row in range(after):
        centre = (row + 0.5) * before / after - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            t = abs(centre - tap)
            if t <= 1:
                weight = (a + 2) * t**3 - (a + 3) * t**2 + 1
            else:
                weight = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            matrix[row, min(max(tap, 0), before - 1)] += weight
    return matrix


def resized(images, height, width):
    """Separable bicubic resize."""
    return bicubic_matrix(images.shape[-2], height) @ images @ bicubic_matrix(images.shape[-1], width).T


def downscaled(images, factor):
    """Down, clamp, up, clamp."""
    height, width = images.shape[-2:]
    small = resized(images, round(height / factor), round(width / factor)).clip(0, 1)
    return resized(small, height, width).clip(0, 1)


def blurred(image, size, sigma):
    """One image (C, H, W) with a two-dimensional Gaussian kernel, border reflected."""
    axis = np.arange(size) - size // 2
    kernel = np.exp(-(axis[:, None] ** 2 + axis**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    margin = size // 2
    padded = np.pad(image, ((0, 0), (margin, margin), (margin, margin)), mode="reflect")
    height, width = image.shape[-2:]
    return sum(
        kernel[row, column] * padded[:, row : row + height, column : column + width]
        for row in range(size)
        for column in range(size)
    )


def mfm_vit_shapes(
    dim: int, depth: int, hidden: int, patch: int, channels: int, tokens: int
) -> dict[str, tuple[int, ...]]:
    """The encoder's names and shapes of a ViT in MFM's released files, without the prefix.

    Args:
        dim: width D of a token.
        depth: blocks.
        hidden: width of the MLPs.
        patch: side of a patch in pixels.
        channels: of the images.
        tokens: N + 1, with the class token.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, tokens, dim),
        "patch_embed.proj.weight": (dim, channels, patch, patch),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    for number in range(depth):
        block = {
            **{f"{norm}.{part}": (dim,) for norm in ("norm1", "norm2") for part in ("weight", "bias")},
            "attn.qkv.weight": (3 * dim, dim),
            "attn.q_bias": (dim,),
            "attn.v_bias": (dim,),
            "attn.proj.weight": (dim, dim),
            "attn.proj.bias": (dim,),
            "mlp.fc1.weight": (hidden, dim),
            "mlp.fc1.bias": (hidden,),
            "mlp.fc2.weight": (dim, hidden),
            "mlp.fc2.bias": (dim,),
        }
        shapes |= {f"blocks.{number}.{name}": shape for name, shape in block.items()}
    return shapes
