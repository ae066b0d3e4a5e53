"""How a feature is named: `layer/feature`, such as `12/6159`. The one place that reads such a name."""

import re

from qwen_scope.errors import QwenScopeError

_NAME = re.compile(r"\s*(\d{1,6})\s*/\s*(\d{1,9})\s*", re.ASCII)


def parse_feature(name: str | tuple[int, int]) -> tuple[int, int]:
    """Layer and number of a feature out of its name; a pair of the two is taken as it is.

    Raises:
        QwenScopeError: what is no such name.
    """
    if isinstance(name, tuple) and len(name) == 2 and all(type(part) is int and part >= 0 for part in name):
        return name
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise QwenScopeError(
            f"expected a feature's name as layer/feature, such as 12/6159, found {name!r}; layers are counted from 0"
        )
    return int(match[1]), int(match[2])
