"""SQL over an index: DuckDB reads its Parquet files where they are."""

from __future__ import annotations

import glob
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from qwen_scope.errors import QwenScopeError, reason
from qwen_scope.index.layout import layer_folder

if TYPE_CHECKING:
    from qwen_scope.index.feature_index import FeatureIndex


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
            _views(connection, index)
        except duckdb.Error as error:
            raise QwenScopeError(
                f"expected whole tables in {index.folder}, found that DuckDB cannot read them ({reason(error)}); harvest again"
            ) from error
        # DuckDB itself does not always hear of Ctrl-C while it computes.
        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(_table, connection, query)
            try:
                return found.result()
            except KeyboardInterrupt:
                connection.interrupt()
                raise
            except duckdb.Error as error:
                raise QwenScopeError(
                    f"expected a query that DuckDB answers, found that it refuses ({reason(error)}); the tables are features, "
                    "examples, labels, documents and, where they were kept, pairs"
                ) from error


def _table(connection: Any, query: str) -> pa.Table:
    found = connection.sql(query)
    if found is None:
        raise QwenScopeError(f"expected a query with an answer, found {query!r}; begin it with SELECT")
    return _with_names_of_its_own(found.to_arrow_table())


def _views(connection: Any, index: FeatureIndex) -> None:
    """What there is to query, under the names of the files."""
    by_layer = {layer: layer_folder(index.folder, layer) for layer in index.layers}
    for name, files in (
        ("features", {layer: [folder / "features.parquet"] for layer, folder in by_layer.items()}),
        ("examples", {layer: [folder / "examples.parquet"] for layer, folder in by_layer.items()}),
        ("pairs", {layer: sorted(folder.glob("pairs/*.parquet")) for layer, folder in by_layer.items()}),
    ):
        parts = [f"SELECT {layer} AS layer, * FROM {_parquet(paths)}" for layer, paths in files.items() if paths]
        if parts:
            connection.execute(f"CREATE VIEW {name} AS {' UNION ALL '.join(parts)}")
    if (documents := index.folder / "documents.parquet").is_file():
        connection.execute(f"CREATE VIEW documents AS SELECT * FROM {_parquet([documents])}")
    connection.register("labels", index.labels.to_table())


def _with_names_of_its_own(table: pa.Table) -> pa.Table:
    """A table whose columns all have different names, as rows of names and values need: of two `feature`, one is `feature_2`."""
    names: list[str] = []
    for name in table.column_names:
        again = (f"{name}_{n}" for n in count(2))
        names.append(
            name if name not in names else next(each for each in again if each not in {*names, *table.column_names})
        )
    return table.rename_columns(names)


def _parquet(paths: list[Path]) -> str:
    """Files as a table of DuckDB, which takes their names for patterns."""
    names = ["'" + glob.escape(str(path)).replace("'", "''") + "'" for path in paths]
    return f"read_parquet([{', '.join(names)}])"
