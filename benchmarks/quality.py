"""Which trainer gives the better SAE, and how fast: ours, sparsify's and sae-lens', at equal tokens, data, width and k.

`python benchmarks/quality.py CORPUS.jsonl --folder FOLDER` takes over an hour and writes
benchmarks/results/quality.json; with `--quick` it trains on random numbers for some seconds, to see whether it runs.

CORPUS.jsonl has one object with a `text` a line; the committed figures are of scripts/bundled_suite's (`fetch_corpus.py`,
then `mix.py`). Residuals (about 3 GB) and finished runs are kept in FOLDER, so that a killed benchmark goes on where it was;
another corpus, or another version of the code, needs another folder.

Each trains in a process of its own, one after the other, by its own trainer: first with some learning rates on few tokens,
then with the best of them on all. At the end come short runs in turns, which is what speeds are compared by.
"""

import json
import tempfile
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import commandline
import fresh
import machine
import torch
from contenders import OWN, Sizes, missing_peers, peers
from quality_data import Data, held_out_tokens, read_corpus, training_tokens, write_random
from quality_trainers import RECIPES, SAMPLE, Batches, Trained
from timing import OURS, quartiles, short

from qwen_scope.evaluation.fidelity import fvu
from qwen_scope.files import replacing
from qwen_scope.training.normalise import Normalisation

MEASURED_AT_ONCE = 2048


@dataclass(frozen=True)
class Plan:
    sizes: Sizes
    data: Data
    batch: int
    rates: int
    """How many of each contender's learning rates are tried."""
    sweep_steps: int
    """Steps with each of them."""
    steps: int
    """Steps with the best of them."""
    lately: int
    """A feature that has not fired over so many training tokens, at the end, is counted."""
    window: int
    """Steps that one measurement of speed is over."""
    warm_up: int
    """Steps before the first window."""
    timed_windows: int
    """Windows of each in a round of the comparison of speeds."""
    rounds: int


FULL = Plan(
    Sizes(576, 9216, 50),
    Data(layer=15, context=256, corpus_tokens=5_000_000, blocks=16, buffer_tokens=131072, held_out=65536),
    batch=2048,
    rates=4,
    sweep_steps=146,
    steps=976,
    lately=200_000,
    window=8,
    warm_up=4,
    timed_windows=3,
    rounds=3,
)
QUICK = Plan(
    Sizes(64, 256, 8),
    Data(layer=0, context=1, corpus_tokens=0, blocks=2, buffer_tokens=1024, held_out=512),
    batch=128,
    rates=1,
    sweep_steps=6,
    steps=12,
    lately=512,
    window=2,
    warm_up=1,
    timed_windows=2,
    rounds=2,
)


def run(plan: Plan, folder: Path) -> dict[str, Any]:
    labels = {OURS: OWN[OURS]} | peers()
    recipes = {name: recipe for name, recipe in RECIPES.items() if recipe.package in labels}
    sweep = [
        kept_run(plan, folder, name, rate, plan.sweep_steps)
        for name, recipe in recipes.items()
        for rate in recipe.rates[: plan.rates]
    ]
    best = {name: min((r for r in sweep if r["contender"] == name), key=lambda r: r["fvu"]) for name in recipes}
    return {
        "benchmark": "quality",
        "machine": machine.describe(),
        "parameters": asdict(plan) | {"dtype": "float32", "residuals": "stored in bfloat16"},
        "contenders": {
            name: {
                "label": f"{labels[recipe.package]}{recipe.label}",
                "rates": recipe.rates,
                "default_rate": recipe.default_rate,
                "normalised_before": recipe.normalised,
                "training": recipe.training,
            }
            for name, recipe in recipes.items()
        },
        "not_installed": missing_peers(),
        "sweep": sweep,
        "results": [kept_run(plan, folder, name, best[name]["learning_rate"], plan.steps) for name in recipes],
        "speed": compared_speeds(plan, folder, {name: best[name]["learning_rate"] for name in recipes}),
    }


def kept_run(plan: Plan, folder: Path, name: str, rate: float, steps: int) -> dict[str, Any]:
    """A run in a fresh process, unless it was made before."""
    path = folder / "runs" / f"{name}-{steps}-steps-{rate:g}.json"
    if not path.exists():
        found = fresh.call(trained, name, str(folder), asdict(plan), rate, steps)
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(found))
    found = {"contender": name, "learning_rate": rate, "steps": steps, **json.loads(path.read_text())}
    print(found, flush=True)
    return found


