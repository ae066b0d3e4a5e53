"""Features in training: losses and rollouts that change a model for good, as trainers of TRL's kind.

Needs `pip install 'qwen-scope[finetune]'`; the configs of the command line and the measures do not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_scope.finetuning.drift import drift
    from qwen_scope.finetuning.grpo_config import RareNegativesConfig
    from qwen_scope.finetuning.grpo_run import finetune_grpo
    from qwen_scope.finetuning.grpo_run_config import GRPORun
    from qwen_scope.finetuning.grpo_trainer import RareNegativesTrainer
    from qwen_scope.finetuning.repeats import loop_of, repeat_ratio
    from qwen_scope.finetuning.repetition import looping_samples, repetition_features
    from qwen_scope.finetuning.restraints import Restrained, Restraints
    from qwen_scope.finetuning.sasft_config import SASFTConfig
    from qwen_scope.finetuning.sasft_run import finetune_sasft
    from qwen_scope.finetuning.sasft_run_config import SASFTRun
    from qwen_scope.finetuning.sasft_trainer import SASFTTrainer
    from qwen_scope.finetuning.specific import specific_features
    from qwen_scope.finetuning.switching import switch_ratio

__all__ = [
    "GRPORun",
    "RareNegativesConfig",
    "RareNegativesTrainer",
    "Restrained",
    "Restraints",
    "SASFTConfig",
    "SASFTRun",
    "SASFTTrainer",
    "drift",
    "finetune_grpo",
    "finetune_sasft",
    "loop_of",
    "looping_samples",
    "repeat_ratio",
    "repetition_features",
    "specific_features",
    "switch_ratio",
]

_HOMES = {
    "GRPORun": "grpo_run_config",
    "RareNegativesConfig": "grpo_config",
    "RareNegativesTrainer": "grpo_trainer",
    "Restrained": "restraints",
    "Restraints": "restraints",
    "SASFTConfig": "sasft_config",
    "SASFTRun": "sasft_run_config",
    "SASFTTrainer": "sasft_trainer",
    "drift": "drift",
    "finetune_grpo": "grpo_run",
    "finetune_sasft": "sasft_run",
    "loop_of": "repeats",
    "looping_samples": "repetition",
    "repeat_ratio": "repeats",
    "repetition_features": "repetition",
    "specific_features": "specific",
    "switch_ratio": "switching",
}


def __getattr__(name: str) -> Any:
    # TRL takes seconds to import, and the command line reads the configs alone.
    if name not in _HOMES:
        raise AttributeError(f"module 'qwen_scope.finetuning' has no attribute {name!r}")
    return getattr(import_module(f"qwen_scope.finetuning.{_HOMES[name]}"), name)
