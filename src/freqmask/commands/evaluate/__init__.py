"""``freqmask evaluate``: how good a backbone is, on images with labels.

A number means little alone. Put random weights, raw pixels, the same backbone with public weights and your
run into one table:

    freqmask evaluate linear pixels random:RUN timm:vit_small_patch16_224 RUN --data DATA
"""

from __future__ import annotations

from freqmask.commands.evaluate.finetune import finetune
from freqmask.commands.evaluate.frozen import bands, fewshot, knn, linear
from freqmask.commands.evaluate.robustness import robustness
from freqmask.commands.evaluate.segment import segment

__all__ = ["bands", "fewshot", "finetune", "knn", "linear", "robustness", "segment"]
