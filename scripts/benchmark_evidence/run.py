"""Makes the figures of docs/benchmarks.md anew: footprints of real sets, whether they group, and a check with planted mixtures.

python scripts/benchmark_evidence/run.py            # some ten minutes on two cores, 60 MB of packages; then the table
python scripts/benchmark_evidence/run.py --table    # only the table, from the figures that are there

Footprints are kept in build/benchmark_evidence as they are made: Ctrl-C, and the same command goes on.
"""

import argparse
import io
import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import hypergeom

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from real_sets import KINDS, PACKAGES, write_sets  # noqa: E402

from qwen_scope import Scope  # noqa: E402
from qwen_scope.data.coverage import missed  # noqa: E402
from qwen_scope.data.fired import Fired, Position  # noqa: E402
from qwen_scope.data.footprint import Footprint  # noqa: E402
from qwen_scope.data.footprints import footprints  # noqa: E402
from qwen_scope.data.study import Study, study  # noqa: E402

ROOT = HERE.parent.parent
RESULT = HERE / "result.json"
PAGE = ROOT / "docs" / "benchmarks.md"
PLOT = ROOT / "docs" / "benchmarks" / "overlaps.png"
MARKED = re.compile(r"(<!-- benchmarks:(\w+) -->\n).*?(<!-- /benchmarks -->)", re.DOTALL)
LAYER = 15
POSITIONS: tuple[Position, ...] = ("last", "any")
PARTS = ("gsm8k", "humaneval")
MIXED = 40
"""Items of each mixture."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
DRAWS = 400


def main() -> None:
    """Makes footprints, figures, the plot and the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only write the tables")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "benchmark_evidence", help="where sets are kept")
    given = parser.parse_args()
    if not given.table:
        run(given.work)
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def run(work: Path) -> None:
    """All figures, into one JSON file, and the plot."""

    @cache
    def scope() -> Scope:
        return Scope.from_pretrained(layers=[LAYER], dtype="bfloat16")

    paths = write_sets(work)
    sets = [{"name": name, "source": str(path)} for name, path in paths.items()]
    found: dict[str, Any] = {"layer": LAYER, "packages": list(PACKAGES), "positions": {}}
    for position in POSITIONS:
        made = footprints(scope, sets, work / position, layer=LAYER, position=position)
        studied = study(made, resamples=200)
        found["positions"][position] = figures(studied)
        if position == "last":
            PLOT.parent.mkdir(exist_ok=True)
            # Of few colours, a third of the size.
            Image.open(io.BytesIO(studied.pictures()["overlaps"])).quantize(128).save(PLOT, optimize=True)
    kept = {f.name: f for f in footprints(scope, sets, work / "last", layer=LAYER)}
    found["suite"] = kept[PARTS[0]].about.suite
    found["planted"] = planted(scope(), paths, kept)
    RESULT.write_text(compact(rounded(found)), encoding="utf-8")


def figures(studied: Study) -> dict[str, Any]:
    """The figures of all sets at one position."""
    of = studied.overlaps
    either = (of.matched + of.matched.T) / 2
    np.fill_diagonal(either, -1)
    kinds = np.array([KINDS[name] for name in of.names])
    grouped = {}
    for kind in ("maths", "code"):
        rows = np.flatnonzero(kinds == kind)
        within = either[np.ix_(rows, rows)][np.triu_indices(len(rows), 1)]
        between = either[np.ix_(rows, np.flatnonzero(kinds != kind))]
        grouped[kind] = {
            "within": float(within.mean()),
            "lowest_within": float(within.min()),
            "between": float(between.mean()),
            "highest_between": float(between.max()),
        }
    nearest = either.argmax(1)
    return {
        "size": studied.size,
        "sets": {
            each.about.name: {
                "kind": KINDS[each.about.name],
                "items": each.about.items,
                "left_out": each.about.left_out,
                "features": int(each.whole.features),
                "redundancy": each.whole.redundancy,
                "features_matched": each.matched.features,
                "redundancy_matched": each.matched.redundancy,
                "mean_coverage_matched": each.matched.mean_coverage,
                "items_for_90_percent": len(each.representative),
                "itself": of.matched[at, at],
                "nearest": of.names[nearest[at]],
                "overlap_with_nearest": either[at, nearest[at]],
            }
            for at, each in enumerate(studied.sets)
        },
        "grouped": grouped,
        "matched": of.matched.tolist(),
        "low": [] if of.low is None else np.nan_to_num(of.low, nan=-1).tolist(),
        "high": [] if of.high is None else np.nan_to_num(of.high, nan=-1).tolist(),
    }


