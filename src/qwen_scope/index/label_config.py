"""`LabelConfig`: how labels are asked for and scored. Its fields and their docstrings make the command's options."""

from dataclasses import dataclass

from qwen_scope.errors import QwenScopeError


@dataclass(frozen=True)
class LabelConfig:
    """What is shown, what is asked, and what it may cost."""

    examples: int = 8
    """Examples of a feature shown to ask for its label: half of those the index has at most, the others are for the score."""
    held_out: int = 5
    """Texts where the feature fires, and as many where it does not, that its label is scored on."""
    score: bool = True
    """Score labels after asking for them."""
    again: bool = False
    """Also ask about features that this model has labelled with this prompt before, or that have a label by hand."""
    price_in: float | None = None
    """Price of a million tokens of prompts, in any currency."""
    price_out: float | None = None
    """Price of a million tokens of answers, in the same."""
    budget: float | None = None
    """Do not start if it may cost more than this; needs both prices."""
    seed: int = 0
    """Decides which texts labels are scored on and which label is another's control."""

    def __post_init__(self) -> None:
        for name, least in (("examples", 1), ("held_out", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise QwenScopeError(
                    f"expected {name} of at least {least}, found {getattr(self, name)}; choose a larger number"
                )
        for name in ("price_in", "price_out", "budget"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise QwenScopeError(f"expected {name} of 0 or more, found {value}; give an amount of money")
        missing = [name for name in ("price_in", "price_out") if getattr(self, name) is None]
        if missing and (len(missing) == 1 or self.budget is not None):
            raise QwenScopeError(
                f"expected both prices, of prompts and of answers, found no {' and no '.join(missing)}; give them, or no budget"
            )
