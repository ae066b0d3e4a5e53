"""Markdown tables from the benchmarks' JSON, between `<!-- benchmark:NAME -->` and `<!-- /benchmark -->`.

`python benchmarks/table.py` writes them into README.md and docs/performance.md, and prints them; with `--check` it
writes nothing and exits 1 with one sentence if a table is stale. NAME is that of a file in results/, or `summary`, which
needs three, or `quality-summary`, the figures without how they came about.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.md", ROOT / "docs" / "performance.md"]
MARKED = re.compile(r"(<!-- benchmark:([\w-]+) -->\n).*?(<!-- /benchmark -->)", re.DOTALL)
OPENING = re.compile(r"<!-- benchmark:[\w-]+ -->")
OURS, PREPARED = "qwen_scope", "qwen_scope_prepared"
MEASURABLE_MIB = 1
"""Below this a peak is the allocator's noise."""
Found = dict[str, Any]


def with_tables(text: str, results: Path) -> str:
    """The text with every marked table made anew."""
    if len(MARKED.findall(text)) != len(OPENING.findall(text)):
        raise SystemExit("expected `<!-- /benchmark -->` after every `<!-- benchmark:… -->`, found one left open")
    return MARKED.sub(lambda match: match[1] + tables(match[2], results) + match[3], text)


def tables(name: str, results: Path) -> str:
    if name == "summary":
        return summary(*(read(results, needed) for needed in ("encode", "training", "layers")))
    if name == "quality-summary":
        return quality_summary(read(results, "quality"))
    found = read(results, name)
    made = {
        "encode": encode,
        "training": training,
        "quality": quality,
        "pipeline": pipeline,
        "layers": layers,
        "load": load,
        "harvest": harvest,
        "index": index,
        "classify": classify,
        "steer": steer,
        "sasft": sasft,
        "serve": serve,
        "app": app,
        "footprints": footprints,
    }
    return made[found["benchmark"]](found)


def read(results: Path, name: str) -> Found:
    path = results / f"{name}.json"
    if not path.exists():
        raise SystemExit(f"expected {path.name} in {results.name}/, found none; run benchmarks/{name.split('-')[0]}.py")
    return json.loads(path.read_text(encoding="utf-8"))


def encode(found: Found) -> str:
    labels = {name: of["label"] for name, of in found["contenders"].items()}
    others = [name for name in labels if name != OURS]
    results = found["results"]
    tokens = [[r["operation"], str(r["tokens"])] for r in results]
    ratios = [[*of, *(speed(r, name) for name in others)] for of, r in zip(tokens, results, strict=True)]
    times = [[*of, *(duration(r["seconds"][name]) for name in labels)] for of, r in zip(tokens, results, strict=True)]
    peaks = [[r["operation"], str(r["tokens"]), *map(mib, r["peak_mib"].values())] for r in results if "peak_mib" in r]
    kept = [mib(of["kept_beside_weights_mib"]) for of in found["contenders"].values()]
    ours = found["contenders"][OURS]
    parts = [
        f"{sizes(found['parameters']['sizes'])}, float32, {conditions(found)} {rounds(results)} "
        f"Kernel: {ours['kernel']} ({ours['why']}).{absent(found)}",
        table(["operation", "tokens", *(f"faster than {labels[name]}" for name in others)], ratios),
        table(["operation", "tokens", *(f"time, {label}" for label in labels.values())], times),
    ]
    if peaks:
        rows = [*peaks, ["kept beside the weights", "–", *kept]]
        parts.append(table(["operation", "tokens", *(f"peak, {label}" for label in labels.values())], rows))
    return "\n\n".join(parts) + "\n"


def training(found: Found) -> str:
    labels = {name: of["label"] for name, of in found["contenders"].items()}
    head = ["step", "tokens", "contender", "time", "qwen_scope is faster", "peak"]
    rows = [
        [
            sizes(r["sizes"]),
            str(r["tokens"]),
            labels[name],
            duration(r["seconds"][name]),
            "–" if name == OURS else speed(r, name),
            mib(r["peak_mib"][name]),
        ]
        for r in found["results"]
        for name in labels
    ]
    steps = "\n".join(f"- {of['label']}: {of['step']}" for of in found["contenders"].values())
    kernels = "; ".join(f"{r['kernel']}, which keeps {mib(r['kept_beside_weights_mib'])}" for r in found["results"])
    about = (
        f"One optimiser step, float32, {conditions(found)} {rounds(found['results'])} Kernel of each size: {kernels}."
        f"{absent(found)}"
    )
    return f"{about}\n\n{table(head, rows)}\n\nWhat a step includes:\n\n{steps}\n"


