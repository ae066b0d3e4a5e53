"""Trains SAEs: a corpus in, a suite with its report out, and the pieces that this is made of."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_scope.training.config import TrainConfig
    from qwen_scope.training.in_memory import train_sae
    from qwen_scope.training.run import train
    from qwen_scope.training.run_config import RunConfig
    from qwen_scope.training.trainer import SAETrainer

__all__ = ["RunConfig", "SAETrainer", "TrainConfig", "train", "train_sae"]

_HOMES = {
    "RunConfig": "run_config",
    "SAETrainer": "trainer",
    "TrainConfig": "config",
    "train": "run",
    "train_sae": "in_memory",
}


def __getattr__(name: str) -> Any:
    # The command line reads the configs alone, and must not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'qwen_scope.training' has no attribute {name!r}")
    return getattr(import_module(f"qwen_scope.training.{_HOMES[name]}"), name)
