"""Makes the figures of docs/finetuning-rl.md anew: repetition over training, with and without steered negatives.

python scripts/grpo_evidence/run.py              # all runs, then the table and plot; an hour on 2 cores
python scripts/grpo_evidence/run.py --cost       # what a steered rollout costs, measured anew; a minute
python scripts/grpo_evidence/run.py --table      # only the table and plot, from the figures that are there

Each run keeps its checkpoints and report in build/grpo_evidence: after a stop or a kill the same command goes on.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from qwen_scope.evidence.statistics import bootstrap

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULT = HERE / "result.json"
PAGE = ROOT / "docs" / "finetuning-rl.md"
PLOT = ROOT / "docs" / "finetuning-rl" / "repeats.png"
MARKED = re.compile(r"(<!-- grpo -->\n).*?(<!-- /grpo -->)", re.DOTALL)
RESAMPLES = 5000
KEPT = ("step", "reward", "steered/reward", "ordinary/reward", "frac_reward_zero_std", "completions/mean_length")
"""Figures of each update that are kept."""
COLOURS = ("#D55E00", "#0072B2", "#888888", "#009E73", "#CC79A7")


def main() -> None:
    """Runs what is not there and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only write the table and plot")
    parser.add_argument("--cost", action="store_true", help="only measure the cost of steered rollouts anew")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "grpo_evidence", help="where runs are kept")
    given = parser.parse_args()
    specs = json.loads((HERE / "specs.json").read_text(encoding="utf-8"))
    found = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    if not (given.table or given.cost):
        found = {**run(specs, given.work), **{name: found[name] for name in ("cost",) if name in found}}
    if given.cost or (not given.table and "cost" not in found):
        found["cost"] = cost(specs, found["steering"])
    if not given.table:
        text = json.dumps(rounded(found), ensure_ascii=False, indent=1)
        RESULT.write_text(text + "\n", encoding="utf-8")
    draw(json.loads(RESULT.read_text(encoding="utf-8")), PLOT)
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def run(specs: dict[str, Any], work: Path) -> dict[str, Any]:
    """All runs, one after another, and what they share."""
    from qwen_scope import Scope
    from qwen_scope.finetuning.grpo_run import finetune_grpo
    from qwen_scope.finetuning.grpo_run_config import GRPORun

    found = steerings(specs, work)
    runs = []
    for seed in specs["seeds"]:
        for arm, about in specs["arms"].items():
            folder = work / f"{arm}-{seed}"
            if not (folder / "report.json").exists():
                kind = {"none": "", "features": found["steering"], "random": found["random"]}[about["steering"]]
                config = GRPORun(
                    **specs["config"],
                    rewards=tuple(about["rewards"]),
                    seed=seed,
                    plain=not kind,
                    steering=kind or None,
                )
                _begin_alike(folder, [work / f"{other}-{seed}" for other in specs["arms"]])
                # Training changes the model in place, so each run begins with a new one.
                finetune_grpo(Scope.from_pretrained(), specs["train"], folder, config, evaluate_on=specs["evaluate"])
            report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            runs.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "evaluations": report["evaluations"],
                    "history": [{name: row[name] for name in KEPT if name in row} for row in report["history"]],
                    "drift": report["drift"],
                }
            )
    return {"specs": specs, **found, "runs": runs}


def _begin_alike(folder: Path, others: list[Path]) -> None:
    """Takes the evaluation before training from another run of the seed: the same model, prompts and seeds of texts."""
    for path in (folder, *others):
        told = path / "evaluations.jsonl"
        line = told.read_text(encoding="utf-8").split("\n")[0] if told.exists() else ""
        if line:
            if path != folder:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / told.name).write_text(line + "\n", encoding="utf-8")
            return


