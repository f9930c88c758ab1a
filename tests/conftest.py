"""Lets every test import the slow reference."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
