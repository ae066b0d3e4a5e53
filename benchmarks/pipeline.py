"""A whole training run against its two halves: the model's pass alone and training alone on residuals in memory.

`python benchmarks/pipeline.py --folder FOLDER` takes some minutes and writes benchmarks/results/pipeline.json. The text is
the Python standard library of the interpreter that runs it; the model is the bundled one. The halves take turns on the
same cores, so a run can at best take the sum of their times; what it takes beyond is what the pipeline itself costs.
"""

import shutil
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import commandline
import machine
import torch
from timing import short

from qwen_scope.stopping import Stop
from qwen_scope.training.blocks import kept_rows, read_block
from qwen_scope.training.config import TrainConfig
from qwen_scope.training.group import Group
from qwen_scope.training.plan import Plan
from qwen_scope.training.run import Run
from qwen_scope.training.run_config import RunConfig
from qwen_scope.training.trainer import SAETrainer


@dataclass(frozen=True)
class Settings:
    layers: tuple[int, ...] = (15,)
    d_sae: int = 9216
    k: int = 50
    tokens: int = 100_000
    block: int = 32768
    batch: int = 2048
    rounds: int = 3


QUICK = Settings((0,), d_sae=128, k=4, tokens=1500, block=1024, batch=256, rounds=1)


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    rounds = [one_round(settings, folder) for _ in range(settings.rounds)]
    found = {name: short(median(round[name] for round in rounds)) for name in rounds[0]}
    found["share_of_the_slower_half"] = short(median(r["together"] / min(r["reading"], r["training"]) for r in rounds))
    print(found)
    return {
        "benchmark": "pipeline",
        "machine": machine.describe(),
        "parameters": {**asdict(settings), "model": "the bundled one, bfloat16, context 256"},
        "tokens_per_second": found,
    }


def one_round(settings: Settings, folder: Path) -> dict[str, float]:
    """Tokens a second of each half and of both together."""
    work = folder / "pipeline"
    config = RunConfig(
        TrainConfig(settings.d_sae, settings.k, batch=settings.batch),
        settings.layers,
        tokens=settings.tokens,
        buffer_tokens=settings.block,
    )
    plan = Plan.of(sysconfig.get_path("stdlib"), work, config, Group())
    tokens = plan.steps * settings.batch
    start = time.perf_counter()
    blocks = [
        read_block(plan.backbone, plan.pieces, plan.blocks.of(n), settings.layers) for n in range(len(plan.blocks))
    ]
    read = time.perf_counter() - start
    rows = {layer: torch.cat([block[layer][kept_rows(block[layer])] for block in blocks]) for layer in settings.layers}
    start = time.perf_counter()
    for layer in settings.layers:
        trainer = SAETrainer(config.recipe, rows[layer][:16384].float(), plan.steps)
        for batch in rows[layer].split(settings.batch)[: plan.steps]:
            trainer.step(batch)
    trained = time.perf_counter() - start
    start = time.perf_counter()
    Run(plan, work, Group(), Stop()).train()
    together = time.perf_counter() - start
    shutil.rmtree(work)
    return {"reading": tokens / read, "training": tokens / trained, "together": tokens / together}


def main() -> None:
    options = commandline.parser(__doc__)
    options.add_argument("--folder", type=Path, default=Path("build"), help="for the tokenized text")
    args = commandline.parsed(options)
    commandline.write(run(QUICK if args.quick else Settings(), args.folder), args, "pipeline")


if __name__ == "__main__":
    main()
