"""What every test shares: the slow reference on the path, one thread each, a cache folder of its own."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; before torch is imported
os.environ["XDG_CACHE_HOME"] = CACHE = tempfile.mkdtemp(prefix="freqmask-cache-")
os.environ.pop("FREQMASK_RUN", None)
sys.path.insert(0, str(Path(__file__).parent))


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)
