"""Features written into the residual stream: which, how strongly, where, and what it did.

`Steering` and `Edit` say what is wanted; `changes` makes it ready for a suite; `Changes` writes it into batches; `steered`
holds it around other code; `trace` tells what happened.
"""

from qwen_scope.steering.edit import Edit
from qwen_scope.steering.recipe import Recipe
from qwen_scope.steering.steering import Steering
from qwen_scope.steering.trace import EditTrace, Trace
from qwen_scope.steering.where import Where

__all__ = ["Edit", "EditTrace", "Recipe", "Steering", "Trace", "Where"]
