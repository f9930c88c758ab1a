"""The name that :mod:`freqmask.rng` had in 0.1.0, for filters and methods that were written for it."""

from freqmask.rng import *  # noqa: F403
