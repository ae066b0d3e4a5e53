"""What lies in the folder of a feature index: files, columns, and the `index.json` that says what they are of.

    index.json                  `About`: which suite, model, corpus and options; how many tokens
    layer15/features.parquet    a row per feature, in their order (`FEATURES`)
    layer15/examples.parquet    a row per example, by feature, kind and rank (`EXAMPLES`)
    layer15/pairs/*.parquet     every (token, feature) pair, if asked for (`PAIRS`)
    documents.parquet           where each document of the corpus was (`DOCUMENTS`)
    labels.jsonl                labels, a line each, the newest last (see `qwen_scope.index.labels`)

docs/index-format.md describes the same for users of other tools; a test compares the two.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qwen_scope.errors import QwenScopeError
from qwen_scope.files import replacing

FORMAT = "qwen-scope feature index"
VERSION = 1

HALF_OCTAVES = range(-20, 40)
"""Histogram bin n counts activations from 2 ** (HALF_OCTAVES[n] / 2) up to the next bin; the first also takes all that is
smaller, the last all that is larger."""
ROW_GROUP = 256
"""Features in a row group of features.parquet: what has to be read for one of them."""
EXAMPLE_ROW_GROUP = 1024
"""Examples in a row group of examples.parquet."""

_TOKENS = pa.list_(
    pa.struct([pa.field("token", pa.string()), pa.field("id", pa.int32()), pa.field("value", pa.float32())])
)
_NEIGHBOURS = pa.list_(pa.struct([pa.field("feature", pa.int32()), pa.field("value", pa.float32())]))

FEATURES = pa.schema(
    [
        pa.field("feature", pa.int32(), nullable=False),
        pa.field("fired", pa.int64(), nullable=False),
        pa.field("density", pa.float64(), nullable=False),
        pa.field("mean", pa.float32()),
        pa.field("max", pa.float32()),
        pa.field("first_seen", pa.int64()),
        pa.field("histogram", pa.list_(pa.int64()), nullable=False),
        pa.field("dead", pa.bool_(), nullable=False),
        pa.field("always_on", pa.bool_(), nullable=False),
        pa.field("top_tokens", _TOKENS, nullable=False),
        pa.field("promoted", _TOKENS, nullable=False),
        pa.field("suppressed", _TOKENS, nullable=False),
        pa.field("similar", _NEIGHBOURS, nullable=False),
        pa.field("together", _NEIGHBOURS, nullable=False),
    ]
)
"""Columns of features.parquet; `Feature` says what they mean."""

EXAMPLES = pa.schema(
    [
        pa.field("feature", pa.int32(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("rank", pa.int16(), nullable=False),
        pa.field("value", pa.float32(), nullable=False),
        pa.field("document", pa.int64(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("end", pa.int64(), nullable=False),
        pa.field("window_start", pa.int64(), nullable=False),
        pa.field("window_end", pa.int64(), nullable=False),
        pa.field("peak", pa.int16(), nullable=False),
        pa.field("tokens", pa.list_(pa.string()), nullable=False),
        pa.field("values", pa.list_(pa.float32()), nullable=False),
    ]
)
"""Columns of examples.parquet; `Example` says what they mean."""

PAIRS = pa.schema(
    [
        pa.field("document", pa.int64(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("token", pa.int32(), nullable=False),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("feature", pa.int32(), nullable=False),
        pa.field("value", pa.float32(), nullable=False),
    ]
)
"""Columns of pairs/*.parquet: every feature that fires (value > 0) at every token; `kept` is False at position 0 and at
norm outliers, which the statistics leave out."""

DOCUMENTS = pa.schema(
    [pa.field("document", pa.int64(), nullable=False), pa.field("place", pa.string(), nullable=False)]
)
"""Columns of documents.parquet: `place` says where a document was, such as `line 5 of corpus.jsonl`."""


@dataclass(frozen=True)
class About:
    """What an index is of: the content of `index.json`."""

    suite: str
    """Name of the suite."""
    model: str
    """What the language model is called; `bundled` for the one that comes with the package."""
    suite_source: str | None
    """What `Suite.from_pretrained` opens to find it again; None for the bundled suite."""
    fingerprint: str
    """A hash of the SAEs' weights: an index of another suite has another."""
    k: int
    """Features kept per token."""
    activation: str
    """`topk` or `topk_relu`."""
    layers: dict[int, int]
    """Width d_sae by layer."""
    corpus: str
    """What was read."""
    documents: int
    """Documents read."""
    tokens: int
    """Tokens read."""
    first_tokens: int
    """Of those, at position 0 of a piece of text, left out of the statistics."""
    norm_outliers: dict[int, int]
    """Of the others, by layer, those left out for their extreme norm (see `qwen_scope.outliers`)."""
    broken: int
    """Documents or lines of the corpus that could not be read and were left out."""
    broken_first: list[str]
    """What was wrong with the first of them."""
    context: int
    """Most tokens the model saw at once."""
    dtype: str
    """What the model computed in."""
    options: dict[str, Any] = field(default_factory=dict)
    """All options of the harvest."""
    created: str = ""
    """When it was made, ISO 8601."""

    def kept(self, layer: int) -> int:
        """Tokens that a layer's statistics are over."""
        return self.tokens - self.first_tokens - self.norm_outliers[layer]

    def write(self, folder: Path) -> None:
        """Writes `index.json`, atomically; it is written last, so that a folder with one is whole."""
        value = {"format": FORMAT, "version": VERSION, **asdict(self)}
        with replacing(folder / "index.json") as temporary:
            temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> "About":
        """Reads `index.json`.

        Raises:
            QwenScopeError: no index there, one of another version, or a file that is not whole.
        """
        path = folder / "index.json"
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise QwenScopeError(
                f"expected a feature index in {folder}, found no index.json that reads ({error}); make one with "
                "`qwen-scope harvest`"
            ) from error
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise QwenScopeError(f"expected a feature index in {folder}, found another index.json; check the path")
        if value.get("version") != VERSION:
            raise QwenScopeError(
                f"expected a feature index of version {VERSION} in {folder}, found version {value.get('version')!r}; harvest "
                "again, or use the qwen-scope that wrote it"
            )
        known = {f.name for f in fields(About)}
        try:
            by_layer = {name: {int(n): item for n, item in value[name].items()} for name in ("layers", "norm_outliers")}
            return About(**{**{name: item for name, item in value.items() if name in known}, **by_layer})
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise QwenScopeError(
                f"expected a whole index.json in {folder}, found one that lacks something ({error}); harvest again"
            ) from error


def layer_folder(folder: Path, layer: int) -> Path:
    """Where a layer's tables are."""
    return folder / f"layer{layer}"


def write_table(path: Path, table: pa.Table, row_group: int) -> None:
    """Writes a table as Parquet, atomically."""
    # Texts repeat; of numbers, the bytes of like rank do.
    encoding: Any = {
        "use_dictionary": _leaves(table.schema, pa.types.is_string),
        "use_byte_stream_split": _leaves(table.schema, pa.types.is_floating),
    }
    with replacing(path) as temporary:
        pq.write_table(table, temporary, row_group_size=row_group, compression="zstd", compression_level=9, **encoding)


def _leaves(schema: pa.Schema, is_kind: Callable[[pa.DataType], bool]) -> list[str]:
    """Paths of the columns of a kind, in lists and structs too, as Parquet calls them."""

    def within(path: str, kind: pa.DataType) -> list[str]:
        if pa.types.is_list(kind):
            return within(f"{path}.list.element", kind.value_type)
        if pa.types.is_struct(kind):
            return [found for field in kind for found in within(f"{path}.{field.name}", field.type)]
        return [path] if is_kind(kind) else []

    return [found for field in schema for found in within(field.name, field.type)]


def write_features(folder: Path, layer: int, table: pa.Table) -> None:
    """Writes a layer's features.parquet; the table has a row for every feature, in their order."""
    write_table(layer_folder(folder, layer) / "features.parquet", table.cast(FEATURES), ROW_GROUP)


def write_examples(folder: Path, layer: int, table: pa.Table) -> None:
    """Writes a layer's examples.parquet; the table is in order of feature, kind (top first) and rank."""
    write_table(layer_folder(folder, layer) / "examples.parquet", table.cast(EXAMPLES), EXAMPLE_ROW_GROUP)
