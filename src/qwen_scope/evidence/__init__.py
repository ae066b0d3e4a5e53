"""Evidence that a steering does what it is for: sweeps over strengths beside controls, measured and judged.

`sweep` generates and judges; effects say what is measured; `SweepReport` holds figures, a page to read, a plot and a verdict,
which can be "no".
"""

from qwen_scope.evidence.config import SweepConfig
from qwen_scope.evidence.effects import Effect, Language, Reading, Regex, Scorer, Script, Words
from qwen_scope.evidence.report import SweepReport
from qwen_scope.evidence.sweep import sweep

__all__ = ["Effect", "Language", "Reading", "Regex", "Scorer", "Script", "SweepConfig", "SweepReport", "Words", "sweep"]
