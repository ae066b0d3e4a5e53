"""A feature's activations at the tokens around a place."""

import numpy as np
from jaxtyping import Float, Int, Integer

from qwen_scope.kernels.compiled_windows import around


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
    around(indices, values, piece, token, feature, before, found)
    return found
