"""`Steering`: any number of edits that go together, as text, JSON or a saved recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from qwen_scope.errors import QwenScopeError
from qwen_scope.steering.edit import Edit
from qwen_scope.steering.recipe import Recipe

MOST_NESTED = 4
"""Lists within lists that are read, so that what a server is sent cannot exhaust the stack."""
MOST_EDITS = 256
"""More features than anybody steers at once; what a server does for one request stays bounded."""


@dataclass(frozen=True)
class Steering:
    """Edits that are made together. An empty one steers nothing."""

    edits: tuple[Edit, ...] = ()
    """Which features, how, and where."""

    def __post_init__(self) -> None:
        if len(self.edits) > MOST_EDITS:
            raise QwenScopeError(f"expected at most {MOST_EDITS} edits at once, found {len(self.edits)}; steer fewer")
        for one, other in combinations(self.edits, 2):
            same = (one.layer, one.number) == (other.layer, other.number)
            if same and not one.how == other.how == "add" and one.where.overlaps(other.where):
                raise QwenScopeError(
                    f"expected edits that agree, found {one} and {other} of one feature at the same tokens; keep one of them"
                )

    @staticmethod
    def of(given: Any, suite: str | None = None) -> Steering:
        """Whatever says how to steer: text (edits with spaces between, see `Edit.parse`), an `Edit`, a mapping as `to_dict`
        gives, a list of those, the path of a saved recipe, a `Steering`, or None for nothing.

        Args:
            suite: name of the suite that recipes must be for; left out, they may be for any.

        Raises:
            QwenScopeError: anything else, or a recipe for another suite.
        """
        return _read(given, suite, MOST_NESTED)

    @property
    def layers(self) -> list[int]:
        """The layers that are written to, in order."""
        return sorted({edit.layer for edit in self.edits})

    def scaled(self, factor: float) -> Steering:
        """The same with the strengths of what is added multiplied, such as by -1 for the opposite.

        Raises:
            QwenScopeError: edits that are not added, whose strength has no opposite.
        """
        for edit in self.edits:
            if edit.how != "add":
                raise QwenScopeError(
                    f"expected edits that add, to scale their strength, found {edit}; use another amount"
                )
        return Steering(
            tuple(
                Edit(edit.layer, edit.number, "add", edit.strength * factor, edit.unit, edit.where)
                for edit in self.edits
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON; `of` reads them."""
        return {"edits": [edit.to_dict() for edit in self.edits]}

    def __bool__(self) -> bool:
        return bool(self.edits)

    def __str__(self) -> str:
        """The text that `of` reads."""
        return " ".join(map(str, self.edits))

    def __repr__(self) -> str:
        return f"Steering({json.dumps(str(self))})"


def _read(given: Any, suite: str | None, levels: int) -> Steering:
    """What `Steering.of` does, with so many levels of lists at most."""
    if isinstance(given, Steering):
        return given
    if given is None:
        return Steering()
    if isinstance(given, Edit):
        return Steering((given,))
    if isinstance(given, Path):
        recipe = Recipe.load(given)
        if suite not in (None, recipe.suite):
            raise QwenScopeError(
                f"expected a recipe for {suite}, found {given}, which is for {recipe.suite} on {recipe.model}; use its suite"
            )
        return _read(recipe.steering, suite, levels)
    if isinstance(given, str):
        return Steering(tuple(Edit.parse(part) for part in given.split()))
    if isinstance(given, Mapping):
        if "edits" in given:
            unknown = set(given) - {"edits"}
            if unknown:
                raise QwenScopeError(
                    f"expected a steering with edits alone, found {sorted(map(str, unknown))[0]!r} beside them; leave it out"
                )
            given = given["edits"]
        else:
            return Steering((Edit.from_dict(dict(given)),))
    if isinstance(given, Sequence) and levels:
        return Steering(tuple(edit for item in given for edit in _read(item, suite, levels - 1).edits))
    raise QwenScopeError(
        f"expected a steering such as '12/6159:2x', found a {type(given).__name__}; pass text, edits or a list of them"
    )
