"""`RareNegativesConfig`: TRL's `GRPOConfig` with a steering, and what is done about its rollouts being off-policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from trl.trainer.grpo_config import GRPOConfig

from qwen_scope.errors import QwenScopeError
from qwen_scope.finetuning.grpo_run_config import FEWEST
from qwen_scope.finetuning.old_names import old_names_allowed
from qwen_scope.steering import Steering

OffPolicy = Literal["as_reported", "corrected", "excluded"]
"""What is done about the steered rollout being drawn from another policy than the one trained. See `RareNegativesTrainer`."""

LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo")
"""TRL's losses that are defined here for steered rollouts: those of a ratio for each token or rollout."""
GENERATION = {"min_new_tokens", "suppress_tokens", "bad_words_ids"}
"""TRL's further `generation_kwargs` that leave one token drawn in one pass for each row."""


@dataclass
class RareNegativesConfig(GRPOConfig):
    """Options of `RareNegativesTrainer`: all of TRL's `GRPOConfig` that it understands, and two of its own.

    Raises:
        QwenScopeError: an option of TRL that does not go with steered rollouts; one sentence says which and why.
    """

    steering: str | None = field(
        default=None,
        metadata={
            "help": "Edits under which one rollout of each group is generated, such as '15/1037:0.5x 15/905:0.5x'. None steers "
            "none, which is plain GRPO."
        },
    )
    off_policy: str = field(
        default="as_reported",
        metadata={"help": f"What is done about steered rollouts being off-policy: {', '.join(get_args(OffPolicy))}."},
    )

    def __post_init__(self) -> None:
        if self.off_policy not in get_args(OffPolicy):
            raise QwenScopeError(
                f"expected off_policy as one of {', '.join(get_args(OffPolicy))}, found {self.off_policy!r}; choose one"
            )
        # Before TRL's own checks, which may be about options that are refused anyway.
        if Steering.of(self.steering):
            for found, expected in _refused(self):
                raise QwenScopeError(
                    f"expected {expected} with steered rollouts, found {found}; change it, or steer none"
                )
        with old_names_allowed():
            super().__post_init__()


def _refused(config: RareNegativesConfig) -> list[tuple[str, str]]:
    """What was found and what was expected, for each of TRL's options that steered rollouts do not go with."""
    corrected = config.off_policy == "corrected"
    further: dict[str, Any] = config.generation_kwargs if isinstance(config.generation_kwargs, dict) else {}
    if config.generation_kwargs is not None and not isinstance(config.generation_kwargs, dict):
        further = {"text": config.generation_kwargs}
    strange = sorted(set(further) - GENERATION)
    shaped = [
        f"{name} = {value}"
        for name, value, plain in (
            ("top_p", config.top_p, 1.0),
            ("top_k", config.top_k, 0),
            ("min_p", config.min_p, None),
            ("repetition_penalty", config.repetition_penalty, 1.0),
            ("generation_kwargs", config.generation_kwargs, None),
        )
        if value != plain
    ]
    checks = (
        (
            config.use_vllm,
            "use_vllm, whose engine has a copy of the model that is not steered",
            "generation by the model that is trained",
        ),
        (
            config.use_transformers_continuous_batching or config.use_transformers_paged,
            "transformers' continuous batching, which packs rows so that none can be steered alone",
            "generation row by row",
        ),
        (
            config.use_liger_kernel,
            "use_liger_kernel, which replaces the model's forward passes",
            "the model's own forward passes",
        ),
        (
            config.torch_compile,
            "torch_compile, whose graphs do not call what steers",
            "a model that is not compiled",
        ),
        (
            config.cache_implementation not in (None, "dynamic"),
            f"cache_implementation = {config.cache_implementation!r}",
            "a dynamic cache, which tells how much was read",
        ),
        (
            bool(strange),
            f"{', '.join(strange[:3])} in generation_kwargs",
            f"generation_kwargs among {', '.join(sorted(GENERATION))}",
        ),
        (
            config.loss_type not in LOSSES,
            f"loss_type = {config.loss_type!r}",
            f"loss_type among {', '.join(LOSSES)}",
        ),
        (
            config.num_generations is not None and config.num_generations < FEWEST,
            f"num_generations = {config.num_generations}",
            f"num_generations of at least {FEWEST}, one of them steered,",
        ),
        (
            config.off_policy_mask_threshold is not None,
            f"off_policy_mask_threshold = {config.off_policy_mask_threshold}, which would drop what the policy would not have "
            "said",
            "no such threshold",
        ),
        (
            config.mask_truncated_completions and config.off_policy != "excluded",
            "mask_truncated_completions, which would drop rollouts that do not end",
            "all rollouts in the loss",
        ),
        (
            corrected and bool(shaped),
            f"{', '.join(shaped)}, under which the probabilities of what was drawn are others",
            "tokens drawn from the model's own distribution where off_policy is corrected,",
        ),
    )
    return [(found, expected) for refused, found, expected in checks if refused]
