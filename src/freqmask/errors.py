"""What goes wrong by the user's hand or by a broken file, told in one sentence."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable

_WAYS_OUT = {
    errno.ENOSPC: "free some room",
    errno.EDQUOT: "free some room, or raise the quota",
    errno.EFBIG: "raise the limit (ulimit -f), or name another file system",
    errno.EROFS: "name another place",
    errno.EACCES: "name another place",
    errno.EPERM: "name another place",
    errno.ENOTDIR: "name another place",
    errno.EISDIR: "name a file",
    errno.ENAMETOOLONG: "name another place",
    errno.EMFILE: "raise the limit (ulimit -n 4096), or try --workers 0",
    errno.ENFILE: "close other programs, or try --workers 0",
}

# a name of ours -> what other software calls the same and spells otherwise
ALIASES = {
    "lr": "learning_rate peak_lr base_lr",
    "min_lr": "min_learning_rate final_learning_rate",
    "steps": "max_steps iterations",
    "weight_decay": "wd",
    "clip_grad": "gradient_clip_val max_grad_norm",
    "accumulate": "accumulate_grad_batches gradient_accumulation_steps accum_iter",
    "accelerator": "device gpu",
    "precision": "amp dtype fp16 bf16",
    "image_size": "input_size resolution",
    "channels": "in_chans",
    "backbone": "architecture arch model encoder",
    "init": "pretrained checkpoint",
    "out": "output_dir save_dir",
    "seed": "random_seed",
    "vertical_flip": "vflip",
    "augment": "aa auto_augment",
    "erasing": "reprob",
    "sr": "super_resolution",
    "bandstop": "notch",
    "pretrain": "train fit",
    "evaluate": "eval test benchmark",
    "predict": "inference",
}


class UserError(Exception):
    """A sentence for the user: what was given, the rule it breaks, the way out. The command line exits with 2."""


class CallError(UserError, TypeError):
    """An option is missing or unknown: a sentence for the command line, a TypeError for those who call from Python."""


class BadImage(Exception):  # noqa: N818 - it names a thing, and no mistake of the user
    """An image that cannot be read. The run continues without it and lists it with this reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[str]]:
        return type(self), (self.reason,)  # survives the trip from a loader worker


def describe_os_error(error: OSError) -> str:
    """What an operating system refused, in words with the way out.

    >>> describe_os_error(OSError(errno.ENOSPC, "No space left on device"))
    'No space left on device; free some room'
    """
    reason = error.strerror or str(error) or type(error).__name__
    return f"{reason}; {_WAYS_OUT[error.errno]}" if error.errno in _WAYS_OUT else reason


def brief(error: BaseException, limit: int = 120) -> str:
    """What an error says, on one line of bounded length."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def name_of(error: OSError) -> str:
    """The file that an operating system's error is about, empty where it does not tell."""
    return os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint that names the nearest valid name, or lists all of them.

    Args:
        name: what was typed.
        names: the valid names; what other software calls them counts as spelled like them.

    Returns:
        ``did you mean 'folk'?`` or ``choose from 'mfm', 'folk'``.

    >>> nearest("fokl", ["mfm", "folk"]), nearest("lerning-rate", ["mean", "lr"])
    ("did you mean 'folk'?", "did you mean 'lr'?")
    """
    valid = list(names)
    meant = {
        alias: known for known, aliases in ALIASES.items() if known in valid for alias in aliases.split()
    }
    meant |= {known: known for known in valid}
    typed = name.lower().replace("-", "_")
    loose = 0.75 if {"/", os.sep} & set(name) else 0.5  # a path is no misspelling
    for word, words, cutoff in ((name, valid, 0.75), (typed, [*meant], 0.75), (name, valid, loose)):
        if close := difflib.get_close_matches(word, words, n=1, cutoff=cutoff):
            return f"did you mean {meant[close[0]]!r}?"
    return "choose from " + ", ".join(repr(known) for known in valid)