def steerings(specs: dict[str, Any], work: Path) -> dict[str, Any]:
    """The repetition features, the steering they make in raw units, and one of random features of like norm and density."""
    path = work / "steerings.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    from qwen_scope import Sampling, Scope
    from qwen_scope.evidence.random_features import densities_of, random_steerings
    from qwen_scope.finetuning.repetition import looping_samples, repetition_features
    from qwen_scope.steering import Steering

    scope, config = Scope.from_pretrained(), specs["config"]
    # On the prompts that are trained on: those that are evaluated on are seen by nothing.
    sampling = Sampling(config["evaluate_tokens"], config["evaluate_temperature"], seed=0)
    samples = looping_samples(scope, specs["train"] * 4, sampling)
    features = repetition_features(scope, samples, specs["layer"], specs["features"])
    changes = scope.changes([f"{feature.name}:{specs['strength']}x" for feature in features])
    raw = [change.strength for change in changes]
    steering = Steering(tuple(replace(change.edit, strength=change.strength, unit="raw") for change in changes))
    (other,) = random_steerings(steering, raw, scope.suite, densities_of(scope)[0], 1, specs["random_seed"])
    found = {
        "samples": len(samples),
        "features": [feature.to_dict() for feature in features],
        "steering": str(steering),
        "random": str(other),
    }
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def cost(specs: dict[str, Any], steering: str, rounds: int = 5, tokens: int = 24) -> dict[str, Any]:
    """The processor time that a batch of rollouts takes with one row of each group steered, over the same with none, in turns.

    Processor time, since on a machine that others use too the clock tells little.
    """
    from tempfile import TemporaryDirectory

    from datasets import Dataset

    from qwen_scope import Scope
    from qwen_scope.finetuning.grpo_config import RareNegativesConfig
    from qwen_scope.finetuning.grpo_trainer import RareNegativesTrainer
    from qwen_scope.finetuning.rewards import reward_of

    scope, group = Scope.from_pretrained(), specs["config"]["rollouts"]
    with TemporaryDirectory() as folder:
        trainer = RareNegativesTrainer(
            model=scope.backbone.model,
            reward_funcs=reward_of("repetition"),
            args=RareNegativesConfig(
                output_dir=folder,
                steering=steering,
                num_generations=group,
                per_device_train_batch_size=2 * group,
                max_completion_length=tokens,
                # All texts of the same length: what is compared is the cost of tokens.
                generation_kwargs={"min_new_tokens": tokens},
                activation_checkpointing=False,
                bf16=False,
                use_cpu=scope.backbone.device.type == "cpu",
                report_to="none",
            ),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in specs["train"]]),
            processing_class=scope.backbone.tokenizer,
            suite=scope.suite,
        )
        scope.backbone.model.train()
        prompts = [prompt for prompt in specs["train"][:2] for _ in range(group)]
        ids, changes, seconds = trainer._tokenize_prompts(prompts)[0], trainer._changes, {True: [], False: []}
        for number in range(rounds + 1):
            for steered in (True, False) if number % 2 else (False, True):
                trainer._changes = changes if steered else []
                start = process_time()
                trainer._generate_single_turn(ids, None, {}, group)
                if number:  # the first warms up
                    seconds[steered].append(process_time() - start)
    ratios = np.asarray(seconds[True]) / np.asarray(seconds[False])
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return {"rows": len(prompts), "tokens": tokens, "rounds": rounds, "ratio": middle, "quartiles": [low, high]}


def rounded(value: Any) -> Any:
    """Floats to six digits: what is beyond differs between processors anyway."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def values(result: dict[str, Any], arm: str, which: int, what: str) -> np.ndarray:
    """Of an arm's evaluations the first (0), the last (-1) or another: (prompts, seeds * samples)."""
    runs = [run for run in result["runs"] if run["arm"] == arm]
    return np.concatenate([np.asarray(run["evaluations"][which][what], float) for run in runs], axis=1)


def with_table(text: str) -> str:
    """The text of the page with its table made anew from the result."""
    return MARKED.sub(lambda match: match[1] + table() + match[2], text)


def interval(sample: np.ndarray, scale: float = 100.0, sign: str = "") -> str:
    """A mean with its interval over prompts, in percent."""
    found = bootstrap(sample, RESAMPLES, 0)
    form = f"{{:{sign}.1f}}"
    return f"{form.format(scale * found.mean)} [{form.format(scale * found.low)}, {form.format(scale * found.high)}]"


