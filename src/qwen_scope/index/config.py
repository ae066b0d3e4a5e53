"""`HarvestConfig`: what a harvest reads and keeps. Its fields and their docstrings make the command's options."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

import tyro

from qwen_scope.errors import QwenScopeError

FREE_TO_CHANGE = ("engine", "workers", "save_minutes", "device", "kernel")
"""What may differ between a harvest and its resumption."""


@dataclass(frozen=True)
class HarvestConfig:
    """What is read through which SAEs, and what is kept of it."""

    model: str | None = None
    """Language model: hub id, folder, or `bundled`. Default: the suite's own backbone, or the bundled model."""
    suite: str | None = None
    """SAEs: hub id, catalogue name, folder or file. Default: the bundled suite."""
    layers: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--layer",), metavar="N…")] = ()
    """Layers to harvest, counted from 0, all in one pass of the model. Default: all of the suite."""
    tokens: int | None = None
    """Tokens to read. Default: the whole corpus."""
    context: int = 256
    """Most tokens the model sees at once. Longer documents are cut; no piece holds parts of two."""
    column: str | None = None
    """Column of the corpus that holds its text or chat messages. Default: `text`, `messages`, or the only one."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    subset: str | None = None
    """Configuration of a Hugging Face dataset, such as a language."""
    examples: int = 10
    """Strongest examples kept of each feature, and as many across the range of its activations."""
    before: int = 15
    """Tokens shown before the peak of an example."""
    after: int = 8
    """Tokens shown after it."""
    pairs: bool = False
    """Also keep every (token, feature) pair as Parquet: about 5 k bytes a token and layer."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the language model computes in; the SAEs always compute in float32."""
    device: str | None = None
    """Where to compute, such as `cpu` or `cuda:1`. Default: the first GPU if there is one."""
    kernel: Literal["reference", "cpu-bfloat16", "cpu-float32", "triton"] | None = None
    """Which path encodes. Default: the fastest one on this machine, measured once."""
    forward_tokens: int = 2048
    """Tokens in one pass of the model, padding included."""
    shard_tokens: int = 32768
    """Tokens in a shard: what one worker does at a time. Of a shard that is not done when a harvest is stopped or killed, all
    is read again."""
    save_minutes: float = 2.0
    """How long until finished shards are saved again; Ctrl-C saves them too."""
    engine: Literal["local", "ray"] = "local"
    """`local`: this process. `ray`: workers of a Ray cluster, the one that `ray start` or RAY_ADDRESS tells, else of this
    machine; all must see the folder."""
    workers: int = 2
    """Workers of the engine `ray`, each with a model of its own."""

    def __post_init__(self) -> None:
        for name, least in (
            ("context", 2),
            ("examples", 1),
            ("before", 0),
            ("after", 0),
            ("forward_tokens", 2),
            ("shard_tokens", 2),
            ("workers", 1),
            ("tokens", 2),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise QwenScopeError(f"expected {name} of at least {least}, found {value}; choose a larger number")
        if self.examples > 1000:
            raise QwenScopeError(f"expected at most 1000 examples of each feature, found {self.examples}; keep fewer")
        if self.before + self.after > 255:
            raise QwenScopeError(
                f"expected at most 255 tokens around a peak, found {self.before} before and {self.after} after; show fewer"
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values for JSON."""
        return json.loads(json.dumps(asdict(self)))


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between the options of two harvests so that one cannot go on as the other, as `name was … and is …`."""
    names = ["corpus", *(field.name for field in fields(HarvestConfig) if field.name not in FREE_TO_CHANGE)]
    if "fingerprint" in before and "fingerprint" in now:  # of the SAEs' weights, known once they are loaded
        names.append("fingerprint")
    pairs = [(name, before.get(name), now.get(name)) for name in names]
    return [f"{name} was {a!r} and is {b!r}" for name, a, b in pairs if a != b]
