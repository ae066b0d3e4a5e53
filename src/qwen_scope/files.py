"""Reading and writing files so that a half-written one is never seen: written beside its place, then moved in."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_scope.errors import QwenScopeError

if TYPE_CHECKING:
    # Who only writes files atomically need not wait for torch.
    from torch import Tensor

# Read once, at import: the only way to read it is to set it, for all threads of the process.
_UMASK = os.umask(0)
os.umask(_UMASK)


def cache_folder() -> Path:
    """Where this package keeps what it made: `QWEN_SCOPE_CACHE`, else the user's cache folder."""
    if chosen := os.environ.get("QWEN_SCOPE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen-scope"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path in the same folder and moves it to `path` if the block ends well; else removes it.

    Raises:
        QwenScopeError: the folder cannot be made or written, or `path` is a folder, or the disk is full.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # mkstemp makes files that only their owner can read; what is published here should follow the umask.
        temporary.chmod(0o666 & ~_UMASK)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise QwenScopeError(
            f"expected to write {path}, found that it cannot be done ({error.strerror or error}); choose another place"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def alone(lock: Path, where: Path) -> Iterator[None]:
    """Keeps everybody else who asks for the same lock out while the block runs; another process's ends with it, however it ends.

    Args:
        lock: a file of its own, which stays.
        where: what is written meanwhile, for the sentence.

    Raises:
        QwenScopeError: somebody has it, or the folder cannot be written.
    """
    import filelock

    held = filelock.FileLock(lock, timeout=0)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except filelock.Timeout as error:
        raise QwenScopeError(
            f"expected nobody else at work in {where}, found another run; wait for it, or choose another place"
        ) from error
    except OSError as error:
        raise QwenScopeError(
            f"expected to write {where}, found that it cannot be done ({error.strerror or error}); choose another place"
        ) from error
    try:
        yield
    finally:
        held.release()


def expanded(name: str | Path) -> Path:
    """The path that a name means, `~` spelt out.

    Raises:
        QwenScopeError: it cannot be a path, such as that of an unknown user's home.
    """
    try:
        path = Path(name).expanduser()
        path.lstat()  # unlike exists(), refuses what no file can be called
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return Path(name).expanduser()
    except (OSError, RuntimeError, ValueError) as error:
        raise QwenScopeError(f"expected a path, found {str(name)!r}, which is none ({error}); correct it") from error
    return path


def from_anywhere(name: str) -> str:
    """A name that means the same whatever folder one is in: of a file or folder that is there, its whole path."""
    return str(Path(name).expanduser().resolve()) if is_file(name) or is_folder(name) else name


def is_file(name: str | Path) -> bool:
    """Whether a name is that of a file; False for what cannot be a path at all."""
    try:
        return Path(name).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):
        return False


def is_folder(name: str | Path) -> bool:
    """Whether a name is that of a folder; False for what cannot be a path at all."""
    try:
        return Path(name).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):  # too long, an unknown user's home, a null character
        return False


def append_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Adds rows of JSON to a file, a line each, and has them on disk before it returns.

    Raises:
        QwenScopeError: they cannot be written.
    """
    # The line break comes first, so that a line that was cut short cannot swallow the next.
    data = "".join("\n" + json.dumps(row, ensure_ascii=False) for row in rows)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise QwenScopeError(
            f"expected to write to {path}, found that it cannot be done ({error.strerror or error}); choose another folder"
        ) from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes tensors and string metadata to `path`, atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            # How the library says that the disk is full.
            raise OSError(str(error)) from error


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file (memory-mapped) and its string metadata.

    Raises:
        QwenScopeError: no such file, or one that is not whole safetensors.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise QwenScopeError(f"expected a safetensors file at {path}, found none; check the path")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise QwenScopeError(
            f"expected whole safetensors at {path}, found {path.stat().st_size} bytes that do not parse ({error}); "
            "fetch or write the file again"
        ) from error