def quality(found: Found) -> str:
    labels = {name: of["label"] for name, of in found["contenders"].items()}
    tried = [[labels[r["contender"]], f"{r['learning_rate']:g}", *figures(r)] for r in found["sweep"]]
    trainings = "\n".join(f"- {of['label']}: {of['training']}." for of in found["contenders"].values())
    return (
        f"{quality_summary(found)}\nThe learning rates tried, with {millions(found['parameters'], 'sweep_steps')} tokens:\n\n"
        f"{table(['trainer', 'learning rate', *FIGURES], tried)}\n\nHow each trains:\n\n{trainings}\n"
    )


def quality_summary(found: Found) -> str:
    parameters, speeds = found["parameters"], found["speed"]
    rows = [
        [
            found["contenders"][r["contender"]]["label"],
            f"{r['learning_rate']:g}",
            *figures(r),
            f"{speeds['tokens_per_second'][r['contender']]:.0f}",
            "–" if r["contender"] == OURS else speed(speeds, r["contender"]),
        ]
        for r in found["results"]
    ]
    about = (
        f"{sizes(parameters['sizes'])}, layer {parameters['data']['layer']}, {millions(parameters, 'steps')} training tokens "
        f"in batches of {parameters['batch']}, {conditions(found)} Speeds are medians of {speeds['rounds']} rounds, in "
        f"brackets the quartiles.{absent(found)}"
    )
    head = ["trainer", "learning rate", *FIGURES, "tokens per second", "qwen_scope is faster"]
    return f"{about}\n\n{table(head, rows)}\n"


def pipeline(found: Found) -> str:
    parameters, speeds = found["parameters"], found["tokens_per_second"]
    rows = [[name, f"{speeds[name]:.0f}"] for name in ("reading", "training", "together")]
    layers = ", ".join(map(str, parameters["layers"]))
    about = (
        f"Layer {layers} of the bundled model, bfloat16, {parameters['d_sae']} features, k = {parameters['k']}, "
        f"{parameters['tokens']} tokens, {conditions(found)} Medians of {parameters['rounds']} rounds. Both together reach "
        f"{speeds['share_of_the_slower_half']:.0%} of the slower half."
    )
    return f"{about}\n\n{table(['what', 'tokens per second'], rows)}\n"


def steer(found: Found) -> str:
    parameters, names = found["parameters"], list(found["parameters"]["edits"])
    rows = [
        [
            f"{r['rows']}",
            f"{r['tokens_per_second'][OURS]:.1f}",
            *(f"{r['times_as_fast'][name] - 1:+.1%}" for name in names),
        ]
        for r in found["cost"]
    ]
    together, other = found["together"], found["transformers"]
    alone = "one after another"
    about = (
        f"The bundled model in {parameters['dtype']}, {parameters['tokens']} tokens generated for each text, {conditions(found)} "
        f"Medians of {parameters['rounds']} interleaved rounds, for many texts of "
        f"{parameters['rounds_together']}. How much longer a text takes under each kind of edit:"
    )
    after = (
        f"{parameters['together']} texts, each with another steering, together: {together['tokens_per_second'][OURS]:.0f} tokens "
        f"per second, one after another {together['tokens_per_second'][alone]:.1f}: {speed(together, alone)}; "
        f"{together['same_tokens']} of {parameters['together']} have the same tokens both ways.\n\nOne steered text takes "
        f"transformers' own `generate` with a hook {speed(other, 'transformers')} the time of `Scope.generate`; the tokens are "
        f"{'the same' if other['same_tokens'] else 'not the same'}."
    )
    head = ["texts at once", "tokens per second, unsteered", *(f"`{parameters['edits'][name]}`" for name in names)]
    return f"{about}\n\n{table(head, rows)}\n\n{after}\n"


