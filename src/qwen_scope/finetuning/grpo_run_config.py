"""`GRPORun`: one run of reinforcement learning, from prompts to report. Its fields and docstrings make the command's options."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qwen_scope.errors import QwenScopeError

MOST_SEED = 2**32 - 1
"""What the random numbers of all libraries can follow from."""
FEWEST = 3
"""Rollouts of a group: with one of them steered, ordinary ones should also be compared with each other."""
FREE_TO_CHANGE = ("steps", "save_every")
"""What may differ between a run and its resumption. More steps go on from where the learning rate is then."""


@dataclass(frozen=True)
class GRPORun:
    """What is rewarded, how the rare negatives come about, and how the model is trained."""

    steering: str | None = None
    """Edits under which one rollout of each group is generated, such as '15/1037:0.5x'. Default: repetition features are looked
    for."""
    plain: bool = False
    """Steer none: TRL's GRPO, to compare with."""
    feature_layer: int = 15
    """Where repetition features are looked for."""
    features: int = 4
    """How many of them are steered together."""
    strength: float = 0.8
    """How much of each, in units of its highest activation."""
    off_policy: Literal["as_reported", "corrected", "excluded"] = "as_reported"
    """What is done about steered rollouts being off-policy: nothing, as in the report; the importance ratio to the steered
    policy; or left out of the loss, so that they only shift the mean and spread of their group."""
    rewards: tuple[str, ...] = ("repetition",)
    """What is rewarded: repetition, loop, length:64 or a function module:function, as TRL takes them."""
    reward_weights: tuple[float, ...] = ()
    """A weight for each reward. Default: 1."""
    loss: Literal["dapo", "grpo", "dr_grpo", "bnpo", "cispo"] = "dapo"
    """Which of TRL's losses."""
    steps: int = 60
    """Updates."""
    prompts_per_step: int = 4
    """Prompts of an update."""
    rollouts: int = 8
    """Rollouts of each prompt, the steered one included."""
    rows: int = 8
    """Rollouts in one forward and backward pass."""
    max_new_tokens: int = 64
    """Tokens of a rollout at most."""
    temperature: float = 1.0
    """Of rollouts."""
    learning_rate: float = 5e-5
    """Constant after the first steps."""
    beta: float = 0.0
    """Weight of the KL term to the model before training."""
    lora_rank: int = 16
    """Rank of the LoRA adapters on all linear layers of the decoder; 0 trains all weights."""
    gradient_checkpointing: bool = False
    """Recomputes activations in the backward pass, to save memory."""
    held_out: int = 16
    """Prompts kept back to evaluate on, drawn at random; at most half of all."""
    evaluate_every: int = 10
    """Steps between evaluations."""
    evaluate_samples: int = 4
    """Texts of each prompt kept back, always of the same seeds."""
    evaluate_temperature: float = 0.3
    """Of these; lower than that of rollouts, since that is where models loop."""
    evaluate_tokens: int = 128
    """Tokens of these at most."""
    save_every: int = 10
    """Steps between checkpoints, from which the same command goes on."""
    seed: int = 0
    """What everything random follows from."""

    def __post_init__(self) -> None:
        for name, least in (
            ("feature_layer", 0), ("features", 1), ("steps", 1), ("prompts_per_step", 1), ("rollouts", 2), ("rows", 1),
            ("max_new_tokens", 1), ("lora_rank", 0), ("held_out", 1), ("evaluate_every", 1), ("evaluate_samples", 1),
            ("evaluate_tokens", 1), ("save_every", 1), ("seed", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise QwenScopeError(
                    f"expected {name} of at least {least}, found {getattr(self, name)}; choose a larger number"
                )
        for name in ("temperature", "learning_rate", "strength"):
            if not 0 < getattr(self, name) < float("inf"):
                raise QwenScopeError(f"expected {name} above 0, found {getattr(self, name)}; choose such as 0.5")
        for name in ("beta", "evaluate_temperature"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise QwenScopeError(f"expected {name} of 0 or more, found {getattr(self, name)}; choose 0 or more")
        if self.seed > MOST_SEED:
            raise QwenScopeError(f"expected a seed of at most {MOST_SEED}, found {self.seed}; choose a smaller one")
        if self.rollouts < FEWEST and not self.plain:
            raise QwenScopeError(
                f"expected rollouts of at least {FEWEST}, one of them steered, found {self.rollouts}; raise them, or steer none "
                "(plain)"
            )
        if not all(map(math.isfinite, self.reward_weights)):
            raise QwenScopeError(f"expected finite reward_weights, found {self.reward_weights}; correct them")
        if self.plain and self.steering:
            raise QwenScopeError(f"expected a steering or plain, found both ({self.steering!r}); leave one of them out")
        if not self.rewards or len(self.reward_weights) not in (0, len(self.rewards)):
            raise QwenScopeError(
                f"expected rewards, and a weight for each or none, found {len(self.rewards)} rewards and "
                f"{len(self.reward_weights)} weights; give as many"
            )
        if self.prompts_per_step * self.rollouts % self.rows:
            raise QwenScopeError(
                f"expected rows that divide the {self.prompts_per_step * self.rollouts} rollouts of an update, found "
                f"{self.rows}; such as {self.rollouts}"
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values for JSON."""
        return json.loads(json.dumps(asdict(self)))


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between the descriptions of two runs so that one cannot go on as the other, as `name was …`."""
    return [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in dict.fromkeys((*before, *now))
        if name not in FREE_TO_CHANGE and before.get(name) != now.get(name)
    ]
