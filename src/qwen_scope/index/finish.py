"""The last part of a harvest: from what was found to the tables of the index."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from qwen_scope.bundled import GGUF_SHA256
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import from_anywhere
from qwen_scope.fingerprint import fingerprint
from qwen_scope.index.chosen import Chosen, chosen_examples
from qwen_scope.index.effects import logit_effects
from qwen_scope.index.labels import now
from qwen_scope.index.layout import EXAMPLES, FEATURES, About, write_examples, write_features
from qwen_scope.index.neighbours import similar, together
from qwen_scope.index.partial import NEVER, Keep, Partial
from qwen_scope.index.ranking import Ranked
from qwen_scope.index.shards import Shards
from qwen_scope.index.token_texts import TokenTexts
from qwen_scope.scope import Scope

if TYPE_CHECKING:
    from qwen_scope.index.config import HarvestConfig

NAMED = 10
"""So many tokens and neighbours of each kind are kept."""
TOP_TOKENS = 5
"""So many of the tokens that examples peak at."""
ALWAYS_ON = 0.9
"""A feature that fires at this share of the kept tokens or more is always on."""


def finish(
    folder: Path,
    total: Mapping[int, Partial],
    shards: Shards,
    scope: Scope,
    config: HarvestConfig,
    corpus: str,
    work: Path,
) -> None:
    """Writes the tables of all layers, then `index.json`.

    Args:
        corpus: what the corpus is called in the index.
        work: where it is noted which layers are done, for when this is stopped.

    Raises:
        QwenScopeError: a disk that is full.
    """
    keep = Keep.of(config)
    tokenizer = scope.backbone.tokenizer
    assert tokenizer is not None
    texts = TokenTexts(tokenizer)
    for layer, partial in tqdm(total.items(), desc="writing tables", unit="layer", disable=len(total) < 2):
        if (done := work / f"written-layer{layer}").exists():
            continue
        chosen = chosen_examples(partial, shards, keep)
        write_features(folder, layer, _features(partial, chosen, scope, layer, texts))
        write_examples(folder, layer, _examples(chosen, texts))
        done.touch()
    try:
        shutil.copyfile(shards.folder / "documents.parquet", folder / "documents.parquet")
    except OSError as error:
        raise QwenScopeError(
            f"expected to write {folder / 'documents.parquet'}, found that it cannot be done ({error.strerror or error}); "
            "free some space and run the same command again"
        ) from error
    suite, cut = scope.suite, shards.about
    quantised = suite.provenance.get("model_file_sha256") == GGUF_SHA256
    About(
        suite=suite.name,
        model=from_anywhere(config.model or ("bundled" if quantised else scope.backbone.name)),
        suite_source=None if quantised and config.suite is None else from_anywhere(config.suite or suite.name),
        fingerprint=fingerprint(suite, list(total)),
        k=suite.k,
        activation=suite.activation,
        layers={layer: partial.d_sae for layer, partial in total.items()},
        corpus=corpus,
        documents=cut.documents,
        tokens=cut.tokens,
        first_tokens=cut.pieces,
        norm_outliers={layer: partial.outliers for layer, partial in total.items()},
        broken=cut.broken,
        broken_first=cut.broken_first,
        context=config.context,
        dtype=str(scope.backbone.model.dtype).removeprefix("torch."),
        options=config.to_dict(),
        created=now(),
    ).write(folder)


def _features(partial: Partial, chosen: Chosen, scope: Scope, layer: int, texts: TokenTexts) -> pa.Table:
    sae, never = scope.suite[layer], partial.fired == 0
    effects = logit_effects(scope.backbone, sae.W_dec.detach().T, NAMED)
    sample = torch.from_numpy(partial.sample)
    fired = np.maximum(partial.fired, 1)
    density = partial.fired / max(partial.kept, 1)
    columns = {
        "feature": pa.array(np.arange(partial.d_sae, dtype=np.int32)),
        "fired": pa.array(partial.fired),
        "density": pa.array(density),
        "mean": pa.array((partial.total / fired).astype(np.float32), mask=never),
        "max": pa.array(partial.highest, mask=never),
        "first_seen": pa.array(partial.first, mask=partial.first == NEVER),
        "histogram": _lists(pa.array(partial.histogram.ravel()), np.full(partial.d_sae, partial.histogram.shape[1])),
        "dead": pa.array(never),
        "always_on": pa.array(density >= ALWAYS_ON),
        "top_tokens": _tokens(chosen.top_tokens(partial.d_sae, TOP_TOKENS), texts),
        "promoted": _tokens(effects.promoted, texts),
        "suppressed": _tokens(effects.suppressed, texts),
        "similar": _neighbours(similar(sae, NAMED)),
        "together": _neighbours(together(sample.clamp(min=0), (sample >= 0).float(), partial.d_sae, NAMED)),
    }
    return pa.table([columns[name] for name in FEATURES.names], FEATURES.names)


def _tokens(ranked: Ranked, texts: TokenTexts) -> pa.Array:
    there = ranked.numbers >= 0
    ids = ranked.numbers[there]
    parts = [texts.each(ids), pa.array(ids.astype(np.int32)), pa.array(ranked.values[there].astype(np.float32))]
    return _lists(pa.StructArray.from_arrays(parts, ["token", "id", "value"]), there.sum(axis=1))


def _neighbours(ranked: Ranked) -> pa.Array:
    there = ranked.numbers >= 0
    parts = [pa.array(ranked.numbers[there].astype(np.int32)), pa.array(ranked.values[there].astype(np.float32))]
    return _lists(pa.StructArray.from_arrays(parts, ["feature", "value"]), there.sum(axis=1))


def _lists(values: pa.Array, lengths: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths]), pa.int32()), values)


def _examples(chosen: Chosen, texts: TokenTexts) -> pa.Table:
    lengths = chosen.inside.sum(axis=1)
    of = np.repeat(np.arange(len(chosen)), lengths)
    weight = chosen.window.copy()
    # The peak is always shown, whatever else of its character fires.
    weight[np.arange(len(chosen)), chosen.middle] = np.inf
    kinds = pa.array(["top", "range"]).take(pa.array(chosen.is_range.astype(np.int8)))
    columns = {
        "feature": pa.array(chosen.feature.astype(np.int32)),
        "kind": kinds,
        "rank": pa.array(chosen.rank.astype(np.int16)),
        "value": pa.array(chosen.value.astype(np.float32)),
        "document": pa.array(chosen.document),
        "position": pa.array(chosen.position),
        "start": pa.array(chosen.start),
        "end": pa.array(chosen.end),
        "window_start": pa.array(chosen.window_start),
        "window_end": pa.array(chosen.window_end),
        "peak": pa.array(chosen.peak.astype(np.int16)),
        "tokens": _lists(texts.running(chosen.ids[chosen.inside], of, weight[chosen.inside]), lengths),
        "values": _lists(pa.array(chosen.window[chosen.inside].astype(np.float32)), lengths),
    }
    return pa.table([columns[name] for name in EXAMPLES.names], EXAMPLES.names)
