"""How well SAEs fit a model: fidelity figures and a self-check that names classic mistakes.

Takes a backbone and a suite, so that `Scope` can offer it as `scope.check()`.
"""

from qwen_scope.evaluation.check import CheckReport, LayerCheck, check
from qwen_scope.evaluation.density import Density
from qwen_scope.evaluation.fidelity import Fidelity, FidelityMeter
from qwen_scope.evaluation.sample import SAMPLE_TEXTS

__all__ = ["SAMPLE_TEXTS", "CheckReport", "Density", "Fidelity", "FidelityMeter", "LayerCheck", "check"]
