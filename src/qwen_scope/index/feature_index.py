"""`FeatureIndex`: what a harvest found, by feature."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from qwen_scope.errors import QwenScopeError
from qwen_scope.feature_name import parse_feature
from qwen_scope.files import expanded
from qwen_scope.index.feature import Example, Feature, Label, Neighbour, Token
from qwen_scope.index.labels import HAND, Labels
from qwen_scope.index.layout import EXAMPLES, FEATURES, About, layer_folder

if TYPE_CHECKING:
    from qwen_scope.index.diagnose import Span
    from qwen_scope.index.find import Findings
    from qwen_scope.index.meaning import Meanings
    from qwen_scope.index.search import By, Hit
    from qwen_scope.index.words import Words
    from qwen_scope.scope import Scope
    from qwen_scope.steering.maxima import Maxima


class FeatureIndex:
    """A folder that `qwen-scope harvest` wrote, opened; `index["12/6159"]` is a `Feature`.

    Nothing is read but what is asked for; several threads can use one index, and several processes one folder.
    """

    def __init__(self, folder: Path, about: About, labels: Labels):
        self.folder = folder
        """Where it lies."""
        self.about = about
        """What it is of."""
        self.labels = labels
        """Labels by feature."""
        self._files: dict[tuple[int, str], _Sorted] = {}

    @staticmethod
    def open(folder: str | Path | None = None) -> FeatureIndex:
        """Opens an index; without a folder, the one that comes with the package.

        Raises:
            QwenScopeError: no index there, or one of another version.
        """
        place = bundled_folder() if folder is None else expanded(folder)
        about = About.read(place)
        return FeatureIndex(place, about, Labels.beside(place, about))

    @property
    def layers(self) -> list[int]:
        """The layers there are, in order."""
        return sorted(self.about.layers)

    def __len__(self) -> int:
        """Features of all layers."""
        return sum(self.about.layers.values())

    def __getitem__(self, name: str | tuple[int, int]) -> Feature:
        """Everything about a feature, by its name `layer/number` or the pair of both.

        Raises:
            QwenScopeError: no such name, layer or feature.
        """
        layer, number = self.check(name)
        try:
            row = self.rows(layer, "features", number).to_pylist()[0]
            examples = [Example(**example) for example in self.rows(layer, "examples", number).to_pylist()]
        except (IndexError, UnicodeDecodeError) as error:
            raise _damaged(layer_folder(self.folder, layer), error) from error
        for column in ("top_tokens", "promoted", "suppressed"):
            row[column] = [Token(item["token"], item["id"], item["value"]) for item in row[column]]
        for column in ("similar", "together"):
            row[column] = [self._neighbour(layer, **item) for item in row[column]]
        return Feature(layer=layer, number=number, label=self.labels.get(layer, number), examples=examples, **row)

    def check(self, name: str | tuple[int, int]) -> tuple[int, int]:
        """Layer and number of a feature that the index has.

        Raises:
            QwenScopeError: it has not.
        """
        layer, number = parse_feature(name)
        if layer not in self.about.layers:
            raise QwenScopeError(
                f"expected a feature of layers {', '.join(map(str, self.layers))}, which this index has, found {layer}/{number}; "
                "harvest that layer too"
            )
        if number >= self.about.layers[layer]:
            raise QwenScopeError(
                f"expected a feature from {layer}/0 to {layer}/{self.about.layers[layer] - 1}, found {layer}/{number}; choose "
                "one of those"
            )
        return layer, number

    def table(self, layer: int, columns: list[str] | None = None) -> pa.Table:
        """A layer's features.parquet as an Arrow table, a row per feature; only some columns if named.

        Raises:
            QwenScopeError: no such layer or column, or a table that is damaged.
        """
        self.check((layer, 0))
        unknown = set(columns or ()) - set(FEATURES.names)
        if unknown:
            raise QwenScopeError(
                f"expected columns of {', '.join(FEATURES.names)}, found {', '.join(sorted(unknown))}; choose some of those"
            )
        return self._file(layer, "features").rows(0, self.about.layers[layer], columns or FEATURES.names)

    def rows(
        self,
        layer: int,
        table: Literal["features", "examples"],
        start: int,
        stop: int | None = None,
        columns: list[str] | None = None,
    ) -> pa.Table:
        """The rows of features from `start` up to `stop` (of one if left out), without reading those of many others.

        Args:
            columns: all but the number of the feature unless told.

        Raises:
            QwenScopeError: no such table, or a damaged one.
        """
        schema = FEATURES if table == "features" else EXAMPLES
        stop = start + 1 if stop is None else stop
        return self._file(layer, table).rows(start, stop, columns or schema.names[1:])

    def label(self, name: str | tuple[int, int], text: str) -> None:
        """Writes a label by hand, which is shown before any other; an empty text takes it back.

        Raises:
            QwenScopeError: no such feature, or the file of labels cannot be written.
        """
        layer, number = self.check(name)
        self.labels.add(layer, number, Label(text=text.strip(), by=HAND))

    def search(
        self,
        query: str,
        *,
        count: int = 10,
        layers: Sequence[int] | int | None = None,
        by: By = "words",
    ) -> list[Hit]:
        """Features whose label, tokens or examples are about something, best first; see `qwen_scope.index.search.search`.

        Raises:
            QwenScopeError: an empty query, a layer that is not there, or no model for search by meaning.
        """
        from qwen_scope.index.search import search

        return search(self, query, count=count, layers=layers, by=by)

    def find(
        self,
        positive: Any,
        negative: Any = None,
        *,
        layers: Sequence[int] | int | None = None,
        count: int = 20,
        only: bool = False,
    ) -> Findings:
        """Features that fire more often in some texts than in others, surest first; see `qwen_scope.index.find.find`.

        Raises:
            QwenScopeError: a layer that is not there, texts that cannot be read, or too short to count.
        """
        from qwen_scope.index.find import find

        return find(self, positive, negative, layers=layers, count=count, only=only)

    def diagnose(
        self,
        text: Any,
        spans: Span | Sequence[Span],
        *,
        layers: Sequence[int] | int | None = None,
        count: int = 20,
        only: bool = False,
    ) -> Findings:
        """Features that fire more often on some spans of a text than elsewhere in it; see `qwen_scope.index.diagnose.diagnose`.

        Raises:
            QwenScopeError: a span that the text does not have, or that leaves nothing to compare; a layer that is not there.
        """
        from qwen_scope.index.diagnose import diagnose

        return diagnose(self, text, spans, layers=layers, count=count, only=only)

    def sql(self, query: str) -> pa.Table:
        """The answer of DuckDB to a query over the tables `features` and `examples` (each with a column `layer`), `labels`
        and, where they were kept, `pairs`.

        Raises:
            QwenScopeError: duckdb is not installed, or refuses the query.
        """
        from qwen_scope.index.sql import answer

        return answer(self, query)

    @cached_property
    def scope(self) -> Scope:
        """The model and suite that were harvested, loaded when first used.

        Raises:
            QwenScopeError: they cannot be found, or are others now.
        """
        from qwen_scope.fingerprint import fingerprint
        from qwen_scope.scope import Scope

        about = self.about
        scope = Scope.from_pretrained(
            None if about.suite_source is None else about.model,
            about.suite_source,
            layers=self.layers,
            dtype=about.dtype,
        )
        if fingerprint(scope.suite, self.layers) != about.fingerprint:
            raise QwenScopeError(
                f"expected the suite {about.suite} that the index in {self.folder} is of, found other weights under its name; "
                "harvest again"
            )
        scope.maxima = self.maxima
        return scope

    @cached_property
    def maxima(self) -> Maxima:
        """The highest activation of each feature in the corpus, which strengths of steering are counted in."""
        import torch

        from qwen_scope.steering.maxima import Maxima

        def of_layer(layer: int) -> torch.Tensor:
            return torch.tensor([value or 0.0 for value in self.table(layer, ["max"]).column("max").to_pylist()])

        return Maxima(of_layer, f"the index of {self.about.corpus}")

    @cached_property
    def words(self) -> Words:
        """What `search` looks through by words; opened, or built, when first used."""
        from qwen_scope.index.words import Words

        return Words(self)

    @cached_property
    def meanings(self) -> Meanings:
        """What `search` looks through by meaning; opened, or built, when first used."""
        from qwen_scope.index.meaning import Meanings

        return Meanings(self)

    def _neighbour(self, layer: int, feature: int, value: float) -> Neighbour:
        label = self.labels.get(layer, feature)
        return Neighbour(feature, value, label.text if label else None)

    def _file(self, layer: int, name: Literal["features", "examples"]) -> _Sorted:
        if (layer, name) not in self._files:
            schema = FEATURES if name == "features" else EXAMPLES
            self._files[layer, name] = _Sorted(layer_folder(self.folder, layer) / f"{name}.parquet", schema)
        return self._files[layer, name]

    def __repr__(self) -> str:
        about = self.about
        layers = ", ".join(f"{layer} ({width})" for layer, width in sorted(about.layers.items()))
        return f"FeatureIndex({about.suite!r}, layers {layers}, {about.tokens} tokens of {about.corpus})"


class _Sorted:
    """A Parquet file in the order of its column `feature`, of which only what is needed is read."""

    def __init__(self, path: Path, schema: pa.Schema):
        self.path = path
        # Arrow's reader of one file crashes when two threads use it.
        self.lock = Lock()
        try:
            self.file = pq.ParquetFile(path, memory_map=True)
            column, metadata = self.file.schema_arrow.get_field_index("feature"), self.file.metadata
            # A table without rows has one group without any.
            self.groups = [n for n in range(metadata.num_row_groups) if metadata.row_group(n).num_rows]
            features = [metadata.row_group(n).column(column).statistics for n in self.groups]
            self.first, self.last = [each.min for each in features], [each.max for each in features]
        except FileNotFoundError as error:
            raise QwenScopeError(
                f"expected a table of the feature index at {path}, found none; harvest again"
            ) from error
        except (OSError, pa.ArrowException, AttributeError, IndexError) as error:
            raise _damaged(path, error) from error
        missing = set(schema.names) - set(self.file.schema_arrow.names)
        if missing:
            raise _damaged(path, f"it has no column {', '.join(sorted(missing))}")

    def rows(self, start: int, stop: int, columns: list[str]) -> pa.Table:
        """The rows of features from `start` up to `stop`."""
        # First and last features of the groups ascend, as the column does.
        groups = self.groups[bisect_left(self.last, start) : bisect_left(self.first, stop)]
        names = list(dict.fromkeys(["feature", *columns]))
        try:
            with self.lock:
                # Starting threads takes longer than reading one feature.
                table = self.file.read_row_groups(groups, names, use_threads=len(groups) > 8)
        except (OSError, pa.ArrowException) as error:
            raise _damaged(self.path, error) from error
        # Not to_numpy(), which first imports pandas where it is installed.
        numbers = table.column("feature").to_pylist()
        found = table.slice(bisect_left(numbers, start), bisect_left(numbers, stop) - bisect_left(numbers, start))
        return found.select(columns)


def _damaged(path: Path, error: object) -> QwenScopeError:
    return QwenScopeError(
        f"expected a whole table of the feature index at {path}, found a damaged one ({error}); harvest again"
    )


def bundled_folder() -> Path:
    """Where the index lies that comes with the package."""
    return Path(__file__).parent.parent / "bundled_index"
