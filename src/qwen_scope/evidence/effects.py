"""Effects: what a steering is to bring about, as a number for each text."""

from __future__ import annotations

import importlib
import math
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from qwen_scope.errors import QwenScopeError, reason
from qwen_scope.feature_name import parse_feature

if TYPE_CHECKING:
    from qwen_scope.scope import Scope

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


@runtime_checkable
class Effect(Protocol):
    """Something to be measured of texts."""

    @property
    def name(self) -> str:
        """What it is called in reports."""
        ...

    def score(self, texts: Sequence[str]) -> list[float]:
        """A number for each text; higher is more."""
        ...


@dataclass(frozen=True)
class Words:
    """The share of a text's words that are among some, whatever their case; 0 for a text without words."""

    words: tuple[str, ...]
    """Which."""

    def __post_init__(self) -> None:
        for word in self.words or ("",):
            if not _WORD.fullmatch(word):
                raise QwenScopeError(
                    f"expected single words to count, found {word!r}; separate them by commas, or use a regex"
                )

    @property
    def name(self) -> str:
        """What it is called in reports."""
        shown = ", ".join(self.words[:4])
        return f"share of words among {shown}{f' and {len(self.words) - 4} more' if len(self.words) > 4 else ''}"

    def score(self, texts: Sequence[str]) -> list[float]:
        """A share for each text."""
        among = {word.casefold().replace("’", "'") for word in self.words}
        found = [[word.casefold().replace("’", "'") for word in _WORD.findall(text)] for text in texts]
        return [sum(word in among for word in words) / len(words) if words else 0.0 for words in found]


@dataclass(frozen=True)
class Regex:
    """Matches of a regular expression per word, words being what lies between white space; 0 for a text without words."""

    pattern: str
    """As Python's `re` takes it."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise QwenScopeError(
                f"expected a regular expression, found {self.pattern!r}, which is none ({error}); correct it"
            ) from error

    @property
    def name(self) -> str:
        """What it is called in reports."""
        return f"matches of {self.pattern} per word"

    def score(self, texts: Sequence[str]) -> list[float]:
        """A rate for each text."""
        pattern = re.compile(self.pattern)
        return [sum(1 for _ in pattern.finditer(text)) / max(1, len(text.split())) for text in texts]


@dataclass(frozen=True)
class Language:
    """The probability that a text is in a language, as py3langid tells; 0 for a blank text."""

    code: str
    """ISO 639-1, such as `fr`."""

    def __post_init__(self) -> None:
        known = _identifier().nb_classes
        if self.code not in known:
            raise QwenScopeError(
                f"expected a language of {', '.join(sorted(map(str, known)))}, found {self.code!r}; choose one of those"
            )

    @property
    def name(self) -> str:
        """What it is called in reports."""
        return f"probability of the language {self.code}"

    def score(self, texts: Sequence[str]) -> list[float]:
        """A probability for each text."""
        identifier = _identifier()
        return [float(dict(identifier.rank(text)).get(self.code, 0.0)) if text.strip() else 0.0 for text in texts]


@dataclass(frozen=True)
class Script:
    """The share of a text's letters that belong to a script; 0 for a text without letters."""

    script: str
    """The first word of its letters' Unicode names, such as `Cyrillic`, `Greek`, `Hiragana` or `CJK`."""

    def __post_init__(self) -> None:
        first = self.script.upper()
        letters = (chr(code) for code in range(sys.maxunicode + 1))
        if not any(unicodedata.name(letter, "").split(" ")[0] == first for letter in letters if letter.isalpha()):
            raise QwenScopeError(
                f"expected a script such as Cyrillic, Greek or CJK, found {self.script!r}; use the first word of the Unicode "
                "names of its letters"
            )

    @property
    def name(self) -> str:
        """What it is called in reports."""
        return f"share of letters in the script {self.script}"

    def score(self, texts: Sequence[str]) -> list[float]:
        """A share for each text."""
        first = self.script.upper()
        shares = []
        for text in texts:
            letters = [letter for letter in text if letter.isalpha()]
            among = sum(unicodedata.name(letter, "").split(" ")[0] == first for letter in letters)
            shares.append(among / len(letters) if letters else 0.0)
        return shares


