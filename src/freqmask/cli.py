"""Names to commands, nothing else. No torch is imported here: help and version must answer at once."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from freqmask import __version__, imports
from freqmask.console import say, say_error
from freqmask.errors import UserError, describe_os_error, name_of, nearest


class Command(NamedTuple):
    """Where a command's function lives and what the list of commands says of it."""

    module: str
    summary: str
    is_group: bool = False  # whether it has parts, such as `evaluate knn`

    @property
    def parts(self) -> Mapping[str, str] | None:
        """Of a group: name -> summary, as its module lists them."""
        return importlib.import_module(self.module).PARTS if self.is_group else None


COMMANDS = {
    "pretrain": Command("freqmask.commands.pretrain", "train a backbone on images without labels"),
    "embed": Command("freqmask.commands.embed", "write the features of images to parquet or npy"),
    "evaluate": Command(
        "freqmask.commands.evaluate",
        "measure one or several backbones in one table, each way a command: freqmask evaluate --help",
        is_group=True,
    ),
    "predict": Command("freqmask.commands.embed", "classes as CSV or masks as PNG, of a fine-tuned model"),
    "prepare": Command("freqmask.commands.prepare", "pack images into shards for fast reading"),
    "reconstruct": Command("freqmask.commands.draw", "show what a model fills in"),
    "export": Command("freqmask.commands.export", "hand a backbone on: timm, onnx, torch-export, MFM"),
    "convert": Command("freqmask.commands.export", "bring in somebody else's checkpoint"),
    "report": Command("freqmask.commands.show", "one HTML page, or a table, of one or several runs"),
    "runs": Command("freqmask.commands.show", "list runs: state, cost, best probe"),
    "spectra": Command("freqmask.commands.draw", "draw every filter on an image"),
    "recipes": Command("freqmask.commands.show", "list, show or copy the shipped recipes"),
    "info": Command("freqmask.commands.show", "versions, devices, extras"),
}
_HELP = ("-h", "--help", "help")

