"""Parquet files and `datasets`, on disk or on the hub, row by row."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_scope.corpus.columns import Broken, Wanted, chosen_columns, in_column, picked, short, unreadable
from qwen_scope.errors import QwenScopeError


def parquet_rows(path: Path, column: Wanted, broken: Broken = None) -> Iterator[tuple[str, Any]]:
    """The rows of a Parquet file, a little at a time and the wanted column alone."""
    pyarrow, parquet = _import("pyarrow", path), _import("pyarrow.parquet", path)
    try:
        # Buffered, and without reading ahead: a row group's column is not held whole.
        with parquet.ParquetFile(path, buffer_size=1 << 16, pre_buffer=False) as file:
            chosen = chosen_columns(_strings(file.schema_arrow), column, str(path))
            batches = file.iter_batches(batch_size=64, columns=chosen, use_threads=False)
            rows = (row for batch in batches for row in _values(batch, chosen))
            for number, row in enumerate(rows, 1):
                yield f"row {number} of {path}", picked(row, column)
    except (pyarrow.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error


def saved_rows(folder: Path, column: Wanted, split: str) -> Iterator[tuple[str, Any]]:
    """The rows of a split that `datasets.save_to_disk` wrote."""
    datasets = _import("datasets", folder)
    try:
        loaded = datasets.load_from_disk(folder)
    except Exception as error:  # whatever datasets raises at half a folder
        raise unreadable(folder, error) from error
    if isinstance(loaded, dict):
        if split not in loaded:
            raise QwenScopeError(
                f"expected the split {split!r} in {folder}, found {', '.join(loaded)}; choose with split="
            )
        loaded = loaded[split]
    yield from _dataset(loaded, column, str(folder))


def hub_rows(name: str, column: Wanted, split: str, config: str | None, streaming: bool) -> Iterator[tuple[str, Any]]:
    """The rows of a dataset on the hub."""
    datasets = _import("datasets", name)
    try:
        loaded = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise QwenScopeError(
            f"expected a file, a folder or a Hugging Face dataset named {name}, found no file or folder and no such dataset "
            f"within reach ({short(error)}); check the name and the connection, or log in with `hf auth login`"
        ) from error
    except Exception as error:  # whatever datasets raises, such as at an unknown split or configuration
        raise QwenScopeError(
            f"expected the dataset {name} to have the split {split!r} in the configuration {config or 'by default'}, found "
            f"that it does not load ({short(error)}); choose with split= and config="
        ) from error
    yield from _dataset(loaded, column, name)


def _dataset(loaded: Any, column: Wanted, name: str) -> Iterator[tuple[str, Any]]:
    """The values of a `datasets` object; of one that knows its columns, no other column is read."""
    try:
        if not loaded.features:
            yield from in_column(((f"row {number} of {name}", row) for number, row in enumerate(loaded, 1)), column)
            return
        chosen, number = chosen_columns(_strings(loaded.features.arrow_schema), column, name), 0
        for batch in loaded.select_columns(chosen).with_format("arrow").iter(batch_size=64):
            batch.validate(full=True)  # Arrow believes a file's offsets: damaged ones would end the process
            for row in _values(batch, chosen):
                number += 1
                yield f"row {number} of {name}", picked(row, column)
    except QwenScopeError:
        raise
    except Exception as error:  # whatever datasets raises at a broken file or connection
        raise unreadable(name, error) from error


def _values(batch: Any, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    return zip(*(batch.column(name).to_pylist() for name in columns), strict=True)


def _strings(schema: Any) -> dict[str, bool]:
    return {field.name: str(field.type) in ("string", "large_string") for field in schema}


def _import(module: str, place: str | Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise QwenScopeError(
            f"expected the package {module.partition('.')[0]} to read {place}, found it is not installed; run "
            "pip install 'qwen-scope[train]'"
        ) from error
