"""`FeatureIndex`: what a harvest found, by feature."""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from qwen_scope.errors import QwenScopeError
from qwen_scope.feature_name import parse_feature
from qwen_scope.index.feature import Example, Feature, Label, Neighbour, Token
from qwen_scope.index.labels import Labels
from qwen_scope.index.layout import About, layer_folder

if TYPE_CHECKING:
    from qwen_scope.scope import Scope


class FeatureIndex:
    """A folder that `qwen-scope harvest` wrote, opened; `index["12/6159"]` is a `Feature`.

    Nothing is read but what is asked for; several processes can read one folder.
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
        place = bundled_folder() if folder is None else Path(folder).expanduser()
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
        row = self._file(layer, "features").rows(number).slice(0, 1).to_pylist()[0]
        examples = self._file(layer, "examples").rows(number).to_pylist()
        for column, kind in (
            ("top_tokens", Token),
            ("promoted", Token),
            ("suppressed", Token),
            ("similar", Neighbour),
            ("together", Neighbour),
        ):
            row[column] = [kind(**item) for item in row[column]]
        del row["feature"]
        for example in examples:
            del example["feature"]
        return Feature(
            layer=layer,
            number=number,
            label=self.labels.get(layer, number),
            examples=[Example(**example) for example in examples],
            **row,
        )

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
        """A layer's features.parquet as an Arrow table, a row per feature; only some columns if named."""
        self.check((layer, 0))
        return self._file(layer, "features").file.read(columns)

    def label(self, name: str | tuple[int, int], text: str) -> None:
        """Writes a label by hand, which is shown before any other; an empty text takes it back.

        Raises:
            QwenScopeError: no such feature, or the file of labels cannot be written.
        """
        layer, number = self.check(name)
        self.labels.add(layer, number, Label(text=text.strip(), by="hand"))

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
        from qwen_scope.index.fingerprint import fingerprint
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
        return scope

    def _file(self, layer: int, name: str) -> _Sorted:
        if (layer, name) not in self._files:
            self._files[layer, name] = _Sorted(layer_folder(self.folder, layer) / f"{name}.parquet")
        return self._files[layer, name]

    def __repr__(self) -> str:
        about = self.about
        layers = ", ".join(f"{layer} ({width})" for layer, width in sorted(about.layers.items()))
        return f"FeatureIndex({about.suite!r}, layers {layers}, {about.tokens} tokens of {about.corpus})"


class _Sorted:
    """A Parquet file in the order of its column `feature`, of which only what is needed is read."""

    def __init__(self, path: Path):
        try:
            self.file = pq.ParquetFile(path, memory_map=True)
            column = self.file.schema_arrow.get_field_index("feature")
            groups = [self.file.metadata.row_group(n).column(column) for n in range(self.file.num_row_groups)]
            self.first = [group.statistics.min for group in groups]
            self.last = [group.statistics.max for group in groups]
        except (OSError, pa.ArrowException, AttributeError) as error:
            raise QwenScopeError(
                f"expected a table of the feature index at {path}, found none that reads ({error}); harvest again"
            ) from error

    def rows(self, feature: int) -> pa.Table:
        """The rows of one feature."""
        stop = bisect_right(self.first, feature)
        groups = [n for n in range(stop) if self.last[n] >= feature]
        table = self.file.read_row_groups(groups) if groups else self.file.schema_arrow.empty_table()
        # The column is sorted, so its rows lie together.
        numbers = table.column("feature").to_numpy()
        start, end = numbers.searchsorted(feature, "left"), numbers.searchsorted(feature, "right")
        return table.slice(start, end - start)


def bundled_folder() -> Path:
    """Where the index lies that comes with the package."""
    return Path(__file__).parent.parent / "bundled_index"


def open_index(index: Any) -> FeatureIndex:
    """An index that is open already, or a folder's."""
    return index if isinstance(index, FeatureIndex) else FeatureIndex.open(index)