def planted(scope: Scope, paths: dict[str, Path], made: dict[str, Footprint]) -> list[dict[str, Any]]:
    """Mixtures of halves of two sets in known proportions, read anew: against what the equations expect of the halves, and
    against the other half of the first set, which no mixture has items of."""
    texts = {name: [json.loads(line)["text"] for line in paths[name].read_text().splitlines()] for name in PARTS}
    half = {name: made[name].fired.take(np.arange(len(texts[name]) // 2)) for name in PARTS}
    first = made[PARTS[0]].fired
    held_out = first.take(np.arange(len(first) // 2, len(first))).counts > 0
    a, b = (half[name] for name in PARTS)
    chance, rows = np.random.default_rng(0), []
    for share in SHARES:
        of_a = round(MIXED * share)
        of_b = MIXED - of_a
        take_a, take_b = chance.permutation(len(a))[:of_a], chance.permutation(len(b))[:of_b]
        mixture = [texts[PARTS[0]][at] for at in take_a] + [texts[PARTS[1]][at] for at in take_b]
        read = Footprint.of(scope, mixture, layer=LAYER, position="last").fired
        drawn = [
            measures(
                [
                    a.take(chance.permutation(len(a))[:of_a]).counts,
                    b.take(chance.permutation(len(b))[:of_b]).counts,
                ],
                held_out,
            )
            for _ in range(DRAWS)
        ]
        low, high = np.quantile(np.array(drawn), [0.025, 0.975], axis=0)
        expected = expectation(a, of_a, b, of_b, held_out)
        rows.append(
            {
                "share": share,
                **{
                    name: {"expected": expected[at], "measured": measured, "low": low[at], "high": high[at]}
                    for at, (name, measured) in enumerate(zip(MEASURES, measures([read.counts], held_out), strict=True))
                },
            }
        )
    return rows


MEASURES = ("features", "redundancy", "overlap")


def measures(counts: list[np.ndarray], held_out: np.ndarray) -> tuple[float, float, float]:
    """|F|, redundancy, and the share of F that the held-out half fires too, of a mixture of `MIXED` items."""
    whole = np.sum(counts, axis=0)
    fires = whole > 0
    times = whole[fires]
    total = float(((MIXED + 1) * times / (times + 1)).sum())
    return float(fires.sum()), total / fires.sum() ** 2, float((fires & held_out).sum() / fires.sum())


def expectation(a: Fired, of_a: int, b: Fired, of_b: int, held_out: np.ndarray) -> tuple[float, float, float]:
    """The same, as the equations expect it of `of_a` random items of one half and `of_b` of the other: each by expectations."""
    table = {
        name: missed(np.arange(len(x) + 1), len(x), np.array([n]))[:, 0]
        for name, x, n in (("a", a, of_a), ("b", b, of_b))
    }
    fires = 1 - table["a"][a.counts] * table["b"][b.counts]
    pairs, features = np.unique(np.stack([a.counts, b.counts], 1), axis=0, return_counts=True)
    total = 0.0
    for (in_a, in_b), count in zip(pairs.tolist(), features.tolist(), strict=True):
        x, y = np.arange(of_a + 1), np.arange(of_b + 1)
        chance = np.outer(hypergeom.pmf(x, len(a), in_a, of_a), hypergeom.pmf(y, len(b), in_b, of_b))
        times = x[:, None] + y[None]
        total += count * float((chance * (MIXED + 1) * times / (times + 1)).sum())
    whole = float(fires.sum())
    return whole, total / whole**2, float(fires[held_out].sum() / whole)


def compact(found: dict[str, Any]) -> str:
    """JSON with a list of numbers on one line."""
    text = json.dumps(found, indent=1)
    return re.sub(r"\[\s+([-+.,\de\s]+?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"


def rounded(value: Any) -> Any:
    """Floats to four digits: what is beyond differs between processors anyway."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def with_tables(text: str) -> str:
    """The text of the page with its tables made anew from the result."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    made = {"sets": sets_table, "groups": groups_table, "planted": planted_table}
    return MARKED.sub(lambda match: match[1] + made[match[2]](found) + match[3], text)


def sets_table(found: dict[str, Any]) -> str:
    """Set by set, at the last token."""
    of = found["positions"]["last"]
    n = of["size"]
    head = [
        "set",
        "kind",
        "items",
        "features",
        "redundancy",
        f"features in {n}",
        f"redundancy in {n}",
        "items for 90 %",
    ]
    head += ["overlap with itself", "nearest other set", "overlap with it"]
    rows = [
        [
            name,
            each["kind"],
            f"{each['items']}",
            f"{each['features']}",
            f"{each['redundancy']:.3f}",
            f"{each['features_matched']:.0f}",
            f"{each['redundancy_matched']:.4f}",
            f"{each['items_for_90_percent']}",
            f"{each['itself']:.2f}",
            each["nearest"],
            f"{each['overlap_with_nearest']:.2f}",
        ]
        for name, each in of["sets"].items()
    ]
    return markdown(head, rows)


def groups_table(found: dict[str, Any]) -> str:
    """Whether maths sets and code sets group, at both positions."""
    head = ["sets", "position", "within", "lowest", "with others", "highest", "nearest set is of the kind"]
    rows = []
    for position, of in found["positions"].items():
        kinds = {name: each["kind"] for name, each in of["sets"].items()}
        for kind, grouped in of["grouped"].items():
            near = [kinds[each["nearest"]] == kind for each in of["sets"].values() if each["kind"] == kind]
            values = [grouped[name] for name in ("within", "lowest_within", "between", "highest_between")]
            rows.append([kind, position, *(f"{value:.2f}" for value in values), f"{sum(near)} of {len(near)}"])
    return markdown(head, rows)


def planted_table(found: dict[str, Any]) -> str:
    """Mixtures: measured, expected, and where 95 % of random ones lie."""
    head = [f"share of {PARTS[0]}"]
    for name in MEASURES:
        head += [name, "expected", "95 % of mixtures"]
    rows = []
    for each in found["planted"]:
        row = [f"{each['share']:.0%}"]
        for name, digits in zip(MEASURES, (0, 4, 3), strict=True):
            of = each[name]
            row += [f"{of['measured']:.{digits}f}", f"{of['expected']:.{digits}f}"]
            row.append(f"{of['low']:.{digits}f}–{of['high']:.{digits}f}")
        rows.append(row)
    return markdown(head, rows)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---", *["--:"] * (len(head) - 1)], *rows])


if __name__ == "__main__":
    main()
