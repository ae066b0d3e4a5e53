"""Which features are about something: full text over labels, tokens and examples, best first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args
from unicodedata import normalize

from qwen_scope.errors import QwenScopeError
from qwen_scope.index.words import BETWEEN, UNSPACED, feature_of, joined, spaced

if TYPE_CHECKING:
    from qwen_scope.index.feature import Label
    from qwen_scope.index.feature_index import FeatureIndex
    from qwen_scope.index.words import Words

Where = Literal["label", "top tokens", "promoted", "examples"]
_PLACES: tuple[Where, ...] = get_args(Where)
By = Literal["words", "meaning"]

_COLUMNS = "50, 10, 1, 1"
"""What a word counts in each of `Where`. BM25 levels off, so a label must count far more to count a little more."""
_MOST_WORDS = 32
_MOST_COMMON_WORDS = 3
_SNIPPET_WORDS = 16
_ON, _OFF = "\x01", "\x02"


@dataclass(frozen=True)
class Hit:
    """A feature that a search found."""

    layer: int
    """Which decoder layer, from 0."""
    number: int
    """Which feature of the layer."""
    score: float
    """How well it fits, higher for better. By words: BM25, which compares within one search only. By meaning: the cosine."""
    label: Label | None
    """What it is about, if anybody has said so."""
    top_tokens: list[str]
    """Tokens at which its examples often peak, most frequent first."""
    where: Where | None
    """What matched, the one that counts most if several did; None by meaning."""
    snippet: str
    """The part of it that matched, on one line; by meaning, the beginning of its first example."""
    matched: list[tuple[int, int]]
    """Words of the query in the snippet, as [start, end)."""

    @property
    def name(self) -> str:
        """`layer/number`."""
        return f"{self.layer}/{self.number}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {"name": self.name, **asdict(self)}


def search(
    index: FeatureIndex,
    query: str,
    *,
    count: int = 10,
    layers: Sequence[int] | int | None = None,
    by: By = "words",
) -> list[Hit]:
    """Features whose label, tokens or examples are about something, best first.

    By words, any text is a query: a feature need match only one of its words, in any form of them, and comes the earlier the
    more it matches and the rarer they are; a label counts most, then top tokens, promoted tokens and examples. A word with *
    at its end matches all that begin so. What is no word, such as `#`, is looked for in the top tokens.

    Args:
        query: words, or what is meant.
        count: most hits.
        layers: only these; all unless told.
        by: `meaning` compares sentence embeddings of the query and of each feature's label, tokens and first example.

    Raises:
        QwenScopeError: an empty query, a layer that is not there, or no model for search by meaning.
    """
    if not query.strip():
        raise QwenScopeError(f"expected words to search for, found {query!r}; say what the features should be about")
    if count < 1:
        raise QwenScopeError(f"expected a count of at least 1, found {count}; ask for one or more features")
    if by not in get_args(By):
        raise QwenScopeError(f"expected to search by {' or by '.join(get_args(By))}, found {by!r}; choose one of them")
    wanted = index.layers if layers is None else [layers] if isinstance(layers, int) else list(layers)
    for layer in wanted:
        index.check((layer, 0))
    # SQLite takes no numbers of more than 64 bits.
    count = min(count, len(index))
    if by == "meaning":
        return _by_meaning(index, query, count, wanted)
    terms = terms_of(query)
    within = f"(rowid >> 32) IN ({', '.join(map(str, wanted))})"
    return _by_words(index, terms, count, within) if terms else _by_sign(index, query, count, within)


def terms_of(query: str) -> list[str]:
    """The words of a text as expressions of FTS5, quoted, so that nothing a person writes is one."""
    terms = []
    for word in re.findall(r"[^\s,;:!?()\[\]{}\"]+", _clean(query)):
        stem = word.rstrip("*")
        if not any(map(str.isalnum, stem)):
            continue
        if re.fullmatch(f"{UNSPACED}{{3,}}", stem):
            # Nobody says where the words are; every two characters are one.
            terms += [f'"{spaced(stem[n : n + 2])}"' for n in range(len(stem) - 1)]
        else:
            terms.append(f'"{spaced(stem)}"{" *" * (stem != word)}')
    return list(dict.fromkeys(terms))[:_MOST_WORDS]


def _by_words(index: FeatureIndex, terms: list[str], count: int, within: str) -> list[Hit]:
    terms = _telling(index.words, terms)
    if not terms:
        return []
    snippets = ", ".join(f"snippet(words, {n}, '{_ON}', '{_OFF}', '…', {_SNIPPET_WORDS})" for n in range(len(_PLACES)))
    rows = index.words.select(
        f"SELECT rowid, -bm25(words, {_COLUMNS}), tokens, {snippets} FROM words WHERE words MATCH ? AND {within} "
        "ORDER BY 2 DESC, 1 LIMIT ?",
        [" OR ".join(terms), count],
    )
    return [_hit(index, row, score, tokens, *_first(snippets)) for row, score, tokens, *snippets in rows]


def _telling(words: Words, terms: list[str]) -> list[str]:
    """The terms that are anywhere, without those of more than half the features, unless all are such."""
    ((features,),) = words.select("SELECT count(*) FROM words_docsize")
    found = {term: words.select("SELECT count(*) FROM words WHERE words MATCH ?", [term])[0][0] for term in terms}
    # Time goes into the features that match, so this bounds it too.
    common = sorted(filter(found.get, terms), key=lambda term: found[term])[:_MOST_COMMON_WORDS]
    return [term for term in terms if 0 < found[term] <= features / 2] or common


def _first(snippets: Sequence[str]) -> tuple[Where, str]:
    """Of the snippets of one feature, the first in which something matched."""
    return next(
        (found for found in zip(_PLACES, snippets, strict=True) if _ON in found[1]), (_PLACES[-1], snippets[-1])
    )


def _by_sign(index: FeatureIndex, query: str, count: int, within: str) -> list[Hit]:
    """Features with something that is no word among their top tokens, the further in front the better."""
    sign = _clean(query).strip()
    rows = index.words.select(
        f"SELECT rowid, 1.0 / instr(tokens, ?1), tokens FROM words WHERE instr(tokens, ?1) AND {within} "
        "ORDER BY 2 DESC, 1 LIMIT ?2",
        [sign, count],
    )
    return [
        _hit(index, row, score, tokens, "top tokens", tokens.replace(sign, f"{_ON}{sign}{_OFF}"))
        for row, score, tokens in rows
    ]


def _by_meaning(index: FeatureIndex, query: str, count: int, layers: Sequence[int]) -> list[Hit]:
    best = index.meanings.nearest(query, count, layers)
    chosen = ", ".join(str(row) for row, _ in best)
    rows = index.words.select(f"SELECT rowid, tokens, substr(contexts, 1, 200) FROM words WHERE rowid IN ({chosen})")
    found = {row: (tokens, None, contexts.partition(BETWEEN)[0]) for row, tokens, contexts in rows}
    return [_hit(index, row, score, *found[row]) for row, score in best]


def _hit(index: FeatureIndex, row: int, score: float, tokens: str, where: Where | None, piece: str) -> Hit:
    layer, number = feature_of(row)
    snippet, matched = "", []
    for n, part in enumerate(re.split(f"[{_ON}{_OFF}]", " ".join(joined(piece).replace(BETWEEN, " · ").split()))):
        # Marks come in pairs, so every second part is between two.
        if n % 2:
            matched.append((len(snippet), len(snippet) + len(part)))
        snippet += part
    top_tokens = joined(tokens).split(BETWEEN) if tokens else []
    return Hit(layer, number, score, index.labels.get(layer, number), top_tokens, where, snippet, matched)


def _clean(query: str) -> str:
    # FTS5 ends at a null character, and SQLite takes no lone surrogates.
    return normalize("NFC", query.encode("utf-8", "replace").decode()).replace("\0", " ")
