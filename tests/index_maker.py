"""A small feature index written by hand, for tests of what reads one; harvested ones are in test_harvest.py."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from qwen_scope.index.feature_index import FeatureIndex
from qwen_scope.index.layout import EXAMPLES, FEATURES, HALF_OCTAVES, About, write_examples, write_features

WORDS = {
    0: ("goal", "the match ended after a late goal by the home team"),
    1: ("bonjour", "bonjour je voudrais deux billets pour le train"),
    2: ("#", "x = 1  # a comment in the code"),
    3: ("court", "the court held that the contract was void"),
    4: ("<b>", "<script>alert('x')</script> & <b>bold</b> text"),
}
"""Feature number -> the token it peaks at, and its text; the other features are dead."""


def write_index(folder: Path, layers: dict[int, int] | None = None, **about) -> FeatureIndex:
    """An index of some layers, each of the given number of features."""
    layers = layers or {1: 64, 2: 128}
    for layer, d_sae in layers.items():
        write_features(folder, layer, pa.Table.from_pylist([_feature(n, d_sae) for n in range(d_sae)], FEATURES))
        rows = [row for n in range(min(d_sae, len(WORDS))) for row in _examples(n)]
        write_examples(folder, layer, pa.Table.from_pylist(rows, EXAMPLES))
    given = {
        "suite": "tiny suite",
        "model": "tiny",
        "suite_source": None,
        "fingerprint": "0123456789abcdef",
        "k": 8,
        "activation": "topk",
        "layers": layers,
        "corpus": "words.txt",
        "documents": 5,
        "tokens": 1000,
        "first_tokens": 5,
        "norm_outliers": dict.fromkeys(layers, 3),
        "broken": 0,
        "broken_first": [],
        "context": 256,
        "dtype": "float32",
    }
    About(**{**given, **about}).write(folder)
    return FeatureIndex.open(folder)


def _feature(n: int, d_sae: int) -> dict:
    alive = n in WORDS
    histogram = np.zeros(len(HALF_OCTAVES), dtype=int)
    histogram[22:26] = 5 if alive else 0
    token = WORDS[n][0] if alive else ""
    return {
        "feature": n,
        "fired": 20 if alive else 0,
        "density": 20 / 992 if alive else 0.0,
        "mean": 2.5 if alive else None,
        "max": 8.0 - n if alive else None,
        "first_seen": 10 * n if alive else None,
        "histogram": histogram.tolist(),
        "dead": not alive,
        "always_on": False,
        "top_tokens": [{"token": token, "id": n, "value": 1.0}] if alive else [],
        "promoted": [{"token": f" up{n}-{i}", "id": i, "value": 3.0 - i} for i in range(3)],
        "suppressed": [{"token": f" down{n}-{i}", "id": i, "value": -3.0 + i} for i in range(3)],
        "similar": [{"feature": (n + 1) % d_sae, "value": 0.5}],
        "together": [{"feature": (n + 1) % d_sae, "value": 0.25}] if alive else [],
    }


def _examples(n: int) -> list[dict]:
    token, text = WORDS[n]
    tokens = [text[: text.index(token)], token, text[text.index(token) + len(token) :]]
    peak = 1 if tokens[0] else 0
    tokens = [part for part in tokens if part]
    start = text.index(token)
    return [
        {
            "feature": n,
            "kind": kind,
            "rank": rank,
            "value": value,
            "document": n,
            "position": 3 + rank,
            "start": start,
            "end": start + len(token),
            "window_start": 0,
            "window_end": len(text),
            "peak": peak,
            "tokens": tokens,
            "values": [value if at == peak else 0.0 for at in range(len(tokens))],
        }
        for kind, values in (("top", (8.0 - n, 4.0)), ("range", (4.0, 1.0)))
        for rank, value in enumerate(values)
    ]
