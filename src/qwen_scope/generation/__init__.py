"""Text out: tokens drawn one after another, for many texts at once, each under its own steering.

`Batch` is the engine: `generate` and `stream` run it to the end, a server for as long as requests come.
"""

from qwen_scope.generation.result import Candidate, GeneratedToken, Generation
from qwen_scope.generation.sampling import Sampling

__all__ = ["Candidate", "GeneratedToken", "Generation", "Sampling"]
