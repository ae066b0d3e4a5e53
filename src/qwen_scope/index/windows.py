"""A feature's activations at the tokens around a place."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer

from qwen_scope.kernels.compiled import _compiled


@_compiled
def _around(
    indices: Any, values: Any, piece: Any, token: Any, feature: Any, before: int, found: Any
) -> None:  # pragma: no cover
    width, k = found.shape[1], indices.shape[1]
    for n in range(len(token)):
        for at in range(width):
            there = token[n] + at - before
            if there < 0 or there >= len(piece) or piece[there] != piece[token[n]]:
                continue
            for column in range(k):
                if indices[there, column] == feature[n] and values[there, column] > 0:
                    found[n, at] = values[there, column]
                    break


def activations_around(
    indices: Integer[np.ndarray, "tokens k"],
    values: Float[np.ndarray, "tokens k"],
    piece: Int[np.ndarray, " tokens"],
    token: Int[np.ndarray, " n"],
    feature: Int[np.ndarray, " n"],
    before: int,
    after: int,
) -> Float[np.ndarray, "n window"]:
    """For each token and feature, the feature's activations from `before` tokens before to `after` tokens after.

    0 where it does not fire, and beyond the token's piece. Tokens of a piece lie together, in their order.
    """
    found = np.zeros((len(token), before + 1 + after), np.float32)
    _around(indices, values, piece, token, feature, before, found)
    return found
