"""Text of models and users as Markdown and HTML show it, and figures as JSON takes them."""

import math
import re
from collections.abc import Mapping
from typing import Any


def plain(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    shown = "".join(character if character.isprintable() else " " for character in str(text))
    return re.sub(r"([\\`*_\[\]<>|&~$])", r"\\\1", " ".join(shown.split()))


def finite(value: Any) -> Any:
    """The same with null for every number that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
