"""Memory of this process.

Linux: writing 5 to /proc/self/clear_refs sets the kernel's own high-water mark (VmHWM) back to the present resident
set, so VmHWM afterwards, less VmRSS before, is the operation's peak: no sampling, no moment missed. Elsewhere:
`ru_maxrss` after less `ru_maxrss` before, a lower bound, close because making the weights in place leaves the
process near its maximum.

Mapped files count as resident, although the system can take their pages back at any time. Where files are read, what
counts is anonymous memory (RssAnon, Linux alone), which has no high-water mark: it is sampled.
"""

import gc
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path

MIB = 2**20
SAMPLED_EVERY = 0.002
STATUS = Path("/proc/self/status")


def method() -> str:
    if can_reset_peak():
        return "VmHWM after, less VmRSS before, the mark reset through /proc/self/clear_refs"
    return "ru_maxrss after, less ru_maxrss before (a lower bound)"


def can_reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_above_mib(operation: Callable[[], object]) -> float:
    """How far the resident memory rises while an operation runs."""
    gc.collect()
    linux = can_reset_peak()
    before = of_status("VmRSS") if linux else highest_mib()
    operation()
    after = of_status("VmHWM") if linux else highest_mib()
    return round(after - before, 1)


def of_status(field: str) -> float:
    """`VmRSS` (now), `VmHWM` (highest) or `RssAnon` (now) of this process, in MiB.

    Raises:
        SystemExit: this is not Linux.
    """
    if not STATUS.exists():
        raise SystemExit(f"expected {STATUS}, which only Linux has, found none; run this benchmark there")
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def highest_mib() -> float:
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest / MIB if sys.platform == "darwin" else highest / 1024


class Anonymous:
    """Samples this process' anonymous memory while a `with` block runs."""

    def __enter__(self) -> "Anonymous":
        gc.collect()
        self.before_mib = self.peak_mib = of_status("RssAnon")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLED_EVERY):
            self._look()

    def _look(self) -> None:
        self.peak_mib = max(self.peak_mib, of_status("RssAnon"))
