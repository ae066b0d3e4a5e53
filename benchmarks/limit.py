"""A limit on the memory of one process, page cache included, where the system lets us make a control group (Linux)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
LIMITS = ("memory.max", "memory.limit_in_bytes")
"""Of control groups version 2 and 1."""
PEAKS = ("memory.peak", "memory.max_usage_in_bytes")


class Unavailable(Exception):
    """This system does not let us limit memory."""


class Group:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.through = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(folder / "cgroup.procs")]
        """Runs the command appended to it inside the group."""

    def peak_mib(self) -> float:
        """The most memory that was in use in it, page cache included."""
        return round(int(_there(self.folder, PEAKS).read_text()) / 2**20, 1)


@contextmanager
def group(limit_bytes: int) -> Iterator[Group]:
    """A control group inside our own, removed at the end; to be left by then.

    Raises:
        Unavailable: there are no control groups that limit memory, or we may not make one.
    """
    folder = _own() / f"memory-limited-benchmark-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        raise Unavailable(f"a control group cannot be made here ({error.strerror})") from error
    try:
        _there(folder, LIMITS).write_text(str(limit_bytes))
        yield Group(folder)
    finally:
        folder.rmdir()


def _own() -> Path:
    """The control group of this process that has to do with memory."""
    file = Path("/proc/self/cgroup")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    groups = [line.split(":", 2)[1:] for line in lines]
    places = [ROOT / "memory" / path.lstrip("/") for controllers, path in groups if "memory" in controllers.split(",")]
    places += [ROOT / path.lstrip("/") for controllers, path in groups if not controllers]
    if not places:
        raise Unavailable("there are no control groups here")
    return places[0]


def _there(folder: Path, names: tuple[str, ...]) -> Path:
    found = [folder / name for name in names if (folder / name).exists()]
    if not found:
        raise Unavailable("control groups do not limit memory here")
    return found[0]
