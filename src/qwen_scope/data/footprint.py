"""`Footprint`: the features that a set fires, item by item, saved and compared without reading the set again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qwen_scope.corpus import Document
from qwen_scope.corpus.columns import Broken, parsed_or_told
from qwen_scope.data.fired import Fired, Position, read_tokens, readable
from qwen_scope.data.items import Items, read_items
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import expanded, read_safetensors, write_safetensors
from qwen_scope.fingerprint import fingerprint
from qwen_scope.steering.recipe import model_name

if TYPE_CHECKING:
    from qwen_scope.scope import Scope

FORMAT = "qwen-scope footprint 1"


@dataclass(frozen=True)
class About:
    """What a footprint is of."""

    name: str
    """What the set is called."""
    source: str
    """Where its items were read from."""
    template: str | None
    """The template that made a text of each row, if one did."""
    items: int
    """How many items it has."""
    left_out: int
    """Rows that could not be used, such as those with an empty field."""
    left_out_first: str | None
    """What was wrong with the first of them."""
    layer: int
    """Whose features, from 0."""
    position: Position
    """Where an item must fire a feature."""
    model: str
    """The language model."""
    suite: str
    """The SAEs."""
    fingerprint: str
    """A hash of the SAE's weights: footprints of others cannot be compared with it."""
    asked: dict[str, Any] | None = None
    """What was asked for, so that a kept one is known again; see `qwen_scope.data.footprints`."""


@dataclass(frozen=True, eq=False, repr=False)
class Footprint:
    """The features that a set fires, item by item (the report, section 4)."""

    about: About
    """What it is of."""
    fired: Fired
    """Which features each item fires."""
    places: list[str]
    """Where each item was, such as `line 5 of set.jsonl`: so that a subset can be found again."""

    @staticmethod
    def of(
        scope: Scope,
        source: str | Path | Sequence[Document] | Items,
        *,
        layer: int,
        position: Position = "last",
        name: str | None = None,
        column: str | None = None,
        template: str | None = None,
        split: str = "train",
        subset: str | None = None,
        count: int | None = None,
        broken: Broken = None,
    ) -> Footprint:
        """Reads a set through the model and one SAE.

        Args:
            source: a file, folder or Hugging Face dataset, the texts themselves, or items that have been read.
            layer: whose features.
            position: `last` counts what fires at each item's last token, as the report does; `any` what fires anywhere.
            name: what to call the set; its file's name unless told.
            broken: is called with a sentence for each row that cannot be used, or that the model cannot read, such as one longer
                than its context, which is left out and counted then. Without it, the first one ends the reading.

        For the other arguments see `qwen_scope.data.items.read_items`.

        Raises:
            QwenScopeError: a set that cannot be read, or a layer that is not there.
        """
        left_out: list[str] = []

        def told(sentence: str) -> None:
            assert broken is not None
            left_out.append(sentence)
            broken(sentence)

        scope.suite[layer]
        tell = None if broken is None else told
        items = (
            source
            if isinstance(source, Items)
            else read_items(
                source,
                column=column,
                template=template,
                split=split,
                subset=subset,
                count=count,
                broken=tell,
            )
        )
        found = zip(items.places, items.texts, strict=True)
        read = list(parsed_or_told(found, lambda document, where: readable(scope, document, where), tell))
        if not read:
            raise QwenScopeError(f"expected items that the model can read, found none; the first: {left_out[0]}")
        from_list = not isinstance(source, str | Path)
        about = About(
            name=name or ("texts" if from_list else Path(str(source)).stem),
            source="a list" if from_list else str(source),
            template=template,
            items=len(read),
            left_out=len(left_out),
            left_out_first=left_out[0] if left_out else None,
            layer=layer,
            position=position,
            model=model_name(scope.backbone, scope.suite),
            suite=scope.suite.name,
            fingerprint=fingerprint(scope.suite, [layer]),
        )
        fired = read_tokens(scope, [text for _, text in read], [layer], position).fired[layer]
        return Footprint(about, fired, [where for where, _ in read])

    def with_asked(self, asked: dict[str, Any]) -> Footprint:
        """The same, with a note of what was asked for."""
        return Footprint(replace(self.about, asked=asked), self.fired, self.places)

    @property
    def name(self) -> str:
        """What the set is called."""
        return self.about.name

    @property
    def features(self) -> np.ndarray:
        """F(D): the features that any item fires, ascending."""
        return np.flatnonzero(self.fired.counts)

    def __len__(self) -> int:
        return len(self.fired)

    def save(self, path: str | Path) -> None:
        """Writes it to one safetensors file, atomically."""
        tensors = {
            "starts": torch.from_numpy(self.fired.starts),
            "features": torch.from_numpy(self.fired.features),
            "values": torch.from_numpy(self.fired.values),
        }
        about, places = json.dumps(asdict(self.about)), json.dumps(self.places, ensure_ascii=False)
        metadata = {"format": FORMAT, "about": about, "places": places, "d_sae": str(self.fired.d_sae)}
        write_safetensors(expanded(path), tensors, metadata)

    @staticmethod
    def load(path: str | Path) -> Footprint:
        """Reads what `save` wrote.

        Raises:
            QwenScopeError: no such file, another kind, or a damaged one.
        """
        place = expanded(path)
        tensors, metadata = read_safetensors(place)
        if metadata.get("format") != FORMAT:
            raise QwenScopeError(f"expected a footprint at {place}, found another file; make one with Footprint.save")
        try:
            about = About(**json.loads(metadata["about"]))
            starts, features, values = (tensors[name].numpy() for name in ("starts", "features", "values"))
            fired = Fired(starts, features, values, int(metadata["d_sae"]))
            made = Footprint(about, fired, json.loads(metadata["places"]))
            whole = _is_whole(made)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise QwenScopeError(
                f"expected a whole footprint at {place}, found a damaged one ({error!r}); delete it and make it again"
            ) from error
        if not whole:
            raise QwenScopeError(
                f"expected a whole footprint at {place}, found a damaged one; delete it and make it again"
            )
        return made

    def __repr__(self) -> str:
        about = self.about
        return (
            f"Footprint({about.name!r}, {len(self)} items, {len(self.features)} features of layer {about.layer}, "
            f"{about.position})"
        )


