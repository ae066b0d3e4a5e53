"""What SASFT adds to a training step, on the bundled model.

`python benchmarks/sasft.py` takes some minutes and writes benchmarks/results/sasft.json. TRL's SFTTrainer and SASFTTrainer, in
turns, each with a copy of the model: loss and gradient of one batch. The optimiser's step, which both do alike, is left out,
which makes the share that SASFT adds larger than in training.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import commandline
import machine
from datasets import Dataset, disable_progress_bars
from timing import OURS, short, time_case
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from qwen_scope.backbone import Backbone
from qwen_scope.finetuning.restraints import Restrained, Restraints
from qwen_scope.finetuning.sasft_config import SASFTConfig
from qwen_scope.finetuning.sasft_trainer import SASFTTrainer
from qwen_scope.suite import Suite

FEATURES = ("15/1037", "15/905", "23/200", "23/4411")
"""Two in each of the last two layers of the suite, as SASFT has them; which ones does not matter."""
SENTENCE = "The river rises in the hills and runs past seven villages before it meets the sea. "


@dataclass(frozen=True)
class Settings:
    rows: int = 8
    """Samples of a batch."""
    tokens: int = 128
    """Of each sample."""
    rounds: int = 15


QUICK = Settings(rows=2, tokens=8, rounds=2)


def run(settings: Settings) -> dict[str, Any]:
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        calls = {OURS: step(settings, folder, True), "sft": step(settings, folder, False)}
        for call in calls.values():
            call()  # the memory of gradients, taken once
        timed = time_case(calls, 0, settings.rounds)
    ratios = [1 / timed["times_as_fast"]["sft"] - 1, *(1 / r - 1 for r in timed["times_as_fast_quartiles"]["sft"])]
    print({name: f"{seconds:.3f} s" for name, seconds in timed["seconds"].items()}, f"+{ratios[0]:.1%}")
    return {
        "benchmark": "sasft",
        "machine": machine.describe(),
        "parameters": {**asdict(settings), "features": FEATURES, "dtype": "float32"},
        **timed,
        "added": short(ratios[0]),
        "added_quartiles": sorted(short(ratio) for ratio in ratios[1:]),
    }


def step(settings: Settings, folder: str, ours: bool) -> Callable[[], object]:
    """Loss and gradient of always the same batch, by one of the two trainers."""
    backbone, suite = Backbone.from_pretrained(), Suite.from_pretrained()
    options: dict[str, Any] = {
        "output_dir": folder, "bf16": False, "use_cpu": True, "report_to": "none", "max_length": settings.tokens,
        "per_device_train_batch_size": settings.rows, "gradient_checkpointing": False,
    }  # fmt: skip
    rows = [{"text": SENTENCE * (1 + settings.tokens // 10), "language": "en"}] * settings.rows
    given: dict[str, Any] = {"train_dataset": Dataset.from_list(rows), "processing_class": backbone.tokenizer}
    if ours:
        features = [Restrained(name, "zh", {"en": 0.0}) for name in FEATURES]
        restraints = Restraints.of(features, suite, ["en", "zh"])
        trainer = SASFTTrainer(backbone.model, SASFTConfig(**options), restraints=restraints, suite=suite, **given)
    else:
        trainer = SFTTrainer(backbone.model, SFTConfig(**options), **given)
    batch = next(iter(trainer.get_train_dataloader()))
    tokens = (batch["labels"][:, 1:] != -100).sum()
    backbone.model.train()

    def call() -> None:
        backbone.model.zero_grad(set_to_none=False)
        trainer.compute_loss(backbone.model, dict(batch), num_items_in_batch=tokens).backward()

    return call


def main() -> None:
    args = commandline.parsed(commandline.parser(__doc__))
    commandline.write(run(QUICK if args.quick else Settings()), args, "sasft")


if __name__ == "__main__":
    main()
