"""Runs command lines in this process and tells how each ended; also as a script, for environments of a process's own.

``python tests/broken_runner.py '[["info"], ...]'`` prints a JSON list of [code, text].
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import traceback
import warnings

from freqmask.cli import main


def attempt(words: list[str]) -> tuple[int, str]:
    """The exit code and all that was printed; an exception that the command line lets through is code 1."""
    text = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as a shell shows them: they are not what is tested here
        try:
            main(words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            code = 1
            text.write(traceback.format_exc())
    return code, text.getvalue()


if __name__ == "__main__":
    sys.stdout.write(json.dumps([attempt(words) for words in json.loads(sys.argv[1])]))
