"""The highest of many products, in blocks: what logit effects and neighbours are found with."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK_BYTES = 64 * 2**20
"""Of the products held at once."""
COLUMNS = 8192
"""Columns of such a block: enough that each block's few highest are quickly merged with those before."""


class Ranked(NamedTuple):
    """For each row the numbers of a few columns, and their values, best first."""

    numbers: Int[np.ndarray, "rows count"]
    """int32; -1 where a row has fewer."""
    values: Float[np.ndarray, "rows count"]
    """float32; 0 where a row has fewer."""


class Highest:
    """The highest scores of each row, collected over blocks whose columns come in order; of equal ones the first.

    Args:
        rows: how many rows there are.
        count: how many scores of each are kept.
        device: where the blocks are.
    """

    def __init__(self, rows: int, count: int, device: torch.device):
        self._values = torch.full((rows, count), -torch.inf, device=device)
        self._numbers = torch.full((rows, count), -1, device=device)

    def add(self, scores: Float[Tensor, "rows columns"], rows: slice, first_column: int) -> None:
        """Takes in a block: scores of some rows, in the columns from the first one on."""
        values, numbers = _first_highest(scores, min(self._values.shape[1], scores.shape[1]))
        values = torch.cat([self._values[rows], values], dim=1)
        numbers = torch.cat([self._numbers[rows], numbers + first_column], dim=1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        count = self._values.shape[1]
        self._values[rows] = values[:, :count]
        self._numbers[rows] = numbers.gather(1, order[:, :count])

    def result(self) -> Ranked:
        """What was found; a score of minus infinity is none."""
        none = self._values.isneginf()
        numbers, values = self._numbers.masked_fill(none, -1), self._values.masked_fill(none, 0)
        return Ranked(numbers.int().cpu().numpy(), values.cpu().numpy())


def products(
    rows: Float[Tensor, "rows width"], table: Float[Tensor, "columns width"]
) -> Iterator[tuple[slice, int, Float[Tensor, "some others"]]]:
    """`rows @ table.T` in blocks: which rows, the first column, and the products, which may be overwritten.

    The table can have another dtype than the rows: a part of it at a time becomes theirs.
    """
    height = max(1, BLOCK_BYTES // (4 * COLUMNS))
    for first in range(0, len(table), COLUMNS):
        part = table[first : first + COLUMNS].to(rows.dtype)
        for start in range(0, len(rows), height):
            some = slice(start, min(start + height, len(rows)))
            yield some, first, rows[some] @ part.T


def _first_highest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest scores of each row and their columns: highest first, of equal ones the first."""
    values, columns = scores.topk(min(count + 1, scores.shape[1]), dim=1)
    # topk takes any of several equal ones: it matters only where the last one taken and the first one left are equal.
    cut = (values[:, count:] == values[:, count - 1 : count]).any(dim=1)
    values, columns = values[:, :count], columns[:, :count]
    if cut.any():
        exact, order = scores[cut].sort(dim=1, descending=True, stable=True)
        values[cut], columns[cut] = exact[:, :count], order[:, :count]
    columns, by_column = columns.sort(dim=1)
    values, by_value = values.gather(1, by_column).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, by_value)
