"""Batches of views: worker processes, and what happens when one of them dies."""

from __future__ import annotations

import atexit
import contextlib
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data import default_collate as stack

from freqmask.data.dataset import Sample, TrainDataset
from freqmask.errors import UserError
from freqmask.images import as_float

__all__ = ["TrainDataset", "TrainLoader", "collate", "make_loader", "worker_failure"]

_KILLED = (
    "a loader worker was killed, most often for want of memory; the same command with fewer --workers goes "
    "on from the last checkpoint"
)


def collate(samples: Sequence[Sample] | UserError) -> dict[str, Any] | UserError:
    """Put samples together.

    Args:
        samples: what :meth:`TrainDataset.__getitems__` returned.

    Returns:
        ``views``: a ``(batch, channel, height, width)`` tensor for each view, uint8 (0 to 255) or float32 in
        [0, 1]; ``keys``, ``labels`` (-1: unknown) and ``indices``: int64 ``(batch,)``; ``skipped``: (name,
        reason) of the images that others stand in for.
    """
    if isinstance(samples, UserError):
        return samples
    return {
        "views": [_stack(view) for view in zip(*(sample.views for sample in samples), strict=True)],
        "keys": torch.tensor([sample.key for sample in samples], dtype=torch.int64),
        "labels": torch.tensor([sample.label for sample in samples], dtype=torch.int64),
        "indices": torch.tensor([sample.index for sample in samples], dtype=torch.int64),
        "skipped": [entry for sample in samples for entry in sample.skipped],
    }


def _stack(images: Sequence[Tensor]) -> Tensor:
    """One tensor, in shared memory where a worker makes it; float32 where one of the images is."""
    if len({image.dtype for image in images}) > 1:
        images = [as_float(image) for image in images]
    stacked: Tensor = stack(list(images))
    return stacked


class TrainLoader(DataLoader[Any]):
    """A DataLoader whose failures are sentences: a dead worker ends the iteration within seconds, no hang."""

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """The batches; workers are stopped where the iteration ends before the last one."""
        whole = False
        try:
            yield from self._batches()
            whole = True
        except (RuntimeError, ConnectionError, FileNotFoundError, EOFError) as error:
            failure = worker_failure(error, fetching=self.num_workers > 0)
            if failure is None:
                raise
            raise failure from error
        finally:
            if not whole:
                self.close()

    def _batches(self) -> Iterator[dict[str, Any]]:
        with warnings.catch_warnings(), _own_child_handler():
            # From Python 3.12 on, forking beside other threads warns; make_loader says why it is done.
            warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
            batches = super().__iter__()
        _OPEN.add(self)
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def close(self) -> None:
        """Stop the workers, also those that hang."""
        _OPEN.discard(self)
        batches, self._iterator = self._iterator, None
        if batches is None or sys.is_finalizing():
            return
        batches._shutdown_workers()  # type: ignore[attr-defined]
        for worker in batches._workers:  # type: ignore[attr-defined]
            worker.kill()  # one that is stuck in a read ignores everything else
            worker.join()


_OPEN: weakref.WeakSet[TrainLoader] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Workers ignore the SIGTERM by which Python would end them at its exit, and it would wait for ever."""
    for loader in list(_OPEN):
        loader.close()


def worker_failure(error: BaseException, fetching: bool = False) -> UserError | None:
    """The sentence for a loader worker that died.

    Args:
        error: whatever was raised.
        fetching: True where it was raised while a batch came in from a worker: one that dies at that moment
            breaks the connection before torch has noticed.

    Returns:
        The error to raise instead, or None where no worker is to blame.
    """
    text = str(error)
    if fetching and isinstance(error, OSError | EOFError):
        return UserError(_KILLED)
    if not isinstance(error, RuntimeError) or "DataLoader" not in text:
        return None
    if "Bus error" in text or "shm" in text:
        return UserError(
            "a loader worker ran out of shared memory; give /dev/shm more room, or try fewer --workers"
        )
    if "killed by signal" in text or "exited unexpectedly" in text:
        return UserError(_KILLED)
    return None


def make_loader(
    dataset: Dataset[Any],
    sampler: Sampler[Any],
    batch_size: int,
    workers: int = 0,
    pin_memory: bool | None = None,
    together: Callable[[Any], Any] = collate,
) -> TrainLoader:
    """The loader of a training, of the held-out images, or of anything else that is done image by image.

    Workers are forked where the system can (Linux). A fork shares the list of images instead of copying it,
    starts in milliseconds, and works for scripts without a ``__main__`` guard and for sources defined in a
    notebook, where starting afresh would run the script again. Its risk is a lock held by another thread at
    that moment, or a CUDA context used in the child: workers run one thread and touch no accelerator.

    Args:
        dataset: the images and their views; a `UserError` that it returns in place of a batch is raised.
        sampler: which image comes when.
        batch_size: images of this process in one step.
        workers: worker processes; 0 loads in the main process.
        pin_memory: True copies batches to page-locked memory; None: where CUDA is there.
        together: makes a batch of what the dataset returns.

    Returns:
        Batches as :func:`collate` describes them: the same ones for any number of workers.
    """
    if workers < 0:
        raise UserError(f"workers ({workers}) must be 0 or more; 0 loads images in the main process")
    methods = torch.multiprocessing.get_all_start_methods()
    return TrainLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=together,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_begin_worker if workers else None,
        multiprocessing_context="fork" if workers and "fork" in methods and sys.platform == "linux" else None,
    )


def _begin_worker(_: int) -> None:
    """Leave Ctrl-C and SIGTERM, which reach the whole process group, to the main process: it saves first."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def _own_child_handler() -> Iterator[None]:
    """Keep torch from installing its SIGCHLD handler.

    It raises in whatever line the main process is at when a worker dies: in a checkpoint being written, or in
    a ``__del__``, where the error is lost. Without it torch finds a dead worker where a batch is fetched,
    within five seconds.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    yield
    replaceable = before is None or getattr(before, "__module__", "").startswith("torch.")
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if replaceable else before)
