"""Footprints of several sets, kept in a folder, so that a killed run goes on and another one reads no set again."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from qwen_scope.data.fired import Position
from qwen_scope.data.footprint import Footprint
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import from_anywhere

if TYPE_CHECKING:
    from qwen_scope.scope import Scope


def footprints(
    scope: Callable[[], Scope],
    sets: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    layer: int,
    position: Position,
    count: int | None = None,
) -> list[Footprint]:
    """The footprints of some sets; those that the folder holds, of the same source and options, are not made again.

    Rows that cannot be used, such as those with an empty field, are left out and counted.

    Args:
        scope: gives the model and SAEs; asked only if a set has to be read.
        sets: each with `name` and `source`, and perhaps `column`, `template`, `split` and `subset`, as `Footprint.of` takes them.
        folder: where they are kept, a file each.
        layer: whose features.
        position: where an item must fire them.
        count: items of each set at most.

    Raises:
        QwenScopeError: a set that cannot be read, or a name that no file can have.
    """
    opened: Scope | None = None
    made = []
    for each in tqdm(sets, desc="sets", disable=len(sets) < 2):
        name = each["name"]
        if not re.fullmatch(r"[\w][\w .+-]{0,80}", name):
            raise QwenScopeError(
                f"expected a name of letters, digits, spaces and -_.+, found {name!r}; name it otherwise"
            )
        path = folder / f"{name}.safetensors"
        options = {key: value for key, value in each.items() if key not in ("name", "source") and value is not None}
        source = from_anywhere(each["source"])
        asked = {
            "source": source,
            "layer": layer,
            "position": position,
            "count": count,
            "options": options,
            "file": _stamp(source),
        }
        if path.is_file() and (kept := Footprint.load(path)).about.asked == asked:
            made.append(kept)
            continue
        if opened is None:
            opened = scope()
        footprint = Footprint.of(
            opened,
            source,
            layer=layer,
            position=position,
            name=name,
            count=count,
            broken=lambda sentence: None,
            **options,
        ).with_asked(asked)
        footprint.save(path)
        made.append(footprint)
    return made


def _stamp(source: str) -> list[int]:
    """What changes when a file does; nothing for what is no file."""
    path = Path(source)
    if not path.is_file():
        return []
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]
