"""``python -m freqmask`` is ``freqmask``."""

import os
import sys

# ``python -m`` looks for modules where it is started; a run folder may be somebody else's, so nothing is taken from it.
_HERE = sys.path.pop(0) if sys.path[0] == os.getcwd() else None  # noqa: PTH109  pathlib is not imported yet

from freqmask.training.files import is_own_folder  # noqa: E402

if _HERE is not None and not is_own_folder(os.listdir(b".")):  # noqa: PTH208
    sys.path.insert(0, _HERE)

from freqmask.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
