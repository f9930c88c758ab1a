"""All that is printed: texts, the progress bar, and libraries that shall be silent."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TextIO

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # torchrun, Lightning, SLURM, LSF
# How many processes torchrun or srun started. SLURM_NTASKS will not do: batch scripts and the shells of salloc have it,
# too, without having been started so many times.
_LAUNCHED = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_QUIET = "FREQMASK_QUIET"  # in the environment, so that processes started by us inherit it
_LOUD = (
    "lightning",
    "lightning.pytorch",
    "lightning.fabric",
    "lightning.pytorch.utilities.rank_zero",
    "timm",
)
# What commands a terminal, hides the order of letters, or stands for bytes that are no text; a name of a file, a class
# or a run may hold anything.
_UNSHOWN = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)
_WIDEST_NAME = 160  # signs of a model's or a class's name in a table
_SHOWN_SKIPPED = 3  # images that cannot be read, by their names
BELOW = "\n" + 12 * " "  # from line to line of what stands beside one title
LINES_A_RUN = 20  # lines of a run without a terminal
MOST_PATHS = 8  # in a command that is printed


def say(text: str = "") -> None:
    """Writes a text and a newline to standard output: by the first process only, and not when quiet.

    What would command the terminal, or what its encoding cannot show, is escaped.
    """
    if not is_quiet() and rank() == 0:
        _write(sys.stdout, text)


def say_error(text: str) -> None:
    """Writes one text and a newline to standard error, escaped as by ``say``; never silenced."""
    _write(sys.stderr, text)


def _write(stream: TextIO, text: str) -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(plain(text).encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()  # a run's log is read while it is trained


def plain(text: str) -> str:
    r"""A text that a terminal shows and does not obey; line breaks stay.

    >>> plain("\x1b[31mred")
    '\\x1b[31mred'
    """
    return _UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def plain_name(name: str) -> str:
    r"""A name of a file, a class or a run on one line.

    >>> plain_name("two\nlines")
    'two\\nlines'
    """
    return plain(name).replace("\n", "\\n")


def say_left_out(skipped: Sequence[tuple[str, str]]) -> None:
    """Names the first images, (name, reason), that could not be read, and how many more there are."""
    for name, reason in skipped[:_SHOWN_SKIPPED]:
        say(f"left out    {plain_name(name)}: {reason}")
    if len(skipped) > _SHOWN_SKIPPED:
        say(f"            ... and {len(skipped) - _SHOWN_SKIPPED} more that cannot be read")


def shortened(name: str, most: int = 24) -> str:
    """A name for a figure: of a long path its end, or the figure would be all labels.

    >>> shortened("runs/a-very-long-folder/of-runs/mfm-1", 12)
    '...uns/mfm-1'
    """
    name = plain_name(name)  # a font draws no control characters
    return name if len(name) <= most else "..." + name[3 - most :]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells under each other: the first column to the left, numbers to the right; short rows (errors) stick out."""
    rows = [[shortened(row[0], _WIDEST_NAME), *map(plain_name, row[1:])] for row in rows]
    whole = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[column]) for row in whole) for column in range(len(rows[0]))]
    widths[0] = max(len(row[0]) for row in rows)
    lines = []
    for first, *others in rows:
        numbers = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=False)]
        lines.append("  ".join([first.ljust(widths[0]), *numbers]).rstrip())
    return lines


def shell_word(word: object) -> str:
    r"""A word of a command on one line, as a shell takes it, whatever bytes it has.

    >>> print(shell_word("my photos"), shell_word("two\nlines"))
    'my photos' $'two\x0alines'
    """
    text = str(word)
    if plain_name(text) == text:
        return shlex.quote(text)
    shown = (chr(n) if 32 <= n < 127 and n not in b"'\\" else f"\\x{n:02x}" for n in os.fsencode(text))
    return f"$'{''.join(shown)}'"


def shell_path(path: object) -> str:
    """A file, folder or URL as a word of a command: what begins with a dash would be taken for an option.

    >>> print(shell_path("my photos"), shell_path("-dash"))
    'my photos' ./-dash
    """
    return shell_word(f"./{path}" if str(path).startswith("-") else path)


def shell_paths(paths: Sequence[object] | object, name: str) -> str:
    """Several, or one; more than a person reads, and what was made in Python, is ``name``.

    >>> print(shell_paths(["my photos", "b"], "DATA"), shell_paths([f"{n}.png" for n in range(300)], "DATA"))
    'my photos' b DATA
    """
    if not isinstance(paths, (list, tuple)):
        paths = [] if paths is None else [paths]
    if len(paths) > MOST_PATHS:
        return name
    return " ".join(shell_path(path) if isinstance(path, (str, os.PathLike)) else name for path in paths)