def table() -> str:
    """The result as Markdown."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    arms = {arm: about["name"] for arm, about in result["specs"]["arms"].items()}
    head = (
        "%", "texts that loop: before", "after", "repeated 4-grams: before", "after", "each seed after", "tokens after",
        "perplexity before", "after",
    )  # fmt: skip
    rows = []
    for arm, name in arms.items():
        runs = [run for run in result["runs"] if run["arm"] == arm]
        rows.append(
            [
                name,
                interval(values(result, arm, 0, "loops")),
                interval(values(result, arm, -1, "loops")),
                interval(values(result, arm, 0, "repetition")),
                interval(values(result, arm, -1, "repetition")),
                ", ".join(f"{100 * np.mean(run['evaluations'][-1]['repetition']):.1f}" for run in runs),
                f"{values(result, arm, -1, 'tokens').mean():.0f}",
                *(f"{np.mean([run['evaluations'][at]['perplexity'] for run in runs]):.2f}" for at in (0, -1)),
            ]
        )
    text = "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows)) + "\n"
    more = [("after training, in percentage points", "texts that loop", "repeated 4-grams"), ["---"] * 3]
    for one, other in result["specs"]["compared"]:
        cells = [
            interval(values(result, one, -1, what) - values(result, other, -1, what), sign="+")
            for what in ("loops", "repetition")
        ]
        more.append((f"{arms[one]}, less {arms[other]}", *cells))
    text += "".join(f"| {' | '.join(line)} |\n" for line in more) + "\n"
    told: list[Sequence[str]] = [
        ("rollouts while training", "mean reward of ordinary ones", "of steered ones", "groups that tell nothing"),
        ["---"] * 4,
    ]
    for arm, name in arms.items():
        history = [row for run in result["runs"] if run["arm"] == arm for row in run["history"]]

        def mean(key: str, history: list[dict[str, float]] = history) -> str:
            return f"{np.mean([row[key] for row in history]):.3f}" if key in history[0] else "–"

        ordinary = mean("ordinary/reward") if "ordinary/reward" in history[0] else mean("reward")
        silent = f"{100 * np.mean([row['frac_reward_zero_std'] for row in history]):.0f} %"
        told.append((name, ordinary, mean("steered/reward"), silent))
    text += "".join(f"| {' | '.join(line)} |\n" for line in told) + "\n"
    cost = result["cost"]
    text += (
        f"Generating {cost['rows']} rollouts of {cost['tokens']} tokens with one of each group steered takes "
        f"{cost['ratio']:.3f} times the processor time of the same with none (median of {cost['rounds']} rounds in turns; half "
        f"of them from {cost['quartiles'][0]:.3f} to {cost['quartiles'][1]:.3f}).\n\n"
    )
    features = ", ".join(f"`{f['feature']}` ({f['first']:.2f} to {f['last']:.2f})" for f in result["features"])
    text += (
        f"Repetition features, found in {result['samples']} texts that loop, with their mean activation at first occurrences and "
        f"last repeats: {features}. Steering `{result['steering']}`; random `{result['random']}`.\n\n"
    )
    return text + "![repeat ratio and repeated 4-grams over the updates](finetuning-rl/repeats.png)\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """The curves of all arms as PNG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path.parent.mkdir(exist_ok=True)
    with rc_context({"text.usetex": False, "text.parse_math": False}):
        figure = Figure(figsize=(8.4, 3.2), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2)
        for panel, what, name in zip(
            panels, ("loops", "repetition"), ("texts that loop (%)", "repeated 4-grams (%)"), strict=True
        ):
            for (arm, about), colour in zip(result["specs"]["arms"].items(), COLOURS, strict=False):
                first = next(run for run in result["runs"] if run["arm"] == arm)
                steps = [found["step"] for found in first["evaluations"]]
                found = [bootstrap(values(result, arm, at, what), RESAMPLES, 0) for at in range(len(steps))]
                panel.fill_between(
                    steps, [100 * i.low for i in found], [100 * i.high for i in found], color=colour, alpha=0.10
                )
                panel.plot(
                    steps, [100 * i.mean for i in found], color=colour, marker="o", markersize=3, label=about["name"]
                )
            panel.set_xlabel("updates")
            panel.set_ylabel(name)
            panel.grid(alpha=0.25)
        panels[0].legend(frameon=False, fontsize=7)
        # No date and version, so that the same figures make the same file.
        figure.savefig(path, format="png", metadata={"Software": None})


if __name__ == "__main__":
    main()
