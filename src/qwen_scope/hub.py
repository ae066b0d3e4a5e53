"""Where a repository's files come from: a folder that stands in for the hub, or the Hugging Face hub itself.

Set `QWEN_SCOPE_MIRROR` to a folder laid out as `{org}/{name}/files` and repositories found there are read in place,
with no network at all. Otherwise files come one at a time through `huggingface_hub`, which keeps them in its cache
and honours `HF_HUB_OFFLINE`, `HF_HOME` and `HF_TOKEN`.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qwen_scope.errors import QwenScopeError

_REPO_ID = re.compile(r"(?!\.+/)[\w.-]+(/(?!\.+$)[\w.-]+)?")


def is_repo_id(name: str) -> bool:
    """Whether a name has the form of a hub id, `org/name` or `name`."""
    return bool(_REPO_ID.fullmatch(name)) and name.strip(".") != ""


def local_mirror(repo_id: str) -> Path | None:
    """The folder that `QWEN_SCOPE_MIRROR` holds for a repository, or None; revisions play no part there.

    Raises:
        QwenScopeError: the variable is set to something that is not a folder.
    """
    mirror = os.environ.get("QWEN_SCOPE_MIRROR")
    if not mirror or not is_repo_id(repo_id):
        return None
    root = Path(mirror).expanduser()
    if not root.is_dir():
        raise QwenScopeError(
            f"expected a folder of repositories in QWEN_SCOPE_MIRROR, found no folder at {root}; make it or unset the "
            "variable"
        )
    folder = root / repo_id
    return folder if folder.is_dir() else None


def download(repo_id: str, filename: str, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """One file of a hub repository, from the cache if it is there; returns where it lies.

    Raises:
        QwenScopeError: no network, offline mode, no such repository, revision or file, no access.
    """
    from huggingface_hub import hf_hub_download

    with _hub_errors(repo_id, filename):
        return Path(hf_hub_download(repo_id, filename, revision=revision, cache_dir=cache_dir))


def upload(
    folder: Path, repo_id: str, private: bool | None, commit_message: str, leave_out: list[str] | None = None
) -> None:
    """Uploads a folder, but for files that match `leave_out`, in one commit to a model repository; makes it if need be.

    Raises:
        QwenScopeError: see `download`.
    """
    from huggingface_hub import HfApi

    with _hub_errors(repo_id, "the upload"):
        HfApi().create_repo(repo_id, private=private, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message, ignore_patterns=leave_out
        )


@contextmanager
def _hub_errors(repo_id: str, what: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into one sentence each."""
    from huggingface_hub import errors

    # httpx's base error or httpx2's, whichever this huggingface_hub speaks through.
    HTTPError = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield
    except errors.GatedRepoError as error:
        raise QwenScopeError(
            f"expected access to {repo_id}, found a gated repository; accept its terms at "
            f"https://huggingface.co/{repo_id} and log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise QwenScopeError(
            f"expected a repository {repo_id} on the Hugging Face hub, found none that you may read; check the name, "
            "or log in with `hf auth login` if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise QwenScopeError(
            f"expected the revision asked for in {repo_id}, found no such branch, tag or commit; check revision="
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _unreachable(repo_id, what) from error
    except errors.EntryNotFoundError as error:
        raise QwenScopeError(f"expected {what} in {repo_id}, found no such file there; check the repository") from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise QwenScopeError(
            f"expected {what} of {repo_id} from the hub, found it refused ({first_line}); try again or check the name"
        ) from error
    except HTTPError as error:
        raise _unreachable(repo_id, what) from error


def _unreachable(repo_id: str, what: str) -> QwenScopeError:
    return QwenScopeError(
        f"expected {what} of {repo_id} from the hub or its cache, found no connection (or HF_HUB_OFFLINE set) and "
        "nothing in the cache; connect, or point QWEN_SCOPE_MIRROR at a folder that holds the repository"
    )


@dataclass(frozen=True)
class Folder:
    """A repository's files in a local folder."""

    root: Path

    @property
    def absolute(self) -> Path:
        """The folder's full path."""
        # Path.resolve would follow the links of the hub's cache away from the names in the path.
        return Path(os.path.abspath(self.root))  # noqa: PTH100

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.absolute.name

    def names(self) -> list[str]:
        """Files in the folder and one folder down, as `a` or `sub/a`, sorted."""
        found = [*self.root.glob("*"), *self.root.glob("*/*")]
        return sorted(path.relative_to(self.root).as_posix() for path in found if path.is_file())

    def path(self, name: str) -> Path:
        """Where one file lies."""
        return self.root / name


@dataclass(frozen=True)
class Repository:
    """A repository's files on the hub, each fetched when its path is asked for."""

    repo_id: str
    revision: str | None = None
    cache_dir: str | Path | None = None

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repo_id.rpartition("/")[2]

    def names(self) -> list[str]:
        """All files in the repository, sorted; what the cache holds when the hub cannot be reached.

        Raises:
            QwenScopeError: see `download`.
        """
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
        from huggingface_hub.errors import HTTPError as ConnectionFailed  # pyright: ignore[reportPrivateImportUsage]

        with _hub_errors(self.repo_id, "the list of files"):
            try:
                return sorted(HfApi().list_repo_files(self.repo_id, revision=self.revision))
            except HfHubHTTPError:
                raise
            except (OfflineModeIsEnabled, ConnectionFailed):
                where = {"revision": self.revision, "cache_dir": self.cache_dir}
                return Folder(Path(snapshot_download(self.repo_id, **where, local_files_only=True))).names()

    def path(self, name: str) -> Path:
        """Where one file lies, after `download`."""
        return download(self.repo_id, name, self.revision, self.cache_dir)


Files = Folder | Repository
"""The files of one repository, wherever they are: `.name`, `.names()`, `.path(name)`."""


def files_of(repo_id: str, revision: str | None = None, cache_dir: str | Path | None = None) -> Files:
    """The mirror's folder for a repository if there is one, else the hub."""
    mirror = local_mirror(repo_id)
    return Folder(mirror) if mirror else Repository(repo_id, revision, cache_dir)
