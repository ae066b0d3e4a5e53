"""Markdown tables from a benchmark's JSON, between `<!-- benchmark:encode -->` and `<!-- /benchmark -->`.

`python benchmarks/table.py` writes them into README.md and docs/performance.md; with `--check` it writes nothing and
exits 1 with one sentence if a table is stale.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.md", ROOT / "docs" / "performance.md"]
MARKED = re.compile(r"(<!-- benchmark:(\w+) -->\n).*?(<!-- /benchmark -->)", re.DOTALL)
OPENING = re.compile(r"<!-- benchmark:\w+ -->")
OURS = "qwen_scope"
MEASURABLE_MIB = 1
"""Below this a peak is the allocator's noise and a ratio of peaks says nothing."""


def with_tables(text: str, results: Path) -> str:
    """The text with every marked table made anew from `{results}/{benchmark}.json`."""
    if len(MARKED.findall(text)) != len(OPENING.findall(text)):
        raise SystemExit("expected `<!-- /benchmark -->` after every `<!-- benchmark:… -->`, found one left open")

    def block(match: re.Match[str]) -> str:
        return match[1] + tables(json.loads((results / f"{match[2]}.json").read_text())) + match[3]

    return MARKED.sub(block, text)


def tables(found: dict[str, Any]) -> str:
    """What was found: the conditions in a sentence, the ratios, the absolute figures."""
    names, results = found["contenders"], found["results"]
    others = [name for name in names if name != OURS]
    ratios = table(
        [f"faster than {names[name]}" for name in others] + [f"less memory than {names[name]}" for name in others],
        results,
        lambda r: [speed(r, name) for name in others] + [less_memory(r, name) for name in others],
    )
    times = table(
        [f"time, {label}" for label in names.values()] + [f"peak, {label}" for label in names.values()],
        results,
        lambda r: [duration(r["seconds"][name]) for name in names] + [peak(r, name) for name in names],
    )
    return f"{conditions(found)}\n\n{ratios}\n{times}"


def table(columns: list[str], results: list[dict[str, Any]], cells: Any) -> str:
    head = ["operation", "tokens", *columns]
    rows = [[r["operation"], str(r["tokens"]), *cells(r)] for r in results]
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def conditions(found: dict[str, Any]) -> str:
    machine, parameters = found["machine"], found["parameters"]
    sizes, rounds = parameters["sizes"], [r["rounds"] for r in found["results"]]
    absent = f" Not installed, so not compared: {', '.join(found['not_installed'])}." * bool(found["not_installed"])
    return (
        f"{sizes['d_model']} → {sizes['d_sae']}, k = {sizes['k']}, {parameters['dtype']}, on {machine['cpu']} "
        f"({machine['cores']} cores, {machine['threads']} threads), {machine['memory_gib']:.0f} GiB, torch "
        f"{machine['torch']}, Python {machine['python']}, {machine['date']}. Medians of {min(rounds)} to {max(rounds)} "
        f"interleaved rounds, in brackets the quartiles; peaks are above the weights.{absent}"
    )


def speed(result: dict[str, Any], name: str) -> str:
    low, high = result["times_as_fast_quartiles"][name]
    return f"{result['times_as_fast'][name]:.2f}x ({low:.2f}–{high:.2f})"


def less_memory(result: dict[str, Any], name: str) -> str:
    peaks = result.get("peak_mib", {})
    if min(peaks.get(OURS, 0), peaks.get(name, 0)) < MEASURABLE_MIB:
        return "–"
    return f"{peaks[name] / peaks[OURS]:.1f}x"


def peak(result: dict[str, Any], name: str) -> str:
    mib = result.get("peak_mib", {}).get(name)
    if mib is None:
        return "–"
    return f"{mib:.0f} MiB" if mib >= MEASURABLE_MIB else f"< {MEASURABLE_MIB} MiB"


def duration(seconds: float) -> str:
    """Three digits: 8.01 ms, 12.3 ms, 1.79 s."""
    number, unit = (seconds, "s") if seconds >= 1 else (seconds * 1000, "ms")
    digits = 2 if number < 10 else 1 if number < 100 else 0
    return f"{number:.{digits}f} {unit}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=FILES, help="default: README.md, docs/performance.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table is stale")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON")
    args = parser.parse_args()
    for file in args.files:
        text = file.read_text(encoding="utf-8")
        fresh = with_tables(text, args.results)
        if fresh != text and args.check:
            raise SystemExit(f"the benchmark table in {file.name} is stale: run `python benchmarks/table.py`")
        if fresh != text:
            file.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
