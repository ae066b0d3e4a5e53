"""Sets of texts through features: what benchmarks share, what separates classes of texts, what data lacks.

`Footprint` is what a set fires; `coverage`, `overlap`, `compare` and `panel` reckon with footprints and never read a text.
"""

from qwen_scope.data.footprint import Footprint

__all__ = ["Footprint"]