def sasft(found: Found) -> str:
    parameters, seconds = found["parameters"], found["seconds"]
    low, high = found["added_quartiles"]
    return (
        f"Loss and gradient of {parameters['rows']} samples of {parameters['tokens']} tokens on the bundled model in float32, "
        f"{conditions(found)} Medians of {found['rounds']} interleaved rounds. TRL's `SFTTrainer` takes "
        f"{duration(seconds['sft'])}, `SASFTTrainer` with {len(parameters['features'])} features at two layers "
        f"{duration(seconds[OURS])}: {found['added']:+.1%} (quartiles {low:+.1%} to {high:+.1%}).\n"
    )


def serve(found: Found) -> str:
    parameters, together, load = found["parameters"], found["together"], found["load"]
    memory, took = load["resident_mib"], together["seconds"]
    rows = [[name, f"{count}"] for name, count in load["requests"].items()]
    about = (
        f"The bundled model in float32, {conditions(found)} {parameters['clients']} clients, each with another steering "
        f"and {parameters['tokens']} tokens to get: {took['together']:.1f} s all at once, {took['one after another']:.1f} s one "
        f"after another, {together['times_as_fast']:.1f}x; {together['same_texts']} of them get the same text both ways."
    )
    about += (
        f"\n\n{parameters['minutes']:g} minutes of mixed load by {parameters['load_clients']} clients: {load['failed']} of "
        f"{sum(load['requests'].values())} requests failed. The server held {memory['second third']:.0f} MiB (median) in the "
        f"second third of the time and {memory['last third']:.0f} MiB in the last."
    )
    return f"{about}\n\n{table(['request', 'count'], rows)}\n"


def app(found: Found) -> str:
    parameters = found["parameters"]
    about = (
        f"The bundled model in float32, {conditions(found)} Medians of {parameters['rounds']} visitors and the quartiles; texts "
        f"of {parameters['tokens']} tokens, at all layers of the suite. The server runs on the same processor as the browser."
    )
    rows = [
        [name, f"{1000 * seconds:.0f} ms", " to ".join(f"{1000 * end:.0f}" for end in found["quartiles"][name])]
        for name, seconds in found["seconds"].items()
    ]
    return f"{about}\n\n{table(['until', 'median', 'quartiles'], rows)}\n"


def harvest(found: Found) -> str:
    rows = [
        [
            ", ".join(map(str, r["layers"])),
            f"{r['tokens_per_second']['model']:.0f}",
            f"{r['tokens_per_second'][OURS]:.0f}",
            share(r),
        ]
        for r in found["results"]
    ]
    whole, parameters = found["whole"], found["parameters"]
    about = (
        f"The bundled model in {parameters['dtype']}, {conditions(found)} Medians of {parameters['rounds']} interleaved "
        "rounds, in brackets the quartiles."
    )
    after = (
        f"A whole harvest of layers {', '.join(map(str, whole['layers']))} ({whole['features']} features) over "
        f"{whole['tokens']} tokens, from text to index: {whole['seconds']:.0f} s, at most {mib(whole['peak_mib'])} of memory in "
        f"all, {whole['index_bytes'] / 1e6:.0f} MB of index."
    )
    head = ["layers", "tokens per second, model alone", "harvesting", "share"]
    return f"{about}\n\n{table(head, rows)}\n\n{after}\n"


def footprints(found: Found) -> str:
    parameters, saved = found["parameters"], found["saved"]
    rows = [
        [
            r["position"],
            f"{r['tokens_per_second']['model']:.0f}",
            f"{r['tokens_per_second'][OURS]:.0f}",
            f"{1 / r['times_as_fast']['model']:.2f}x",
            share(r),
        ]
        for r in found["results"]
    ]
    about = (
        f"The bundled model in {parameters['dtype']}, layer {parameters['layer']}, {parameters['items']} items, "
        f"{conditions(found)} Medians of {parameters['rounds']} interleaved rounds, in brackets the quartiles."
    )
    taken = saved["seconds"]
    after = (
        f"{parameters['sets']} saved footprints of {parameters['items_of_each']} items, each of which fires {parameters['k']} of "
        f"{parameters['d_sae']} features: {duration(taken['load, redundancy, overlaps'])} to load them and for redundancy and "
        f"all pairwise overlaps, {duration(taken['intervals'])} for intervals of the overlaps from {parameters['resamples']} "
        "half-samples."
    )
    head = ["position", "tokens per second, model alone", "footprint", "cost", "share"]
    return f"{about}\n\n{table(head, rows)}\n\n{after}\n"