def be_quiet(quiet: bool = True) -> None:
    """Silences ``say`` in this process and in those that it starts; False ends that."""
    if quiet:
        os.environ[_QUIET] = "1"
    else:
        os.environ.pop(_QUIET, None)


def is_quiet() -> bool:
    """Whether ``say`` is silent: after ``be_quiet()`` or with ``FREQMASK_QUIET=1`` in the environment."""
    return os.environ.get(_QUIET, "") not in ("", "0")


def rank() -> int:
    """The number of this process among those of a distributed run, 0 without one.

    Read from the launcher's environment variables, because it is asked before anything is initialized.
    """
    ranks = (os.environ.get(name, "") for name in _RANKS)
    return next((int(value) for value in ranks if value.isdigit()), 0)


def launched_processes() -> int:
    """How many processes a launcher (torchrun, srun) started; 1 without one."""
    counts = (os.environ.get(name, "") for name in _LAUNCHED)
    return next((int(count) for count in counts if count.isdigit()), 1)


def readable_time(seconds: float) -> str:
    """A duration as a person says it.

    >>> readable_time(5400)
    '1.5 hours'
    """
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 1.5 * size or (unit == "minutes" and seconds >= size):
            return f"{seconds / size:.1f} {unit}"
    return counted(round(seconds), "second")


def counted(number: float, noun: str, several: str = "") -> str:
    """A number of things as a person says it; ``several`` where it is no more than an s.

    >>> counted(1600.0, "epoch"), counted(1, "loader worker"), counted(0.04, "epoch"), counted(2, "class", "classes")
    ('1,600 epochs', '1 loader worker', '0.04 epochs', '2 classes')
    """
    text = f"{number:,.1f}".removesuffix(".0") if number >= 1 else f"{number:.2g}"
    return f"{text} {noun if text == '1' else several or f'{noun}s'}"


def readable_bytes(count: float) -> str:
    """A size in decimal units.

    >>> readable_bytes(12_300_000)
    '12.3 MB'
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


class Progress:
    """How far a training is: a bar after :meth:`start` on a terminal, elsewhere a line now and then.

    Args:
        total: optimizer steps of the training.
        done: steps made before this start.
        shown: names of the values to show, in order, each with its format.
        unit: what is counted.
        lines: of a whole run where there is no terminal.
    """

    def __init__(
        self,
        total: int,
        done: int,
        shown: Mapping[str, str],
        unit: str = "step",
        lines: int = LINES_A_RUN,
    ) -> None:
        self.total, self.done, self.shown, self.unit = total, done, dict(shown), unit
        self._between = max(total // lines, 1)
        self._printed = done
        self._bar: Any = None

    def start(self) -> None:
        """Draw the bar, where there is a terminal to draw on."""
        from tqdm import tqdm

        if rank() == 0 and not is_quiet() and sys.stdout.isatty():
            self._bar = tqdm(
                total=self.total,
                initial=self.done,
                unit=self.unit,
                file=sys.stdout,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} left {remaining} {postfix}",
            )

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Move to ``step`` and show the newest values."""
        text = ", ".join(form.format(values[name]) for name, form in self.shown.items() if name in values)
        if self._bar is not None:
            self._bar.set_postfix_str(plain(text), refresh=False)
            self._bar.update(step - self.done)
        elif step == self.total or step - self._printed >= self._between:
            self._printed = step
            say(f"{self.unit} {step:,} of {self.total:,}" + (f": {text}" if text else ""))
        self.done = step

    def note(self, text: str) -> None:
        """Say something without tearing the bar."""
        if self._bar is not None:
            self._bar.write(plain(text), file=sys.stdout)
        else:
            say(text)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def silence_third_party_loggers() -> AbstractContextManager[None]:
    """Silence other libraries inside the block, unless FREQMASK_DEBUG is set, and put all back afterwards."""
    return nullcontext() if os.environ.get("FREQMASK_DEBUG") else silenced(*_LOUD)


@contextmanager
def image_progress(total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Within, a bar with images a second; what it gives is told how many are ready beside those ``done`` before."""
    began = time.monotonic()
    progress = Progress(total, done, {"rate": "{:.0f} images/s"}, unit="image")
    progress.start()
    try:
        yield lambda count: progress.update(
            done + count, {"rate": count / max(time.monotonic() - began, 1e-9)}
        )
    finally:
        progress.close()


@contextmanager
def silenced(*loggers: str) -> Iterator[None]:
    """Within, nobody warns and these loggers tell of errors alone."""
    import logging
    import warnings

    levels = {logger: logger.level for logger in map(logging.getLogger, loggers)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
