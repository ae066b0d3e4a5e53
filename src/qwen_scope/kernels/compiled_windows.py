"""A compiled loop over the tokens around places; see `compiled` for its manners."""

from typing import Any

from qwen_scope.kernels.compiled import _compiled


@_compiled
def around(
    indices: Any, values: Any, piece: Any, token: Any, feature: Any, before: int, found: Any
) -> None:  # pragma: no cover
    """`found[n]` are the values above 0 of a feature from `before` tokens before a token on, within its piece."""
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
