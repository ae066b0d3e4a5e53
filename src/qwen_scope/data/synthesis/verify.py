"""Whether a text really fires what it was written for, read as anybody would read it later."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_scope.data.fired import read
from qwen_scope.data.synthesis.kept import Reading
from qwen_scope.errors import QwenScopeError
from qwen_scope.scope import Scope


def reading(scope: Scope, layer: int, text: str, own: int, targets: Sequence[int]) -> Reading:
    """What a text fires, read alone: without the prompt that asked for it, and without steering.

    A feature counts as fired where its value is above 0 at any token but the first and norm outliers (the report, section 5).

    Args:
        own: the feature that the text is about.
        targets: the features that it may fire besides.

    Returns:
        Its reading; nothing is fired by a text that is blank, or longer than the model's context.
    """
    if not text.strip():
        return Reading(0.0, [])
    try:
        found = read(scope, [text], [layer], "any", progress=False).fired[layer]
    except QwenScopeError:
        # An endpoint may write more than this model can read.
        return Reading(0.0, [])
    values = dict(zip(found.features.tolist(), found.values.tolist(), strict=True))
    return Reading(float(values.get(own, 0.0)), [number for number in targets if number in values])
