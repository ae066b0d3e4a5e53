"""Where a run keeps its progress: folders that appear whole or not at all, the newest of which counts."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qwen_scope.checkpoint.weights import write_json
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import read_safetensors, write_safetensors

if TYPE_CHECKING:
    from qwen_scope.training.group import Group


@dataclass(frozen=True)
class Checkpoints:
    """Numbered checkpoints `checkpoint-000012/` in a folder: `state.json` and a safetensors file a layer."""

    folder: Path

    def newest(self) -> Path | None:
        """The last checkpoint, None if there is none."""
        return max(self.folder.glob("checkpoint-*"), key=_number, default=None)

    def save(self, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], group: "Group") -> None:
        """Writes one more checkpoint and removes those before it. All processes of the group call this together.

        Args:
            state: JSON; the first process's counts.
            tensors: what this process holds, by the name of its file; no two processes hold the same name.

        Raises:
            QwenScopeError: a folder that cannot be written; the last checkpoint is still there then.
        """
        before = list(self.folder.glob("checkpoint-*"))
        number = max(map(_number, before), default=-1) + 1
        made = self.folder / f".checkpoint-{number:06d}"
        try:
            if group.rank == 0:
                shutil.rmtree(made, ignore_errors=True)
                made.mkdir(parents=True)
            group.wait()
            for name, values in tensors.items():
                write_safetensors(made / f"{name}.safetensors", values, {})
            group.wait()
            if group.rank == 0:
                write_json(made / "state.json", state)
                made.rename(self.folder / f"checkpoint-{number:06d}")
                for path in before:
                    shutil.rmtree(path, ignore_errors=True)
            group.wait()
        except (OSError, QwenScopeError) as error:
            shutil.rmtree(made, ignore_errors=True)
            if isinstance(error, QwenScopeError):
                raise
            raise QwenScopeError(
                f"expected to save progress in {self.folder}, found that it cannot be done ({error.strerror or error}); free "
                "some space and run the same command again"
            ) from error

    def load_state(self) -> dict[str, Any] | None:
        """`state` of the newest checkpoint, None if there is none.

        Raises:
            QwenScopeError: a checkpoint without a state that can be read.
        """
        newest = self.newest()
        if newest is None:
            return None
        try:
            return json.loads((newest / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise QwenScopeError(
                f"expected the state of a run in {newest}, found none that can be read ({error}); delete that folder"
            ) from error

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """One file of the newest checkpoint, read into memory.

        Raises:
            QwenScopeError: no such file, or one that is damaged.
        """
        newest = self.newest()
        if newest is None:
            raise QwenScopeError(f"expected a checkpoint in {self.folder}, found none; start the run anew")
        return {key: tensor.clone() for key, tensor in read_safetensors(newest / f"{name}.safetensors")[0].items()}

    def clear(self) -> None:
        """Removes all checkpoints, finished or not."""
        for path in (*self.folder.glob("checkpoint-*"), *self.folder.glob(".checkpoint-*")):
            shutil.rmtree(path, ignore_errors=True)


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