def trained(name: str, folder: str, planned: dict[str, Any], rate: float, steps: int) -> dict[str, float]:
    """Trains and measures; for a fresh process."""
    plan = planned_again(planned)
    batches = batches_for(name, plan, folder, steps)
    made = RECIPES[name].train(batches, plan.sizes, rate)
    return quality(plan, made, batches.seen(held_out_tokens(plan.data, Path(folder))))


def batches_for(name: str, plan: Plan, folder: str, steps: int) -> Batches:
    tokens = training_tokens(plan.data, Path(folder), steps * plan.batch)
    normalise = Normalisation.of(tokens[:SAMPLE], "mean") if RECIPES[name].normalised else None
    return Batches(tokens, plan.batch, normalise)


@torch.no_grad()
def quality(plan: Plan, made: Trained, x: torch.Tensor) -> dict[str, float]:
    """Figures on held-out tokens, and of the features that did not fire at the end of training."""
    fired, reconstructed = torch.zeros(plan.sizes.d_sae, dtype=torch.bool), []
    for part in x.split(MEASURED_AT_ONCE):
        x_hat, features = made(part)
        reconstructed.append(x_hat)
        fired[features] = True
    return {
        "fvu": short(fvu(x, torch.cat(reconstructed))),
        "never_fired": short(float((~fired).float().mean())),
        "unfired_lately": short(float((made.unfired_for >= plan.lately).float().mean())),
    }


def speeds_of(plan: Plan, moments: list[float]) -> list[float]:
    """Tokens per second of each window of steps, from the moments at which batches were asked for."""
    ends = moments[plan.warm_up :: plan.window]
    return [plan.window * plan.batch / (end - start) for start, end in pairwise(ends)]


def compared_speeds(plan: Plan, folder: Path, rates: dict[str, float]) -> dict[str, Any]:
    """Short runs in turns: each contender once a round, every other round in reverse order."""
    rounds: list[dict[str, float]] = []
    for number in range(plan.rounds):
        order = list(rates) if number % 2 == 0 else list(rates)[::-1]
        rounds.append({name: fresh.call(speed, name, str(folder), asdict(plan), rates[name]) for name in order})
        print("tokens per second", rounds[-1], flush=True)
    ratios = {name: [r[OURS] / r[name] for r in rounds] for name in rates if name != OURS}
    return {
        "rounds": plan.rounds,
        "tokens_per_second": {name: short(median(r[name] for r in rounds)) for name in rates},
        "times_as_fast": {name: short(median(values)) for name, values in ratios.items()},
        "times_as_fast_quartiles": {name: quartiles(values) for name, values in ratios.items()},
    }


def speed(name: str, folder: str, planned: dict[str, Any], rate: float) -> float:
    """Tokens per second, the median of a short run's windows; for a fresh process."""
    plan = planned_again(planned)
    steps = plan.warm_up + plan.timed_windows * plan.window + 1
    batches = batches_for(name, plan, folder, steps)
    RECIPES[name].train(batches, plan.sizes, rate)
    return median(speeds_of(plan, batches.moments))


def planned_again(planned: dict[str, Any]) -> Plan:
    return Plan(**{**planned, "sizes": Sizes(**planned["sizes"]), "data": Data(**planned["data"])})


def main() -> None:
    options = commandline.parser(__doc__)
    options.add_argument("corpus", type=Path, nargs="?", help="JSONL with a `text` a line; not needed with --quick")
    options.add_argument("--folder", type=Path, help="where residuals and runs are kept; not needed with --quick")
    options.add_argument(
        "--steps", type=int, default=FULL.steps, help="with the best learning rate; default: %(default)s"
    )
    args = commandline.parsed(options)
    if args.quick:
        with tempfile.TemporaryDirectory() as folder:
            write_random(QUICK.data, QUICK.sizes, Path(folder))
            found = run(QUICK, Path(folder))
    elif args.corpus is None or args.folder is None:
        options.error("expected a corpus and --folder, found only one of them or none; give both, or --quick")
    else:
        folder = args.folder / "quality"
        read_corpus(FULL.data, args.corpus, folder)
        found = run(replace(FULL, steps=args.steps), folder)
    commandline.write(found, args, "quality")


if __name__ == "__main__":
    main()
