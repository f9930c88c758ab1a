"""Lets the tests of methods share their tiny models."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