def share(r: Found, of: str = "model") -> str:
    low, high = r["times_as_fast_quartiles"][of]
    return f"{r['times_as_fast'][of]:.0%} ({low:.0%}–{high:.0%})"


def classify(found: Found) -> str:
    rows = [
        [
            ", ".join(map(str, r["layers"])),
            str(r["tokens"]),
            f"{r['tokens_per_second']['harvest']:.0f}",
            f"{r['tokens_per_second'][OURS]:.0f}",
            share(r, "harvest"),
        ]
        for r in found["results"]
    ]
    parameters = found["parameters"]
    about = (
        f"The bundled model in {parameters['dtype']}, a rule of {parameters['terms']} features, texts of "
        f"{parameters['characters']} characters, {conditions(found)} Medians of {parameters['rounds']} interleaved rounds, in "
        "brackets the quartiles."
    )
    head = ["layers", "tokens", "tokens per second, harvesting", "applying a rule", "share"]
    return f"{about}\n\n{table(head, rows)}\n"


def index(found: Found) -> str:
    rows = [[name, duration(r["seconds"]), duration(r["worst_seconds"])] for name, r in found["results"].items()]
    about = (
        f"An index of {found['parameters']['features']} features, {conditions(found)} The search's database is made once, in "
        f"{duration(found['search_built_seconds'])}."
    )
    return f"{about}\n\n{table(['what', 'median', 'worst'], rows)}\n"


FIGURES = ("FVU", "never fired", "not lately")


def figures(r: Found) -> list[str]:
    return [f"{r['fvu']:.4f}", f"{r['never_fired']:.1%}", f"{r['unfired_lately']:.1%}"]


def millions(parameters: Found, steps: str) -> str:
    return f"{parameters[steps] * parameters['batch'] / 1e6:.1f} M"


def layers(found: Found) -> str:
    parameters = found["parameters"]
    head = ["way", "memory limit", "page cache", "time", "anonymous memory, before", "peak", "peak in the limit"]
    rows = [
        [
            found["contenders"][r["way"]],
            mib(r["limit_bytes"] / 2**20) if "limit_bytes" in r else "–",
            *measured_pass(r),
        ]
        for r in found["results"]
    ]
    about = (
        f"{parameters['layers']} layers of {sizes(parameters['sizes'])}, float32, {gigabytes(found['suite_bytes'])} of "
        f"published files and {gigabytes(found['copies_bytes'])} of prepared copies, {parameters['tokens']} tokens at each "
        f"layer, at most {mib(parameters['max_bytes'] / 2**20)} of layers kept, {conditions(found)} One pass each."
    )
    return f"{about}\n\n{table(head, rows)}\n"


def measured_pass(r: Found) -> list[str]:
    if "not_measured" in r:
        return [f"not measured: {r['not_measured']}", *["–"] * 4]
    memory = [mib(r[field]) if field in r else "–" for field in MEMORY_OF_PASS]
    return [r["page_cache"], duration(r["seconds"]), *memory]


MEMORY_OF_PASS = ("anonymous_before_mib", "peak_anonymous_mib", "peak_in_group_mib")


def load(found: Found) -> str:
    head = ["way", "open and first token", "second token", "anonymous memory, before", "after"]
    rows = [
        [
            found["contenders"][r["way"]],
            duration(r["first_token_seconds"]),
            duration(r["second_token_seconds"]),
            mib(r["anonymous_before_mib"]),
            mib(r["anonymous_mib"]),
        ]
        for r in found["results"]
    ]
    parameters = found["parameters"]
    about = (
        f"One layer of {sizes(parameters['sizes'])}, float32, {conditions(found)} Medians of {parameters['rounds']} fresh "
        "processes, imports not counted, files in the page cache."
    )
    return f"{about}\n\n{table(head, rows)}\n"


