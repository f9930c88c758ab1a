"""What a step frees is there for the next one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys, torch
from freqmask.training.loop import tune_malloc
if sys.argv[1] == "keep":
    assert tune_malloc()

def step():
    kept = [torch.ones(300_000 + 1000 * number) for number in range(30)]  # 36 MB

for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(word: str) -> int:
    done = subprocess.run([sys.executable, "-c", STEPS, word], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other habits")
def test_freed_memory_is_taken_again_without_asking_the_system() -> None:
    assert 10 * page_faults("keep") < page_faults("leave")
