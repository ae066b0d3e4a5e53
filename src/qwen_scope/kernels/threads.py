"""Threads of our own for compiled loops and single-threaded products, as many as torch is set to use.

torch's OpenMP threads keep spinning for milliseconds after each operation, which would take a core from the loops that
come next. Here all threads share one kind of work and sleep between.
"""

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_size = 0
_set_aside = threading.local()


def share(function: Callable[[int, int], object], total: int, multiple: int = 1, calls_torch: bool = False) -> None:
    """Runs `function(start, stop)` over the range 0..total, cut into one part a thread.

    Returns when all are done; raises what one of them raised.

    Args:
        multiple: parts begin at multiples of this.
        calls_torch: leaves no part to the caller's own thread, in which torch would use all of its threads; in the others
            it uses one each.
    """
    threads = thread_count()
    parts = min(threads, -(-total // multiple))
    if parts <= 1:
        function(0, total)
        return
    units = -(-total // multiple)
    cuts = [min(total, units * i // parts * multiple) for i in range(parts + 1)]
    pool = _workers(threads)
    spans = list(itertools.pairwise(cuts))
    waiting = [pool.submit(function, start, stop) for start, stop in (spans if calls_torch else spans[1:])]
    try:
        if not calls_torch:
            function(*spans[0])
        for part in waiting:
            part.result()
    finally:
        wait(waiting)  # whatever happened, no part goes on writing after this returns


def thread_count() -> int:
    """Threads that work is shared among: as many as torch is set to use, or was before `torch_alone`."""
    return getattr(_set_aside, "threads", None) or torch.get_num_threads()


@contextmanager
def torch_alone() -> Iterator[None]:
    """While the block runs, torch's own operations use the caller's thread alone, and `share` as many as before.

    For many small operations between loops of ours: torch's threads would gain little and then spin in their way.
    """
    if getattr(_set_aside, "threads", None) is not None:
        yield
        return
    threads = torch.get_num_threads()
    _set_aside.threads = threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _set_aside.threads = None


@contextmanager
def torch_together() -> Iterator[None]:
    """Inside `torch_alone`, gives torch its threads back for a block, such as a large matrix product."""
    threads = getattr(_set_aside, "threads", None)
    if threads is None:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def _workers(threads: int) -> ThreadPoolExecutor:
    global _pool, _size
    with _lock:
        if _pool is None or _size < threads:
            # All are started at once: setting the number in a new thread changes the caller's too, set back below.
            started = threading.Barrier(threads, timeout=60)

            def start() -> None:
                torch.set_num_threads(1)
                started.wait()

            pool = ThreadPoolExecutor(threads, thread_name_prefix="qwen-scope", initializer=start)
            try:
                for waiting in [pool.submit(int) for _ in range(threads)]:
                    waiting.result()
            finally:
                torch.set_num_threads(threads)
            _pool, _size = pool, threads
        return _pool


def _forget() -> None:
    """In a forked child none of the parent's threads is there."""
    global _pool, _size, _lock
    _pool, _size, _lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
