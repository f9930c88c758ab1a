"""The common corruptions of images: 15, and 4 more, in five severities each (arXiv 1903.12261).

Written anew on numpy, scipy, scikit-image and torch; the constants are the published ones. What departs from
the authors' programs is listed in docs/evaluating.md.
"""

from freqmask.evaluation.corruptions.corruption import (
    COMMON,
    CORRUPTIONS,
    EXTRA,
    FAMILIES,
    Corruption,
    check_severities,
    choose_corruptions,
)
from freqmask.evaluation.corruptions.strengths import PUBLISHED, SEVERITIES, Strengths, strengths_for

__all__ = [
    "COMMON",
    "CORRUPTIONS",
    "EXTRA",
    "FAMILIES",
    "PUBLISHED",
    "SEVERITIES",
    "Corruption",
    "Strengths",
    "check_severities",
    "choose_corruptions",
    "strengths_for",
]
