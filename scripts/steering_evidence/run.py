"""Makes the figures of docs/steering-evidence.md anew: sweeps of the bundled model's features, one JSON and plot for each.

python scripts/steering_evidence/run.py               # all sweeps of specs.json, then the table; several minutes each
python scripts/steering_evidence/run.py french        # only some
python scripts/steering_evidence/run.py --table       # only the table, from the figures that are there

Texts are kept in build/steering_evidence as they come: Ctrl-C, and the same command goes on.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULTS = HERE / "results"
PAGE = ROOT / "docs" / "steering-evidence.md"
PLOTS = ROOT / "docs" / "steering-evidence"
MARKED = re.compile(r"(<!-- steering -->\n).*?(<!-- /steering -->)", re.DOTALL)


def main() -> None:
    """Runs sweeps and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="which sweeps; all unless told")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "steering_evidence", help="where texts are kept")
    given = parser.parse_args()
    specs = json.loads((HERE / "specs.json").read_text(encoding="utf-8"))
    if unknown := set(given.names) - set(specs["sweeps"]):
        sys.exit(f"expected names of {', '.join(specs['sweeps'])}, found {', '.join(sorted(unknown))}")
    if not given.table:
        run({name: specs["sweeps"][name] for name in given.names or specs["sweeps"]}, specs, given.work)
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def run(sweeps: dict[str, Any], specs: dict[str, Any], work: Path) -> None:
    """Runs sweeps, one after another."""
    from qwen_scope import Scope
    from qwen_scope.evidence import SweepConfig, sweep
    from qwen_scope.evidence.plot import draw

    scope = Scope.from_pretrained()
    for name, spec in sweeps.items():
        options = {**specs["config"], **spec.get("config", {})}
        config = SweepConfig(
            **{**options, "strengths": tuple(map(float, options["strengths"]))}, instruction=spec["instruction"]
        )
        prompts: list[Any] = specs["prompts"]
        if spec.get("chat"):
            prompts = [[{"role": "user", "content": text}] for text in specs["questions"]]
        report = sweep(scope, spec["steering"], prompts, spec["effect"], config, folder=work / name)
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps({"name": name, **spec, "report": rounded(report.to_dict())}, ensure_ascii=False, indent=1)
        (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        draw(report, PLOTS / f"{name}.png")
        print(f"{name}: {report.verdict}: {report.judgement.why}")


def rounded(value: Any) -> Any:
    """Floats to six digits: what is beyond differs between processors anyway."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def with_table(text: str) -> str:
    """The text of the page with its table made anew from the results."""
    return MARKED.sub(lambda match: match[1] + table() + match[2], text)


def table() -> str:
    """The results there are as Markdown, in the order of specs.json."""
    names = json.loads((HERE / "specs.json").read_text(encoding="utf-8"))["sweeps"]
    order = [name for name in names if (RESULTS / f"{name}.json").exists()]
    found = [json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in order]
    rows = [row(result) for result in found]
    head = (
        "what",
        "steering at its best strength",
        "effect",
        "steered",
        "unsteered",
        "best random",
        "only prompted",
        "nearest control: difference, 95 % interval",
        "perplexity (unsteered)",
        "verdict",
    )
    lines = [head, ["---"] * len(head), *rows]
    why = [
        f"- {result['name']}: **{result['report']['verdict']}**: {result['report']['judgement']['why']}.\n"
        for result in found
    ]
    plots = [f"![{name}: effect and perplexity over the strength](steering-evidence/{name}.png)\n" for name in order]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n" + "".join(why) + "\n" + "\n".join(plots)


def row(result: dict[str, Any]) -> list[str]:
    """A row of the table."""
    report = result["report"]
    judgement = report["judgement"]
    what = f"{result['name']} ({result['kind']}{', chat' if result.get('chat') else ''})"
    comparisons = {comparison["control"]: comparison for comparison in judgement["comparisons"]}
    if not comparisons:
        return [what, f"`{result['steering']}`", report["effect"], *["–"] * 6, f"**no**: {judgement['why']}"]
    nearest = min(comparisons.values(), key=lambda comparison: comparison["difference"]["low"])
    best = judgement["best"]

    def highest(kind: str) -> str:
        return f"{max(c['effect'] for name, c in comparisons.items() if name.startswith(kind)):.3f}"

    difference = nearest["difference"]
    perplexity, before = judgement["perplexity"]
    return [
        what,
        f"`{result['steering']}` times {best:g}",
        report["effect"].replace("|", "\\|"),
        f"{judgement['effect']:.3f}",
        f"{comparisons['unsteered']['effect']:.3f}",
        highest("random"),
        highest("prompted"),
        f"{nearest['control']}: {difference['mean']:.3f}, {difference['low']:.3f} to {difference['high']:.3f}",
        f"{perplexity:.1f} ({before:.1f})",
        f"**{report['verdict']}**",
    ]


if __name__ == "__main__":
    main()
