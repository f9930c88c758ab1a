"""What a filter is: a map of what an image's spectrum keeps; its complement; one of several drawn per image."""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Complex, Float, Int64
from torch import Tensor, nn

from freqmask.errors import UserError
from freqmask.rng import Keys, batch_keys, uniform
from freqmask.spectrum import Images, constant, image_size, irfft2, rfft2


class Filtered(NamedTuple):
    """Filtered images (batch, C, H, W) and keep (batch, 1 or C, H, W // 2 + 1) in [0, 1]."""

    images: Tensor
    keep: Tensor


class Filter(nn.Module):
    """Hides frequencies: one FFT, a map ``keep``, one inverse FFT.

    A filter of your own defines ``keep`` and stores its constructor's arguments as attributes of the same
    names; ``describe`` and the run's configuration read them from there.
    """

    name = ""  # what ``build_filter`` calls it; empty: the import path of the class

    @abstractmethod
    def keep(
        self, spectrum: Complex[Tensor, "batch channel height half_width"], size: tuple[int, int], keys: Keys
    ) -> Float[Tensor, "batch mask_channel height half_width"]:
        """Which frequencies each image keeps.

        Args:
            spectrum: half spectra of images in [0, 1].
            size: (H, W) of the images.
            keys: one an image; all randomness comes from them.

        Returns:
            1 = kept, 0 = hidden, for one or all channels; the same for both partners of a conjugate pair.
        """

    def forward(self, images: Images, keys: Keys | None = None, clamp: bool = False) -> Filtered:
        """Filters a batch.

        Args:
            images: in [0, 1], any channels and size.
            keys: one an image; ``None`` draws fresh ones.
            clamp: whether the result is cut to [0, 1], which it may else leave.

        Returns:
            Re F^-1(F(images) keep), and keep. float32, float64 for float64 images.

        Raises:
            UserError: the images are no batch.
        """
        keys = batch_keys(images, keys)
        size = image_size(images)
        spectrum = rfft2(images)
        keep = self.keep(spectrum, size, keys)
        filtered = irfft2(spectrum * keep, size)
        return Filtered(filtered.clamp(0, 1) if clamp else filtered, keep)

    def check(self, image_size: tuple[int, int]) -> None:
        """Whether the settings make sense for images of a size; nothing to check unless overridden.

        Args:
            image_size: (H, W).

        Raises:
            UserError: for a radius outside the spectrum and the like.
        """

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, from which an equal filter can be built.

        Returns:
            Plain values by name.

        Raises:
            UserError: where a filter does not store an argument under its name.
        """
        names = [name for name in inspect.signature(type(self)).parameters if name not in ("args", "kwargs")]
        missing = [name for name in names if not hasattr(self, name)]
        if missing:
            raise UserError(
                f"filter {type(self).__name__} must store its argument(s) {', '.join(missing)} as attributes "
                "of the same names, so that a run can record them"
            )
        return {name: _literal(getattr(self, name)) for name in names}

    def describe(self) -> str:
        """A text from which ``build_filter`` makes an equal filter, for example ``lowpass(radius=16)``."""
        # a name is of the class that has it: what is derived from a filter of ours is another one
        own = vars(type(self)).get("name") or f"{type(self).__module__}:{type(self).__qualname__}"
        return f"{own}({', '.join(f'{key}={value!r}' for key, value in self.settings().items())})"

    def extra_repr(self) -> str:
        """The description, for printing."""
        return self.describe()


def _literal(value: Any) -> Any:
    """The value as Python writes it: numbers of numpy are decimals, as ``exact_radius`` takes them."""
    if isinstance(value, np.floating):
        return float(str(value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray | list | tuple):
        values = [_literal(item) for item in value]
        return tuple(values) if isinstance(value, tuple) else values
    return value


class Complement(Filter):
    """Keeps what another filter hides: keep = 1 - opposite.keep.

    A complement is a class of two lines, ``name`` and ``of``; it has the arguments of the filter ``of``.

    Attributes:
        opposite: the filter of the same settings; ``OneOf`` computes the two of them once.
    """

    of: ClassVar[type[Filter]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__signature__ = inspect.signature(cls.of)  # type: ignore[attr-defined]  # what inspect reads

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.opposite = self.of(*args, **kwargs)
        for name, value in self.opposite.settings().items():
            setattr(self, name, value)

    def keep(self, spectrum: Tensor, size: tuple[int, int], keys: Tensor) -> Tensor:
        """The other filter's map turned round, see ``Filter.keep``."""
        hidden = self.opposite.keep(spectrum, size, keys)
        if hidden.stride(0) == 0:  # one map for the whole batch stays one map in memory
            return (1.0 - hidden[:1]).expand(len(spectrum), -1, -1, -1)
        return 1.0 - hidden

    def check(self, image_size: tuple[int, int]) -> None:
        """The other filter's check."""
        self.opposite.check(image_size)


