"""`SynthesisConfig`: how texts are made and what they may cost. Its fields and their docstrings make the command's options."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from qwen_scope.errors import QwenScopeError

Method = Literal["prompt", "steer", "endpoint"]
Asking = Literal["chat", "list"]


@dataclass(frozen=True)
class SynthesisConfig:
    """How texts are made that fire features, which of them are kept, and what they may cost."""

    method: Method = "prompt"
    """Who writes: the loaded model, asked (`prompt`); the same under steering with the feature besides (`steer`); or a model
    behind an endpoint."""
    kind: str = "a text of one to three sentences"
    """What is asked for, such as `a question that a user asks`."""
    asking: Asking = "chat"
    """How the loaded model is asked: in a `chat`, or, for models that take no instructions, by a `list` of examples that it goes
    on with."""
    examples: int = 5
    """Examples of a feature without a label that are shown to explain it."""
    attempts: int = 4
    """Attempts for each feature at most, each with a seed of its own."""
    per_target: int = 1
    """Texts wanted of each feature: no more attempts are made once there are so many."""
    strength: float = 1.0
    """How much of the feature is added where a text is generated, times its highest activation in the index; for `steer`."""
    max_new_tokens: int = 64
    """Tokens of a text at most, if the loaded model writes."""
    answer_tokens: int = 256
    """Tokens of an answer at most; and of whatever an endpoint writes, its thoughts included."""
    temperature: float = 0.8
    """0 takes the most likely token always; 1 draws from the model's own distribution."""
    top_p: float = 0.95
    """Draws from the most likely tokens that together have this probability; for the loaded model."""
    styles: tuple[str, ...] = ()
    """Styles in which each text that is kept is rewritten, such as `as a question`; a rewrite must fire the feature too."""
    answers: bool = False
    """Also have each text that is kept answered."""
    control: bool = True
    """Also spend as many tokens on texts about random other features, to compare with; budgets are for both together."""
    run: int = 3
    """Words in the runs by which texts are compared …"""
    alike: float = 0.5
    """… and share of runs in common (Jaccard) from which on a text is taken for a duplicate and left out."""
    tokens: int | None = None
    """Stop before more tokens than this have been read and written, prompts and a judge's included."""
    price_in: float | None = None
    """Price of a million tokens of prompts, of an endpoint, in any currency."""
    price_out: float | None = None
    """Price of a million tokens of answers, in the same."""
    budget: float | None = None
    """Stop before more money than this is spent; needs both prices."""
    seed: int = 0
    """What everything random follows from; attempt n, from 0, draws with the seed `seed` + n."""

    def __post_init__(self) -> None:
        for name, choices in (("method", get_args(Method)), ("asking", get_args(Asking))):
            if getattr(self, name) not in choices:
                raise QwenScopeError(
                    f"expected {name} to be one of {', '.join(choices)}, found {getattr(self, name)!r}; choose one of those"
                )
        for name in ("examples", "attempts", "per_target", "max_new_tokens", "answer_tokens", "run"):
            if getattr(self, name) < 1:
                raise QwenScopeError(
                    f"expected {name} of at least 1, found {getattr(self, name)}; choose a larger number"
                )
        if not 0 <= self.temperature <= 100:
            raise QwenScopeError(f"expected a temperature from 0 to 100, found {self.temperature}; such as 0.8")
        if not 0 < self.top_p <= 1:
            raise QwenScopeError(f"expected top_p above 0 up to 1, found {self.top_p}; such as 0.95")
        if not 0 <= self.seed <= 2**31:
            raise QwenScopeError(f"expected a seed from 0 to {2**31}, found {self.seed}; choose one of those")
        if not 0 < self.alike <= 1:
            raise QwenScopeError(f"expected a share above 0 up to 1 for alike, found {self.alike}; such as 0.5")
        if not math.isfinite(self.strength) or self.strength <= 0:
            raise QwenScopeError(f"expected a strength above 0, found {self.strength}; such as 0.5")
        if blank := [text for text in (self.kind, *self.styles) if not text.strip()]:
            raise QwenScopeError(f"expected a kind of text and styles in words, found {blank[0]!r}; say what is wanted")
        if len(set(self.styles)) < len(self.styles):
            raise QwenScopeError(f"expected different styles, found {', '.join(self.styles)}; name each once")
        self._check_list()
        self._check_budget()

    def _check_list(self) -> None:
        if self.asking == "chat":
            return
        if self.method == "endpoint":
            raise QwenScopeError("expected to ask an endpoint in a chat, found a list; leave --asking out")
        if self.styles or self.answers:
            raise QwenScopeError(
                "expected no styles and answers where a list is gone on with, found some; ask in a chat, or leave them out"
            )

    def _check_budget(self) -> None:
        for name in ("tokens", "price_in", "price_out", "budget"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise QwenScopeError(f"expected {name} of 0 or more, found {value}; give an amount")
        missing = [name for name in ("price_in", "price_out") if getattr(self, name) is None]
        if missing and (len(missing) == 1 or self.budget is not None):
            raise QwenScopeError(
                f"expected both prices, of prompts and of answers, found no {' and no '.join(missing)}; give them, or no budget"
            )
