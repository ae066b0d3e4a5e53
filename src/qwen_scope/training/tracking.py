"""Figures of a run as it goes: a line of JSON for each moment, and an experiment tracker if one is asked for."""

import json
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from qwen_scope.errors import QwenScopeError, reason


class History:
    """`metrics.jsonl`: one row a layer and moment.

    Args:
        path: of the file; rows beyond `steps` of their layer are dropped, since a resumed run writes them anew.
        steps: steps done by each layer.
    """

    def __init__(self, path: Path, steps: Mapping[int, int]):
        self.path = path
        kept = [row for row in rows_of(path) if row["step"] <= steps.get(row["layer"], 0)]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        except OSError as error:
            raise _unwritten(path, error) from error

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a row, which must hold `layer` and `step`."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise _unwritten(self.path, error) from error


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a history, without a last one that was cut short; none if there is no file."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def _unwritten(path: Path, error: OSError) -> QwenScopeError:
    return QwenScopeError(
        f"expected to write {path}, found that it cannot be done ({error.strerror or error}); free some space and run the "
        "same command again"
    )


class Tracker:
    """Sends figures to `trackio` or `wandb`, which share these three calls; `none` sends nothing.

    Raises:
        QwenScopeError: the tracker is not installed, or does not start.
    """

    def __init__(self, kind: str, name: str, config: Mapping[str, Any]):
        self._module: ModuleType | None = None
        if kind == "none":
            return
        try:
            self._module = import_module(kind)
            self._module.init(project="qwen-scope", name=name, config=dict(config))
        except ImportError as error:
            raise QwenScopeError(
                f"expected the package {kind} for --track {kind}, found none; pip install {kind}"
            ) from error
        except Exception as error:  # whatever the tracker's own code raises
            raise QwenScopeError(
                f"expected {kind} to start a run, found that it does not ({reason(error)}); set it up, or leave out --track"
            ) from error

    def log(self, figures: Mapping[str, float]) -> None:
        """Sends some figures; a tracker that fails is left alone from then on, since the run matters more."""
        if self._module is None:
            return
        try:
            self._module.log(dict(figures))
        except Exception as error:  # whatever the tracker's own code raises
            warnings.warn(f"{self._module.__name__} takes no more figures: {reason(error)}", stacklevel=2)
            self._module = None

    def finish(self) -> None:
        """Ends the run at the tracker."""
        if self._module is not None:
            self._module.finish()
