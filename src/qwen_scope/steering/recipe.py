"""`Recipe`: a steering in a file, with what it was made for and what its strengths came to."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qwen_scope.backbone import Backbone
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import expanded, is_folder, replacing
from qwen_scope.suite import Suite

FORMAT = "qwen-scope steering 1"
MOST_BYTES = 2**20


@dataclass(frozen=True)
class Recipe:
    """A steering, kept."""

    steering: str
    """The edits as text, strengths in raw units of activation, so that they are the same wherever it is used."""
    given: str
    """The edits as they were given, perhaps with strengths in units of each feature's highest activation."""
    units: str
    """Where these highest activations were from."""
    model: str
    """The language model it was made on."""
    suite: str
    """The suite whose features it names."""
    note: str = ""
    """What it is for."""
    made: str = ""
    """When, ISO 8601."""
    version: str = ""
    """Of this package."""

    def save(self, path: str | Path) -> None:
        """Writes it as JSON, atomically."""
        with replacing(expanded(path)) as temporary:
            temporary.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Recipe:
        """Reads what `save` wrote.

        Raises:
            QwenScopeError: no such file, or another kind.
        """
        place = expanded(path)
        try:
            with place.open("rb") as file:
                content: Any = json.loads(file.read(MOST_BYTES))
        except OSError as error:
            raise QwenScopeError(
                f"expected a steering recipe at {place}, found none ({error.strerror}); check the path"
            ) from error
        except (ValueError, RecursionError) as error:
            raise QwenScopeError(
                f"expected a steering recipe at {place}, found no JSON ({error}); check the path"
            ) from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise QwenScopeError(
                f"expected a steering recipe at {place}, found another file; save one with Scope.save_steering"
            )
        names = {field.name for field in fields(Recipe)}
        if set(content) != names or not all(isinstance(value, str) for value in content.values()):
            raise QwenScopeError(f"expected the fields of a steering recipe in {place}, found others; save it again")
        return Recipe(**content)


def model_name(backbone: Backbone, suite: Suite) -> str:
    """What files that go elsewhere call the model: its hub id; never where it lies on this machine.

    Of a model loaded from a folder it is what the suite says, else the folder's own name.
    """
    if is_folder(backbone.name):
        return suite.backbone or expanded(backbone.name).resolve().name
    return backbone.name
