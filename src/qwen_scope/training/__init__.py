"""Trains SAEs: residuals of a corpus on disk, one differentiable pass, and the recipe around it."""

from qwen_scope.training.activations import harvest_residuals, load_residuals, shards
from qwen_scope.training.trainer import SAETrainer, TrainConfig, train_sae

__all__ = ["SAETrainer", "TrainConfig", "harvest_residuals", "load_residuals", "shards", "train_sae"]