@dataclass(frozen=True)
class Reading:
    """A feature's mean value over a text's tokens but the first, 0 where it is not among the k kept; the text is read alone
    and without steering. 0 for a text of less than two tokens.

    Of a feature that is itself steered this is nearly circular: a report says so.
    """

    scope: Scope
    """The model and suite that read."""
    feature: str
    """`layer/number`."""

    def __post_init__(self) -> None:
        layer, number = parse_feature(self.feature)
        suite = self.scope.suite
        if layer not in suite.layers or number >= suite[layer].d_sae:
            raise QwenScopeError(f"expected a feature that {suite.name} has, found {self.feature}; choose another")

    @property
    def name(self) -> str:
        """What it is called in reports."""
        return f"mean reading of feature {self.feature}"

    def score(self, texts: Sequence[str]) -> list[float]:
        """A mean for each text, in raw units of activation."""
        layer, number = parse_feature(self.feature)
        full = [at for at, text in enumerate(texts) if text]
        scores = [0.0] * len(texts)
        if full:
            for at, found in zip(full, self.scope.features([texts[at] for at in full], layers=layer), strict=True):
                values = found[layer].activation(number).clamp_min(0)[1:]
                scores[at] = float(values.mean()) if len(values) else 0.0
        return scores


@dataclass(frozen=True)
class Scorer:
    """A measure of a user's own."""

    function: Callable[[list[str]], Sequence[float]]
    """Gives a number for each text of a list."""
    name: str = "own scorer"
    """What it is called in reports."""

    def score(self, texts: Sequence[str]) -> list[float]:
        """What the function gives.

        Raises:
            QwenScopeError: it fails, or gives something else than a finite number for each text.
        """
        try:
            scores = [float(value) for value in self.function(list(texts))]
        except Exception as error:  # whatever the user's code raises
            raise QwenScopeError(
                f"expected {self.name} to give a number for each of {len(texts)} texts, found that it fails ({reason(error)}); "
                "correct it"
            ) from error
        if len(scores) != len(texts) or not all(map(math.isfinite, scores)):
            raise QwenScopeError(
                f"expected {self.name} to give a finite number for each of {len(texts)} texts, found {len(scores)} values of "
                f"which {sum(map(math.isfinite, scores))} are finite; correct it"
            )
        return scores


def effect_of(given: str | Effect | Callable[[list[str]], Sequence[float]], scope: Scope) -> Effect:
    """An effect from what a user gives: an `Effect`, a function of a list of texts, or text:

    - `words:goal,match,team`: see `Words`;
    - `regex:!`: see `Regex`;
    - `language:fr`: see `Language`;
    - `script:Cyrillic`: see `Script`;
    - `feature:15/1037`: see `Reading`;
    - `scorer:module:function`: a function of a module that Python finds, see `Scorer`.

    Raises:
        QwenScopeError: anything else.
    """
    if not isinstance(given, str):
        if callable(getattr(given, "score", None)):
            return given  # pyright: ignore[reportReturnType]
        if callable(given):
            function: Any = given
            return Scorer(function, getattr(given, "__name__", "own scorer"))
        raise QwenScopeError(f"expected an effect, found {given!r}; pass text, an Effect or a function of texts")
    kind, _, rest = given.partition(":")
    if rest and kind == "words":
        return Words(tuple(word.strip() for word in rest.split(",") if word.strip()))
    if rest and kind == "regex":
        return Regex(rest)
    if rest and kind == "language":
        return Language(rest.strip())
    if rest and kind == "script":
        return Script(rest.strip())
    if rest and kind == "feature":
        return Reading(scope, rest.strip())
    if rest and kind == "scorer":
        return _imported(rest.strip())
    raise QwenScopeError(
        "expected an effect as words:goal,team, regex:!, language:fr, script:Greek, feature:15/1037 or scorer:module:function, "
        f"found {given[:80]!r}; use one of those"
    )


def _imported(place: str) -> Scorer:
    module, _, name = place.partition(":")
    try:
        function: Any = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module raises when it is imported
        raise QwenScopeError(
            f"expected a function at {place!r}, as module:function, found none that imports ({reason(error)}); set PYTHONPATH to "
            "where the module is"
        ) from error
    if not callable(function):
        raise QwenScopeError(f"expected a function at {place!r}, found {type(function).__name__}; name another")
    own: Any = function  # what callable() narrowed it to gives any object
    return Scorer(own, place)


_loaded: list[Any] = []
"""The language identifier, once it has been loaded."""


def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ModuleNotFoundError as error:
        raise QwenScopeError(
            "expected the package py3langid to tell languages, found it is not installed; run pip install "
            "'qwen-scope[evidence]'"
        ) from error
    if not _loaded:
        _loaded.append(LanguageIdentifier.from_pickled_model(MODEL_FILE, norm_probs=True))
    return _loaded[0]
