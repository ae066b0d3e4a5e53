"""Plots by matplotlib, one at a time: its settings are the whole process's, and threads would change them for each other."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_one_at_a_time = Lock()


@contextmanager
def drawing() -> Iterator[None]:
    """While the block runs, nothing in a name or text is read as LaTeX, and no other thread draws.

    Raises:
        ImportError: no matplotlib.
    """
    from matplotlib import rc_context

    with _one_at_a_time, rc_context({"text.usetex": False, "text.parse_math": False}):
        yield
