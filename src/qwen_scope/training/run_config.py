"""`RunConfig`: one training run, from corpus to report. Its fields and their docstrings make the command's options."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from qwen_scope.errors import QwenScopeError
from qwen_scope.training.config import TrainConfig

FREE_TO_CHANGE = ("save_minutes", "track", "cache", "push_to_hub")
"""What may differ between a run and its resumption: it changes nothing in the weights."""


@dataclass(frozen=True)
class RunConfig:
    """What is read, which layers are trained and how, beside the recipe of each SAE."""

    recipe: TrainConfig
    """How each layer's SAE is trained."""
    layers: tuple[int, ...]
    """Layers to train, counted from 0; one pass of the model feeds them all."""
    model: str | None = None
    """Language model: hub id or folder. Default: the bundled model."""
    tokens: int | None = None
    """Tokens to take from the corpus, those held out not counted. Default: all."""
    passes: int = 1
    """How often each residual is trained on, each time in another order; with `cache`, the model reads it only once."""
    context: int = 256
    """Most tokens the model sees at once. Longer documents are cut; no piece holds parts of two."""
    column: str | None = None
    """Column of the corpus that holds its text or chat messages. Default: `text`, `messages`, or the only one."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    subset: str | None = None
    """Configuration of a Hugging Face dataset, such as a language."""
    held_out: int = 16384
    """Tokens kept back for the report, from documents drawn at random; at most a tenth of all."""
    start: str | None = None
    """Suite to begin from, such as a published one that is to fit a fine-tuned model; its layers, width and k must match."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """What the language model computes in and residuals are held in; SAEs are trained in float32."""
    device: str | None = None
    """Where to compute, such as `cpu` or `cuda:1`. Default: the first GPU if there is one."""
    forward_tokens: int = 2048
    """Tokens in one pass of the model, padding included."""
    buffer_tokens: int = 131072
    """Residuals of each layer held in memory and shuffled together."""
    parallel: Literal["layers", "data", "features"] = "layers"
    """What processes started by torchrun share out beside the model's passes: whole layers, the tokens of each batch, or
    the features of each SAE (for those too wide for one device)."""
    cache: Path | None = None
    """Folder to keep residuals in, so that further runs on the same text need no model."""
    save_minutes: float = 5.0
    """How long until progress is saved again."""
    track: Literal["none", "trackio", "wandb"] = "none"
    """Also send figures to an experiment tracker, which must be installed."""
    name: str | None = None
    """What the suite is called. Default: SAE-Res-{model}-L0_{k}."""
    push_to_hub: str | None = None
    """Repository of the Hugging Face hub to upload the finished suite and its card to."""

    def __post_init__(self) -> None:
        if not self.layers or min(self.layers) < 0 or len(set(self.layers)) < len(self.layers):
            raise QwenScopeError(
                f"expected one or more different layers from 0, found {list(self.layers) or 'none'}; name some, such as "
                "--layers 15"
            )
        for name, least in (
            ("passes", 1),
            ("context", 2),
            ("held_out", 2),
            ("forward_tokens", 2),
            ("buffer_tokens", self.recipe.batch),
        ):
            if getattr(self, name) < least:
                raise QwenScopeError(
                    f"expected {name} of at least {least}, found {getattr(self, name)}; choose a larger number"
                )
        if self.tokens is not None and self.tokens < self.recipe.batch:
            raise QwenScopeError(
                f"expected at least one batch of {self.recipe.batch} tokens, found tokens = {self.tokens}; train on more"
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values for JSON."""
        return json.loads(json.dumps(asdict(self), default=str))


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between the `to_dict` of two runs so that one cannot go on as the other, as `name before, now`."""
    # Whose features are whose depends on how many share them.
    shared = ["processes"] if now["parallel"] == "features" else []
    names = [field.name for field in fields(RunConfig) if field.name not in ("recipe", *FREE_TO_CHANGE)]
    pairs = [(name, before.get(name), now.get(name)) for name in ("corpus", *shared, *names)]
    recipes = before.get("recipe", {}), now["recipe"]
    pairs += [(name, recipes[0].get(name), recipes[1][name]) for name in recipes[1]]
    return [f"{name} was {a!r} and is {b!r}" for name, a, b in pairs if a != b]
