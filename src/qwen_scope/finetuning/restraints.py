"""`Restraints`: which features are to stay below which level on samples of which kind; what SASFT trains with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope.errors import QwenScopeError
from qwen_scope.feature_name import parse_feature
from qwen_scope.files import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwen_scope.suite import Suite

FORMAT = "qwen-scope restraints 1"
FLOAT32_MOST = 3.4e38
"""Limits are compared in float32: beyond this they would be infinite."""


@dataclass(frozen=True)
class Restrained:
    """A feature, and how high it may be on samples of each tag."""

    feature: str
    """`layer/number`."""
    home: str
    """The tag it belongs to, such as the language that it stands for; empty if none."""
    limits: Mapping[str, float]
    """For samples of each of these tags, the pre-activation `x @ W_enc[s] + b_enc[s]` above which it is penalised, in raw units;
    it can be negative. Samples of other tags leave the feature alone."""
    monolinguality: float | None = None
    """Its mean activation on its home less the mean over the other tags, where it was found by that."""

    def __post_init__(self) -> None:
        parse_feature(self.feature)
        if not self.limits or not all(abs(limit) <= FLOAT32_MOST for limit in self.limits.values()):
            raise QwenScopeError(
                f"expected a finite limit for at least one tag for feature {self.feature}, found {dict(self.limits)}; say how "
                "high it may be, such as {'en': 0.0}"
            )
        if self.home in self.limits:
            raise QwenScopeError(
                f"expected limits for other tags than {self.home!r}, the home of feature {self.feature}, found one; leave it out"
            )

    @property
    def layer(self) -> int:
        """The layer it reads, from 0."""
        return parse_feature(self.feature)[0]

    @property
    def number(self) -> int:
        """Its number in the layer's dictionary."""
        return parse_feature(self.feature)[1]


@dataclass(frozen=True)
class Restraints:
    """Features to keep down while a model is fine-tuned, and what they were measured with."""

    features: tuple[Restrained, ...]
    """Which, and how high they may be."""
    tags: tuple[str, ...]
    """All tags that samples may have, such as languages; one that no limit names leaves the features alone."""
    suite: str
    """Name of the suite that the features are of."""
    fingerprint: str
    """Of its weights at the layers in use (see `qwen_scope.fingerprint`)."""
    tokenizer: str | None = None
    """Hash of the vocabulary that the limits were measured with (see `vocabulary_hash`)."""
    tokens: Mapping[str, int] | None = None
    """Tokens of each tag that they were measured on."""

    def __post_init__(self) -> None:
        names = [feature.feature for feature in self.features]
        if not names or len(set(names)) < len(names):
            raise QwenScopeError(
                f"expected one or more different features to restrain, found {names or 'none'}; name some"
            )
        named = {
            tag for feature in self.features for tag in (*feature.limits, *([feature.home] if feature.home else []))
        }
        if missing := sorted(named - set(self.tags)):
            raise QwenScopeError(
                f"expected all tags that limits name among {', '.join(self.tags) or 'none'}, found {', '.join(missing)}; add them"
            )

    @staticmethod
    def of(
        features: Sequence[Restrained],
        suite: Suite,
        tags: Sequence[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        tokens: Mapping[str, int] | None = None,
    ) -> Restraints:
        """Restraints on features of a suite.

        Args:
            features: which, and how high they may be.
            suite: the suite they are of.
            tags: all tags that samples may have; by default those that the features name.
            tokenizer: what the limits were measured with, if it is to be checked before training.
            tokens: see `Restraints.tokens`.

        Raises:
            QwenScopeError: no features, or some that the suite does not have.
        """
        for each in features:
            if each.layer not in suite.layers or each.number >= suite[each.layer].d_sae:
                raise QwenScopeError(
                    f"expected features that {suite.name} has, found {each.feature}; choose another, or name the suite it is of"
                )
        named = dict.fromkeys(
            tag for each in features for tag in ([each.home] if each.home else []) + list(each.limits)
        )
        from qwen_scope.fingerprint import fingerprint

        layers = sorted({each.layer for each in features})
        return Restraints(
            tuple(features),
            tuple(named if tags is None else tags),
            suite.name,
            fingerprint(suite, layers) if layers else "",
            None if tokenizer is None else vocabulary_hash(tokenizer),
            tokens,
        )

    @property
    def layers(self) -> list[int]:
        """The layers that the features are of, in order."""
        return sorted({feature.layer for feature in self.features})

    def check_suite(self, suite: Suite) -> None:
        """Raises a QwenScopeError unless the features are of this suite."""
        from qwen_scope.fingerprint import fingerprint

        missing = [layer for layer in self.layers if layer not in suite.layers]
        if missing or fingerprint(suite, self.layers) != self.fingerprint:
            found = f"lacks layer {missing[0]}" if missing else "has other weights"
            raise QwenScopeError(
                f"expected the suite {self.suite} that the features {', '.join(f.feature for f in self.features)} are of, found "
                f"{suite.name}, which {found}; name that suite, or find features of this one"
            )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises a QwenScopeError unless the limits were measured with this vocabulary, where that is known."""
        if self.tokenizer is not None and vocabulary_hash(tokenizer) != self.tokenizer:
            raise QwenScopeError(
                f"expected the tokenizer that the limits of {self.features[0].feature} were measured with, found another "
                f"vocabulary in {tokenizer.name_or_path or type(tokenizer).__name__}; use the model's own, or measure anew"
            )

    def save(self, path: str | Path) -> None:
        """Writes them as JSON, atomically."""
        value = {"format": FORMAT, **asdict(self)}
        with replacing(Path(path)) as temporary:
            temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Restraints:
        """Reads what `save` wrote.

        Raises:
            QwenScopeError: no such file, or another kind of file.
        """
        try:
            value: dict[str, Any] = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
            if value.pop("format") != FORMAT:
                raise ValueError("another format")
            features = tuple(Restrained(**feature) for feature in value.pop("features"))
            return Restraints(features, tuple(value.pop("tags")), **value)
        except QwenScopeError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise QwenScopeError(
                f"expected restraints that `qwen-scope finetune features` wrote at {path}, found none that read ({error}); check "
                "the path"
            ) from error

    def __str__(self) -> str:
        lines = []
        for each in self.features:
            limits = ", ".join(f"{tag} {limit:.3g}" for tag, limit in each.limits.items())
            known = "" if each.monolinguality is None else f", monolinguality {each.monolinguality:.3g}"
            lines.append(f"{each.feature} of {each.home or 'no tag'}{known}; at most {limits}")
        return "\n".join(lines)


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of a tokenizer's vocabulary without tokens that were added to it, such as those of a chat template."""
    of: Any = tokenizer
    added = set(of.get_added_vocab())
    vocabulary = sorted((number, token) for token, number in of.get_vocab().items() if token not in added)
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]
