"""Sets of texts through features: what benchmarks share, what separates classes of texts, what data lacks.

`Footprint` is what a set fires; `coverage`, `overlap`, `compare` and `panel` reckon with footprints and never read a text.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_scope.data.footprint import Footprint

__all__ = ["Footprint"]


def __getattr__(name: str) -> Any:
    # torch takes over a second to import; the commands' options, which some of these modules hold, do without.
    if name != "Footprint":
        raise AttributeError(f"module 'qwen_scope.data' has no attribute {name!r}")
    from qwen_scope.data.footprint import Footprint

    return Footprint
