"""SQL over an index: DuckDB reads its Parquet files where they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from qwen_scope.errors import QwenScopeError
from qwen_scope.index.layout import layer_folder

if TYPE_CHECKING:
    from qwen_scope.index.feature_index import FeatureIndex

_TABLES = {"features": "features.parquet", "examples": "examples.parquet", "pairs": "pairs/*.parquet"}
"""Files in a layer's folder by the name they have in queries."""


def answer(index: FeatureIndex, query: str) -> pa.Table:
    """See `FeatureIndex.sql`."""
    try:
        import duckdb
    except ImportError as error:
        raise QwenScopeError(
            "expected the package duckdb for SQL, found it is not installed; run pip install 'qwen-scope[index]'"
        ) from error
    with duckdb.connect() as connection:
        try:
            for name, pattern in (
                ("features", "features.parquet"),
                ("examples", "examples.parquet"),
                ("pairs", "pairs/*.parquet"),
            ):
                _view(connection, index, name, pattern)
            connection.register("labels", index.labels.to_table())
            return connection.sql(query).to_arrow_table()
        except duckdb.Error as error:
            raise QwenScopeError(
                f"expected a query that DuckDB answers, found that it refuses ({str(error).splitlines()[0]}); the tables are "
                "features, examples, labels and pairs"
            ) from error


def _view(connection, index: FeatureIndex, name: str, pattern: str) -> None:
    """One view over the files of all layers, with a column that says which."""
    found = [(layer, layer_folder(index.folder, layer)) for layer in index.layers]
    parts = [
        f"SELECT {layer} AS layer, * FROM read_parquet('{str(folder / pattern).replace(chr(39), chr(39) * 2)}')"
        for layer, folder in found
        if any(folder.glob(pattern))
    ]
    if parts:
        connection.execute(f"CREATE VIEW {name} AS {' UNION ALL '.join(parts)}")
