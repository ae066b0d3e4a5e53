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
    position: Position = "last",
    count: int | None = None,
    read_with: Mapping[str, Any] | None = None,
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
        read_with: what decides which model and SAEs `scope` gives, such as their names and `stamp`: what was read with others is
            made anew.

    Raises:
        QwenScopeError: a set that cannot be read, or a name that no file can have. The footprints made before it are kept.
    """
    for each in sets:
        if not re.fullmatch(r"[^\W_][\w .+-]{0,80}", each["name"]):
            raise QwenScopeError(
                f"expected a name of letters, digits, spaces and -_.+, found {each['name']!r}; name it otherwise"
            )
    opened: Scope | None = None
    made = []
    for each in tqdm(sets, desc="sets", disable=len(sets) < 2):
        path = folder / f"{each['name']}.safetensors"
        options = {key: value for key, value in each.items() if key not in ("name", "source") and value is not None}
        source = from_anywhere(each["source"])
        asked = {
            "source": source,
            "files": stamp(source),
            "options": options,
            "layer": layer,
            "position": position,
            "count": count,
            "read_with": dict(read_with or {}),
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
            name=each["name"],
            count=count,
            broken=lambda sentence: None,
            **options,
        ).with_asked(asked)
        footprint.save(path)
        made.append(footprint)
    return made


def stamp(source: str) -> list[int]:
    """What changes when a file or the files of a folder do: how many, their size, and the latest change of one."""
    place = Path(source)
    files = [path for path in (place.rglob("*") if place.is_dir() else [place]) if path.is_file()]
    found = [path.stat() for path in files]
    return [len(files), sum(of.st_size for of in found), max((of.st_mtime_ns for of in found), default=0)]
