"""Every option of the program, declared once. Nothing here imports torch: ``--help`` must answer at once."""

from freqmask.options.declare import (
    Rivals,
    command_words,
    exclusions,
    option,
    options_of,
    overridden,
    read_group,
    read_options,
    signature,
)
from freqmask.options.option import REQUIRED, Auto, Option, Range, Seed, Seeds, as_typed, parse_yaml

__all__ = [
    "REQUIRED",
    "Auto",
    "Option",
    "Range",
    "Rivals",
    "Seed",
    "Seeds",
    "as_typed",
    "command_words",
    "exclusions",
    "option",
    "options_of",
    "overridden",
    "parse_yaml",
    "read_group",
    "read_options",
    "signature",
]
