"""Which frequencies an image keeps: one class a filter, all of one shape (see ``Filter``)."""

from freqmask.filters.build import FILTERS, MIXTURES, OPTIONS, build_filter, used_options
from freqmask.filters.filter import Complement, Filter, Filtered, OneOf
from freqmask.filters.fixed import BandPass, BandStop, HighPass, LowPass, Rings
from freqmask.filters.selected import Com, Energy, RandomBins, RCom, REnergy

__all__ = [
    "FILTERS",
    "MIXTURES",
    "OPTIONS",
    "BandPass",
    "BandStop",
    "Com",
    "Complement",
    "Energy",
    "Filter",
    "Filtered",
    "HighPass",
    "LowPass",
    "OneOf",
    "RCom",
    "REnergy",
    "RandomBins",
    "Rings",
    "build_filter",
    "used_options",
]
