"""`Purse`: tokens and money that may be spent. What is on its way is held back, so that no more is ever spent than there is."""

from __future__ import annotations

import math
from typing import NamedTuple

from qwen_scope.data.synthesis.config import SynthesisConfig


class Spent(NamedTuple):
    """Tokens that something took."""

    read: int = 0
    """Of prompts."""
    written: int = 0
    """Of what was written to them."""

    @property
    def tokens(self) -> int:
        """Both together."""
        return self.read + self.written

    def plus(self, other: Spent) -> Spent:
        """The sum of two."""
        return Spent(self.read + other.read, self.written + other.written)


class Purse:
    """What may be spent, and has been.

    Args:
        tokens: most tokens, read and written.
        money: most money.
        price_in: of a million tokens read.
        price_out: of a million written.
    """

    def __init__(
        self,
        tokens: float | int = math.inf,
        money: float | int = math.inf,
        price_in: float | int = 0.0,
        price_out: float | int = 0.0,
    ):
        self.tokens, self.money = tokens, money
        self.price_in, self.price_out = price_in, price_out
        self.spent = Spent()
        """What has been spent."""
        self._held = Spent()

    @staticmethod
    def of(config: SynthesisConfig) -> Purse:
        """The whole of what a config allows."""
        return Purse(
            math.inf if config.tokens is None else config.tokens,
            math.inf if config.budget is None else config.budget,
            config.price_in or 0.0,
            config.price_out or 0.0,
        )

    def part(self, share: float) -> Purse:
        """A share of what is left, as a purse of its own."""
        left = self.tokens - self.spent.tokens, self.money - self.cost(self.spent)
        return Purse(max(0.0, left[0]) * share, max(0.0, left[1]) * share, self.price_in, self.price_out)

    def cost(self, spent: Spent) -> float | int:
        """What tokens cost."""
        return (spent.read * self.price_in + spent.written * self.price_out) / 1e6

    def hold(self, most: Spent) -> bool:
        """Holds back what something may take at most; False, and nothing held, if there is not enough."""
        whole = self.spent.plus(self._held).plus(most)
        if whole.tokens > self.tokens or self.cost(whole) > self.money:
            return False
        self._held = self._held.plus(most)
        return True

    def settle(self, most: Spent, spent: Spent) -> None:
        """Lets go what was held back, and spends what it really took."""
        self._held = Spent(self._held.read - most.read, self._held.written - most.written)
        self.spend(spent)

    def spend(self, spent: Spent) -> None:
        """Notes what has been spent."""
        self.spent = self.spent.plus(spent)
