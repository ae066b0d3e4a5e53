"""Makes the figures of docs/synthesis.md anew: does asking for a feature, or steering with it, cover what a set lacks?

python scripts/synthesis_evidence/run.py             # all, several minutes on 2 cores, then the table
python scripts/synthesis_evidence/run.py --table     # only the table, from the figures that are there

The targets are drawn at random among the bundled model's features of layer 15 that fire at 1 to 20 of 10 000 tokens of the
index's corpus and that none of the ten sample texts of `qwen-scope check` fires. Texts are kept in build/synthesis_evidence as
they come: Ctrl-C, and the same command goes on.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULTS = HERE / "results.json"
PAGE = ROOT / "docs" / "synthesis.md"
MARKED = re.compile(r"(<!-- synthesis -->\n).*?(<!-- /synthesis -->)", re.DOTALL)

LAYER = 15
TARGETS = 20
DENSITY = (1e-4, 2e-3)
DRAWN_WITH = 0
SEEDS = (0, 100)
OPTIONS: dict[str, Any] = {"attempts": 2, "examples": 4, "max_new_tokens": 40}
WAYS: dict[str, dict[str, Any]] = {
    "asked": {"method": "prompt"},
    "asked and steered": {"method": "steer", "strength": 1.0},
    "list of examples": {"method": "prompt", "asking": "list"},
    "list of examples and steered": {"method": "steer", "asking": "list", "strength": 1.0},
}


def main() -> None:
    """Makes texts and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "synthesis_evidence", help="where texts are kept")
    given = parser.parse_args()
    if not given.table:
        text = json.dumps(run(given.work), ensure_ascii=False, indent=1)
        # A line for each target, so that the file can be read and compared.
        RESULTS.write_text(re.sub(r"\n {4,}|\n {3}(?=[}\]])", " ", text) + "\n", encoding="utf-8")
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def targets(index: Any, silent: set[int], seed: int = DRAWN_WITH) -> list[int]:
    """Features by the rule above.

    Args:
        index: the bundled one.
        silent: features that no seed fires.
        seed: what is drawn follows from it.
    """
    import numpy as np

    density = index.table(LAYER, ["density"]).column("density").to_pylist()
    rare = [number for number in sorted(silent) if DENSITY[0] <= density[number] <= DENSITY[1]]
    return sorted(np.random.default_rng(seed).permutation(rare)[:TARGETS].tolist())


def run(work: Path) -> dict[str, Any]:
    """Everything there is to tell."""
    from qwen_scope.data.fired import fired
    from qwen_scope.data.synthesis import SynthesisConfig, synthesize
    from qwen_scope.evaluation.sample import SAMPLE_TEXTS
    from qwen_scope.index import FeatureIndex

    index = FeatureIndex.open()
    scope = index.scope
    counts = fired(scope, SAMPLE_TEXTS, LAYER, "any").counts
    names = [f"{LAYER}/{number}" for number in targets(index, set((counts == 0).nonzero()[0].tolist()))]
    made: dict[str, list[Any]] = {way: [] for way in WAYS}
    for seed in SEEDS:
        for way, options in WAYS.items():
            config = SynthesisConfig(**OPTIONS, seed=seed, **options)
            report = synthesize(scope, index, names, folder_of(work, way, seed), config, seeds=SAMPLE_TEXTS)
            made[way].append(report)
            print(f"{way}, seed {seed}\n{report}\n", flush=True)
    found: dict[str, Any] = {"targets": names, "seeds": list(SEEDS), "options": OPTIONS, "ways": {}}
    for way, reports in made.items():
        found["ways"][way] = {
            "options": WAYS[way],
            "runs": [of_run(report) for report in reports],
            "difference": over_runs(reports),
            "targets": {
                name: {
                    "explanation": reports[0].targets[at].explanation,
                    "after": sum(report.targets[at].after for report in reports),
                    "control": sum(report.targets[at].control for report in reports),
                }
                for at, name in enumerate(names)
            },
            "texts": samples(folder_of(work, way, SEEDS[0])),
        }
    return found


def folder_of(work: Path, way: str, seed: int) -> Path:
    """Where the texts of a run are kept."""
    return work / way.replace(" ", "-") / str(seed)


def of_run(report: Any) -> dict[str, Any]:
    """The figures of one run."""
    return {
        "before": report.before,
        "after": report.after,
        "after_any": report.after_any,
        "after_control": report.after_control,
        "texts": report.aimed.texts,
        "fired": report.aimed.fired,
        "rate": report.aimed.rate,
        "control_rate": report.control.rate,
        "kept": report.kept,
        "duplicates": report.duplicates,
        "tokens": report.aimed.tokens_read + report.aimed.tokens_written,
        "control_texts": report.control.texts,
        "control_tokens": report.control.tokens_read + report.control.tokens_written,
    }


def over_runs(reports: list[Any]) -> dict[str, float]:
    """What all texts cover less what the control covers, a mean over runs, with its 95 % interval over targets."""
    import numpy as np

    from qwen_scope.evidence.statistics import bootstrap

    values = [[t.by_any - t.control for t in report.targets] for report in reports]
    interval = bootstrap(np.array(values, dtype=np.float64).T, 2000, 0)
    return {"mean": round(interval.mean, 4), "low": round(interval.low, 4), "high": round(interval.high, 4)}


def samples(folder: Path) -> list[dict[str, str]]:
    """The first texts that were kept."""
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{"target": row["target"], "text": row["text"][:200]} for row in rows[:4]]


def with_table(text: str) -> str:
    """The text of the page with its table made anew from the results."""
    return MARKED.sub(lambda match: match[1] + table() + match[2], text)


def table() -> str:
    """The results as Markdown."""
    if not RESULTS.is_file():
        return ""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    head = (
        "how",
        "before",
        "after: texts that are kept",
        "all texts",
        "control: all texts",
        "all texts less control, 95 % interval",
        "a text fires its target",
        "one of the control fires a given target",
        "tokens, of the control",
    )
    lines = [head, ["---"] * len(head)]
    for way, of_way in found["ways"].items():
        runs, difference = of_way["runs"], of_way["difference"]
        lines.append(
            [
                way + (f", {of_way['options']['strength']:g}x" if "strength" in of_way["options"] else ""),
                mean([run["before"] for run in runs]),
                mean([run["after"] for run in runs]),
                mean([run["after_any"] for run in runs]),
                mean([run["after_control"] for run in runs]),
                f"{difference['mean']:.0%} ({difference['low']:.0%} to {difference['high']:.0%})",
                f"{mean([run['rate'] for run in runs])} ({sum(run['fired'] for run in runs)} of "
                f"{sum(run['texts'] for run in runs)})",
                f"{sum(run['control_rate'] for run in runs) / len(runs):.1%}",
                f"{sum(run['tokens'] for run in runs)}, {sum(run['control_tokens'] for run in runs)}",
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def mean(values: list[float]) -> str:
    """A mean share over runs."""
    return f"{sum(values) / len(values):.0%}"


if __name__ == "__main__":
    main()