def summary(encoded: Found, trained: Found, passed: Found) -> str:
    labels = {name: of["label"] for name, of in encoded["contenders"].items()}
    peers = [name for name in labels if name not in (OURS, "qwen_scope_reference", "card")]
    step = trained["results"][0]
    head = ["task", "time", "faster than the card's arithmetic", *(f"than {labels[name]}" for name in peers)]
    rows = [
        [f"{r['operation']}, {tokens_of(r)}", *summarised(r, ["card", *peers]), *two_peaks(r, "card")]
        for r in encoded["results"]
    ]
    rows.append([f"training step, {tokens_of(step)}", *summarised(step, ["dense", *peers]), *two_peaks(step, "dense")])
    rows.append([all_layers(passed), *whole_suite(passed, len(peers))])
    about = (
        f"Encode and decode at {sizes(encoded['parameters']['sizes'])}, the training step at {sizes(step['sizes'])}, all "
        f"layers prepared; float32, {conditions(encoded)} Ratios are medians. Memory is the peak above the weights and "
        "what is kept beside them; for all layers, the rise of anonymous memory, weights included."
    )
    columns = [*head, "memory", "memory, the card's arithmetic"]
    return f"{about}\n\n{table(columns, rows)}\n"


def all_layers(passed: Found) -> str:
    parameters = passed["parameters"]
    return f"encode, {parameters['layers']} layers, {parameters['tokens']} tokens each"


def summarised(r: Found, names: list[str]) -> list[str]:
    ratios = r["times_as_fast"]
    return [duration(r["seconds"][OURS]), *(f"{ratios[name]:.1f}x" if name in ratios else "–" for name in names)]


def two_peaks(r: Found, other: str) -> list[str]:
    return [mib(r["peak_mib"][name]) if "peak_mib" in r else "–" for name in (OURS, other)]


def whole_suite(passed: Found, peers: int) -> list[str]:
    """Ours with its copies made, against the card's way, neither limited."""
    last = {r["way"]: r for r in passed["results"] if "limit_bytes" not in r}
    ours, card = last[PREPARED], last["card"]
    rises = [mib(r["peak_anonymous_mib"] - r["anonymous_before_mib"]) for r in (ours, card)]
    return [duration(ours["seconds"]), f"{card['seconds'] / ours['seconds']:.1f}x", *["–"] * peers, *rises]


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---", *["--:"] * (len(head) - 1)], *rows))


def conditions(found: Found) -> str:
    machine = found["machine"]
    return (
        f"on {machine['cpu']} ({machine['cores']} cores, {count(machine['threads'], 'thread')}), "
        f"{machine['memory_gib']:.0f} GiB, torch {machine['torch']}, Python {machine['python']}, {machine['date']}."
    )


def rounds(results: list[Found]) -> str:
    numbers = [r["rounds"] for r in results]
    span = f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"
    return f"Medians of {span} interleaved rounds, in brackets the quartiles."


def absent(found: Found) -> str:
    return f" Not installed, so not compared: {', '.join(found['not_installed'])}." * bool(found["not_installed"])


def sizes(of: Found) -> str:
    return f"{of['d_model']} → {of['d_sae']}, k = {of['k']}"


def tokens_of(r: Found) -> str:
    return count(r["tokens"], "token")


def count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def speed(result: Found, name: str) -> str:
    low, high = result["times_as_fast_quartiles"][name]
    return f"{result['times_as_fast'][name]:.2f}x ({low:.2f}–{high:.2f})"


def mib(number: float) -> str:
    if number == 0:
        return "0"
    return f"{number:.0f} MiB" if number >= MEASURABLE_MIB else f"< {MEASURABLE_MIB} MiB"


def gigabytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB"


def duration(seconds: float) -> str:
    """Three digits: 8.01 ms, 12.3 ms, 1.79 s."""
    number, unit = (seconds, "s") if seconds >= 1 else (seconds * 1000, "ms")
    digits = 2 if number < 10 else 1 if number < 100 else 0
    return f"{number:.{digits}f} {unit}"


def fresh_tables(files: list[Path]) -> str:
    """All tables in some files, once each."""
    found = {match[2]: match[0] for file in files for match in MARKED.finditer(file.read_text(encoding="utf-8"))}
    return "\n".join(found.values())


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
            raise SystemExit(f"a benchmark table in {file.name} is stale: run `python benchmarks/table.py`")
        if fresh != text:
            file.write_text(fresh, encoding="utf-8")
    if not args.check:
        print(fresh_tables(args.files))


if __name__ == "__main__":
    main()