def _is_whole(made: Footprint) -> bool:
    """Whether the parts of a footprint belong together."""
    fired, items = made.fired, made.about.items
    if {len(fired.starts), len(made.places) + 1} != {items + 1} or len(fired.features) != len(fired.values):
        return False
    if (fired.starts.dtype, fired.features.dtype) != (np.int64, np.int32):
        return False
    lengths = np.diff(fired.starts)
    if fired.starts[0] != 0 or fired.starts[-1] != len(fired.features) or (lengths < 0).any():
        return False
    # Within an item the numbers ascend.
    ascending = (np.diff(fired.features) > 0) | (np.diff(fired.items) > 0)
    known = (fired.features >= 0) & (fired.features < fired.d_sae)
    return bool(ascending.all() and known.all())


def check_comparable(footprints: Sequence[Footprint]) -> None:
    """Raises a QwenScopeError unless all are of the same SAE and position."""
    if not footprints:
        raise QwenScopeError("expected footprints to compare, found none; give at least one")
    first = footprints[0].about
    for other in (footprint.about for footprint in footprints[1:]):
        if (other.layer, other.fingerprint) != (first.layer, first.fingerprint):
            raise QwenScopeError(
                f"expected footprints of one SAE, found {first.name} of layer {first.layer} of {first.suite} and {other.name} of "
                f"layer {other.layer} of {other.suite}; make them with the same suite and layer"
            )
        if other.position != first.position:
            raise QwenScopeError(
                f"expected footprints of one position, found {first.name} with {first.position!r} and {other.name} with "
                f"{other.position!r}; make them alike"
            )