# The lines that switch completion on in a shell: eval "$(freqmask --completion bash)". What it then asks is answered by
# `freqmask --complete WORDS`, so that it never falls behind the options.
SHELLS = {
    "bash": """_freqmask() {
  local IFS=$'\\n'
  COMPREPLY=($(compgen -W "$(freqmask --complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)" -- "$2"))
}
complete -o default -F _freqmask freqmask""",
    "zsh": """_freqmask() {
  local -a found
  found=("${(@f)$(freqmask --complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
  compadd -a found
  _files
}
compdef _freqmask freqmask""",
    "fish": """complete -c freqmask -a '(freqmask --complete (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'""",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and leave with 0, 1 (an error of ours), 2 (of the user's), 130 (interrupted) or 141 (not read)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    imports.own_process = arguments is None
    with contextlib.suppress(OSError):  # a folder that is gone
        if arguments is None and not {"", str(Path.cwd())} & set(sys.path):
            # loader workers look for modules where this process does, not in the data or the run where it was started
            os.environ.setdefault("PYTHONSAFEPATH", "1")
    if imports.own_process and "OMP_WAIT_POLICY" not in os.environ:
        # Before torch is loaded: threads of GNU OpenMP that wait spin 300,000 times until they sleep, and since each of
        # these takes up to 140 cycles on newer CPUs, they keep a core from other programs for 10 to 20 ms. On two cores
        # with another program on one of them 10,000 are 5 to 7 times as many images/s, alone no fewer.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    with _exit_codes():
        function, given = parse(words)
        function(**given)


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """What is raised within becomes a sentence, unless it is a fault of ours, and an exit code."""
    try:
        yield
    except UserError as error:
        say_error(f"error: {error}")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        say_error("interrupted")
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader of our output, such as `head`, has left: as of every program that SIGPIPE ends, since a script
        # must not take what was cut off for finished.
        raise SystemExit(141) from None
    except OSError as error:
        if os.environ.get("FREQMASK_DEBUG"):
            raise
        # read-only places, full disks, limits: nearly always the machine's, and never mended by a traceback
        named = f"{name_of(error)}: " if name_of(error) else ""
        say_error(f"error: {named}{describe_os_error(error)} (FREQMASK_DEBUG=1 shows where)")
        raise SystemExit(2) from None
    except Exception as error:
        sentence = imports.blame(error)
        if str(error) == "Could not determine home directory.":  # what Path.expanduser says of ~nobody
            sentence = "a path begins with ~ and the name of no user; write it in full"
        if sentence is None or os.environ.get("FREQMASK_DEBUG"):
            raise
        say_error(f"error: {sentence}")
        raise SystemExit(2) from None


def parse(words: Sequence[str]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What words ask for: a command and the texts of its options by name, or :func:`say` and the text to be shown.

    Raises:
        UserError: there is no such command or option.
    """
    name, *rest = words or ["help"]
    if name in _HELP:
        return say, {"text": overview()}
    if name in ("-V", "--version"):
        return say, {"text": f"freqmask {__version__}"}
    if name == "--completion":
        shell = rest[0] if rest else ""
        if shell not in SHELLS:
            raise UserError(f"completion ({shell}) must be for one of {', '.join(SHELLS)}")
        return say, {"text": SHELLS[shell]}
    if name == "--complete":
        return say, {"text": "\n".join(complete(rest))}
    if name not in COMMANDS:
        raise UserError(f"command ({name}) is unknown; {nearest(name, COMMANDS)}")
    path, parts = [name], COMMANDS[name].parts
    if parts is not None:
        if not rest or rest[0] in _HELP:
            return say, {"text": group_overview(name)}
        if rest[0] not in parts:
            raise UserError(f"command ({name} {rest[0]}) is unknown; {nearest(rest[0], parts)}")
        path.append(rest.pop(0))
    from freqmask.commands.command import read_call

    command = load(*path)
    given, text = read_call(f"freqmask {' '.join(path)}", command, rest)
    return (say, {"text": text}) if given is None else (command, given)


def complete(words: Sequence[str]) -> list[str]:
    """What may stand in place of the last word: commands, options, or an option's values.

    Args:
        words: those typed after ``freqmask``; the last one may be empty.
    """
    if len(words) < 2:
        return [*COMMANDS, "--help", "--version"]
    if words[0] not in COMMANDS:
        return []
    parts = COMMANDS[words[0]].parts
    if parts is not None and len(words) == 2:
        return list(parts)
    if parts is not None and words[1] not in parts:
        return []
    from freqmask.commands.command import completions

    path = words[: 1 if parts is None else 2]
    return completions(load(*path), words[len(path) :])


def load(name: str, part: str | None = None) -> Callable[..., Any]:
    """The function behind a command's name, or behind that of a part of a group."""
    return getattr(importlib.import_module(COMMANDS[name].module), part or name)


def group_overview(name: str) -> str:
    """What ``freqmask GROUP --help`` prints."""
    command = COMMANDS[name]
    parts = command.parts or {}
    width = max(map(len, parts))
    usage = f"usage: freqmask {name} NAME MODEL... --data DATA [OPTIONS]        freqmask {name} NAME --help"
    text = (importlib.import_module(command.module).__doc__ or "").partition("\n\n")[2].strip()
    lines = [f"  {part:<{width}}  {summary}" for part, summary in parts.items()]
    return "\n".join([f"freqmask {name}: {command.summary}", "", usage, "", *lines, "", text])


def overview() -> str:
    """What ``freqmask --help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "freqmask: pre-train a vision backbone on your own images by hiding frequencies",
            "",
            "usage: freqmask COMMAND [OPTIONS]        freqmask COMMAND --help        freqmask --version",
            "",
            *lines,
            "",
            "begin with `freqmask pretrain` (three minutes on photographs that come along),",
            "then `freqmask pretrain YOUR_FOLDER`",
        ]
    )