class OneOf(Filter):
    """Draws one of several filters for each image; a batch still has one FFT and one inverse FFT.

    Args:
        filters: at least one.
        weights: chances of being drawn, in any unit, at least 0; ``None``: equal.

    Attributes:
        names: the filters' short names, for logs; numbered where two are alike.

    Raises:
        UserError: for a list of another length or weights that cannot be chances.
    """

    name = "oneof"

    def __init__(self, filters: Sequence[Filter], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = [1.0] * len(filters) if weights is None else weights
        weights = tuple(float(weight) for weight in weights)
        if not len(filters) or len(weights) != len(filters):
            raise UserError(
                f"filters ({len(filters)}) and weights ({len(weights)}) must be equally many, at least one"
            )
        if min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise UserError(f"weights ({list(weights)}) must be at least 0 and not all 0; try equal ones")
        self.filters = nn.ModuleList(filters)
        self.weights = weights
        self._filters = tuple(filters)  # the same, typed
        # what must be computed: Com and RCom, low-pass and high-pass of one radius share one selection; with each its
        # places in the list, and whether its complement stands there
        selections: dict[str, tuple[Filter, list[tuple[int, bool]]]] = {}
        for number, filter in enumerate(filters):
            selection = filter
            if isinstance(filter, Complement) and type(filter).keep is Complement.keep:
                selection = filter.opposite
            try:
                name = selection.describe()
            except UserError:  # a filter that does not tell its settings equals none but itself
                name = str(id(selection))
            selections.setdefault(name, (selection, []))[1].append((number, selection is not filter))
        self._selections = tuple(selections.values())
        names = [getattr(filter, "name", "") or type(filter).__name__.lower() for filter in filters]
        self.names = [f"{name}{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]

    def draw(self, keys: Keys) -> Int64[Tensor, " batch"]:
        """Which filter each image gets.

        Returns:
            Indices into ``filters``; the very draw that ``keep`` makes.
        """
        numbers = uniform(keys, "oneof")
        return (numbers[:, None] >= _thresholds(self.weights, keys.device)).sum(-1)

    def keep(self, spectrum: Tensor, size: tuple[int, int], keys: Tensor) -> Tensor:
        """Each image's map from its own filter, see ``Filter.keep``."""
        drawn = self.draw(keys)[:, None, None, None]
        chosen = None
        # all maps are made and one is picked: to make only those drawn, the device would have to be asked
        for selection, places in self._selections:
            kept = selection.keep(spectrum, size, keys)
            for number, reverse in places:
                keep = 1.0 - kept if reverse else kept
                chosen = keep if chosen is None else torch.where(drawn == number, keep, chosen)
        assert chosen is not None  # there is at least one filter
        return chosen

    def check(self, image_size: tuple[int, int]) -> None:
        """Every filter's own check."""
        for filter in self._filters:
            filter.check(image_size)

    def settings(self) -> dict[str, Any]:
        """The filters' descriptions and the weights."""
        return {"filters": [filter.describe() for filter in self._filters], "weights": list(self.weights)}


@constant
def _thresholds(weights: tuple[float, ...], device: torch.device) -> Tensor:
    return (torch.tensor(weights, dtype=torch.float64).cumsum(0)[:-1] / sum(weights)).float().to(device)
