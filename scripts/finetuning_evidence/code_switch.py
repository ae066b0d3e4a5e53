"""Makes the figures on code-switching of docs/finetuning.md anew: fine-tuning that makes a model switch, and ways to mend it.

python scripts/finetuning_evidence/code_switch.py            # everything, then the tables; an hour on 2 cores
python scripts/finetuning_evidence/code_switch.py --seeds 1  # fewer seeds, sooner; more can follow
python scripts/finetuning_evidence/code_switch.py --table    # only the tables, from the figures that are there

*Mending.* The bundled model is fine-tuned on Chinese, and on English that breaks off into Chinese: it code-switches then. That
model is fine-tuned on clean English and Chinese, the same samples and updates for every arm and seed.

*Keeping.* The bundled model is fine-tuned on the bad samples themselves, in every way: does it learn to switch from them?

The ways: plainly (sft), with the probability of tokens of Chinese script penalised on English (token-penalty), and by SASFT. Of
each: perplexity in both languages, and how many texts that go on from English beginnings hold a Chinese character. Chapters that
are measured on were not trained on.

The text is Debian Reference in English and Chinese (GPL-2 or later), fetched with apt-get at a pinned version and not
redistributed. Models and texts are kept in build/finetuning_evidence/code_switch as they come: Ctrl-C, and the same command
goes on.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULT = HERE / "results" / "code_switch.json"
PAGE = ROOT / "docs" / "finetuning.md"
MARKED = re.compile(r"(<!-- code-switch -->\n).*?(<!-- /code-switch -->)", re.DOTALL)
VERSION = "2.100"
HELD_OUT = ("ch02", "ch06")
"""Chapters that are measured on: packages, and the net."""
SEEDS = 3
"""Orders of the samples, and seeds of the texts."""
PLAIN, PENALTY = {"sft": {"method": "sft"}}, {"token-penalty 10": {"method": "token-penalty", "token_penalty": 10.0}}
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "mending": {
        **PLAIN,
        **PENALTY,
        "sasft 0.05": {"method": "sasft", "reduce_weight": 0.05},
        "sasft 0.5": {"method": "sasft", "reduce_weight": 0.5},
    },
    "keeping": {
        **PLAIN,
        **PENALTY,
        "sasft 0.1": {"method": "sasft", "reduce_weight": 0.1},
        "sasft 0.1, 40 features": {"method": "sasft", "reduce_weight": 0.1, "restraints": "40.json"},
    },
}
COMMON = {
    "home": ("zh",),
    "rows": 8,
    "max_length": 48,
    "bf16": True,
    "measure_on": 24,
    "prompt_tokens": 12,
    "new_tokens": 24,
    "texts_each": 2,
    "save_every": 1000,
}
BREAKING = {"steps": 70, "learning_rate": 1.5e-4}
UPDATES = {"mending": {"steps": 25, "learning_rate": 2e-5}, "keeping": {"steps": 35, "learning_rate": 2e-4}}
MEASURED_ON = 24
"""Samples of each language kept for the figures."""
LONGEST = {"en": 300, "zh": 100}
"""Characters of a sample."""
RESAMPLES = 2000


def main() -> None:
    """Runs what is not there yet and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "finetuning_evidence" / "code_switch")
    given = parser.parse_args()
    if not given.table:
        run(given.work, range(given.seeds))
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def run(work: Path, seeds: Sequence[int]) -> None:
    """Makes the switching model, trains in every way, and writes the figures."""
    from qwen_scope.cli.common import quiet_loading

    quiet_loading()
    texts(work)
    broken = once(work / "broken", work / "mixed.jsonl", {**BREAKING, "method": "sft"})
    print(f"broken: {line(broken)}", flush=True)
    measure_limits(work)
    given = {
        "mending": (work / "clean.jsonl", {"model": str(work / "broken" / "model")}, work / "sft-0"),
        # Limits of the model as it comes, in clean English: the samples that are trained on are none.
        "keeping": (work / "mixed.jsonl", {"restraints": "4.json"}, work / "broken"),
    }
    result: dict[str, Any] = {
        "texts": f"Debian Reference {VERSION}, English and Chinese",
        "common": {**COMMON, "measured_on": MEASURED_ON},
        "breaking": BREAKING,
        "updates": UPDATES,
        "seeds": list(seeds),
        "stages": {
            name: {"switch_ratio": of["switch_ratio"]["en"], "perplexity": of["perplexity"]}
            for name, of in (("as it comes", broken["before"]), ("made to switch", broken["after"]))
        },
    }
    for kind, (samples, options, first) in given.items():
        found = {}
        for seed in seeds:
            for name, arm in ARMS[kind].items():
                folder = (
                    work / f"{'' if kind == 'mending' else kind + '-'}{name.replace(' ', '-').replace(',', '')}-{seed}"
                )
                folder.mkdir(parents=True, exist_ok=True)
                # What does not depend on the arm is measured once: the features and the figures before.
                for file in ("before.json", "before.safetensors", *(["restraints.json"] if kind == "mending" else [])):
                    if (first / file).exists() and not (folder / file).exists():
                        shutil.copy(first / file, folder / file)
                found[name, seed] = once(folder, samples, {**UPDATES[kind], **options, **arm, "seed": seed})
                for large in ("model", "checkpoints"):
                    shutil.rmtree(folder / large, ignore_errors=True)
                print(f"{kind}, {name}, seed {seed}: {line(found[name, seed])}", flush=True)
        result[kind] = summed_up(found, list(ARMS[kind]), seeds)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def measure_limits(work: Path) -> None:
    """Writes the features of Chinese and their levels in clean English, of the model as it comes."""
    if (work / "40.json").exists():
        return
    from qwen_scope import Scope
    from qwen_scope.finetuning import specific_features
    from qwen_scope.finetuning.samples import Sample

    scope = Scope.from_pretrained()
    rows = [json.loads(row) for row in (work / "clean.jsonl").read_text(encoding="utf-8").splitlines()]
    samples = [
        Sample.of(row["text"], tag)
        for tag in ("en", "zh")
        for row in [row for row in rows if row["language"] == tag][:64]
    ]
    for each in (2, 20):
        found = specific_features(scope.backbone, scope.suite, samples, ["zh"], count=each)
        found.save(work / f"{len(found.features)}.json")


def once(folder: Path, samples: Path, options: dict[str, Any]) -> dict[str, Any]:
    """A run, or its report if it is done."""
    if (folder / "report.json").exists():
        return json.loads((folder / "report.json").read_text(encoding="utf-8"))
    from qwen_scope.finetuning import SASFTRun, finetune_sasft

    if "restraints" in options:
        options["restraints"] = folder.parent / options["restraints"]
    return finetune_sasft(
        samples, folder, SASFTRun(**{**COMMON, "evaluate_on": folder.parent / "held.jsonl", **options})
    )


def line(report: dict[str, Any]) -> str:
    """A run in one line."""
    after = report["after"]
    perplexities = ", ".join(f"{tag} {value:.2f}" for tag, value in after["perplexity"].items())
    return f"switches {after['switch_ratio']['en']:.3f}, perplexity {perplexities}"


def summed_up(
    found: dict[tuple[str, int], dict[str, Any]], names: Sequence[str], seeds: Sequence[int]
) -> dict[str, Any]:
    """The figures of all arms, with intervals, each arm beside plain fine-tuning with the same seeds and samples."""
    from qwen_scope.evidence.statistics import bootstrap

    def switches(name: str) -> np.ndarray:
        rows = [[each["switched"] for each in found[name, seed]["after"]["spoken"]] for seed in seeds]
        each = COMMON["texts_each"]
        return np.array(rows, dtype=float).reshape(len(seeds), -1, each).mean(2).T

    def losses(name: str, tag: str) -> np.ndarray:
        return np.array([found[name, seed]["after"]["losses"][tag] for seed in seeds]).T

    arms, plain = {}, names[0]
    for name in names:
        figures: dict[str, Any] = {
            "switch_ratio": vars(bootstrap(switches(name), RESAMPLES, 0)),
            "switch_ratio_of_each_seed": switches(name).mean(0).tolist(),
            "perplexity": {
                tag: float(np.mean([found[name, seed]["after"]["perplexity"][tag] for seed in seeds]))
                for tag in ("en", "zh")
            },
            "drift": [
                {
                    "layer": layer["layer"],
                    "fvu_after": float(
                        np.mean([found[name, seed]["drift"]["layers"][at]["fvu_after"] for seed in seeds])
                    ),
                    "overlap": float(np.mean([found[name, seed]["drift"]["layers"][at]["overlap"] for seed in seeds])),
                }
                for at, layer in enumerate(found[name, seeds[0]]["drift"]["layers"])
            ],
            "reduce_loss": [[row["reduce_loss"] for row in found[name, seed]["history"]] for seed in seeds],
        }
        if name != plain:
            figures["switches_less_sft"] = vars(bootstrap(switches(name) - switches(plain), RESAMPLES, 0))
            figures["loss_less_sft"] = {
                tag: vars(bootstrap(losses(name, tag) - losses(plain, tag), RESAMPLES, 0)) for tag in ("en", "zh")
            }
        arms[name] = figures
    return {
        "features": found[plain, seeds[0]]["features"],
        "arms": arms,
        "examples": {
            name: [each["prompt"] + "|" + each["text"] for each in found[name, seeds[0]]["after"]["spoken"][:4]]
            for name in names
        },
    }


def texts(work: Path) -> None:
    """Writes mixed.jsonl, clean.jsonl and held.jsonl, unless they are there."""
    if (work / "held.jsonl").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    english, chinese = paragraphs("en"), paragraphs("zh-cn")
    draw = random.Random(0)
    for of in (english, chinese):
        for chapter in of.values():
            draw.shuffle(chapter)
    train = {
        "en": [text for name, of in english.items() if name not in HELD_OUT for text in of],
        "zh": [text for name, of in chinese.items() if name not in HELD_OUT for text in of],
    }
    for of in train.values():
        draw.shuffle(of)
    count = min(map(len, train.values()))
    half = count // 2
    clean = [(text, tag) for tag, of in train.items() for text in of[half:count]]
    mixed = [(text, "zh") for text in train["zh"][:half]]
    others = draw.sample(train["zh"][:half], half)
    mixed += [
        (" ".join(text.split()[: draw.randint(5, 12)]) + " " + other, "en")
        for text, other in zip(train["en"][:half], others, strict=True)
    ]
    held = [
        (text, tag)
        for tag, of in (("en", english), ("zh", chinese))
        for text in [text for name in HELD_OUT for text in of[name]][:MEASURED_ON]
    ]
    for name, rows in (("mixed", mixed), ("clean", clean), ("held", held)):
        if name != "held":
            draw.shuffle(rows)
        lines = [json.dumps({"text": text, "language": tag}, ensure_ascii=False) for text, tag in rows]
        (work / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def paragraphs(code: str) -> dict[str, list[str]]:
    """Running text of each chapter of Debian Reference in a language."""
    with tempfile.TemporaryDirectory() as folder:
        package = f"debian-reference-{code}={VERSION}"
        # apt-get has no option for the folder and always writes into the current one.
        done = subprocess.run(
            ["sh", "-c", 'cd "$1" && apt-get download -q "$2"', "sh", folder, package], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"Cannot download {package}: {done.stderr.strip() or 'apt-get failed'}")
        (archive,) = Path(folder).glob("*.deb")
        data = payload(archive.read_bytes())
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            if chapter := re.search(r"/(ch\d+)\.[a-z-]+\.html$", member.name):
                file = tar.extractfile(member)
                reader = Paragraphs()
                reader.feed(file.read().decode() if file else "")
                found[chapter[1]] = [text[: LONGEST[code[:2]]] for text in reader.found if wanted(text, code)]
    return found


def wanted(text: str, code: str) -> bool:
    """Whether a paragraph is prose of its language alone."""
    chinese = len(re.findall(r"[\u4e00-\u9fff]", text))
    return (len(text) >= 80 and text.isascii()) if code == "en" else chinese >= max(20, 0.6 * len(text))


def payload(data: bytes) -> bytes:
    """The archive of files within a Debian package."""
    position = len(b"!<arch>\n")
    while position < len(data):
        header = data[position : position + 60]
        size = int(header[48:58])
        if header.startswith(b"data.tar"):
            return data[position + 60 : position + 60 + size]
        position += 60 + size + size % 2
    sys.exit("A Debian package holds no data.tar member.")


class Paragraphs(HTMLParser):
    """The text of an HTML page's paragraphs."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        """A paragraph begins."""
        if tag == "p":
            self.inside = True
            self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        """A paragraph ends."""
        if tag == "p":
            self.inside = False
            self.found[-1] = " ".join(self.found[-1].split())

    def handle_data(self, data: str) -> None:
        """Text, within a paragraph or not."""
        if self.inside:
            self.found[-1] += data


def with_table(text: str) -> str:
    """The text of the page with its table made anew from the figures."""
    return MARKED.sub(lambda match: match[1] + table(json.loads(RESULT.read_text(encoding="utf-8"))) + match[2], text)


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    head = (
        "model",
        "texts that switch (each seed)",
        "beside sft, 95 % interval",
        "perplexity en",
        "zh",
        "loss en beside sft, 95 % interval",
        "zh",
    )
    parts = []
    for kind, title in (("mending", "Mending a model that switches"), ("keeping", "Training on samples that switch")):
        rows = [
            stage(name, of) for name, of in result["stages"].items() if (name, kind) != ("made to switch", "keeping")
        ]
        rows += [row(name, of) for name, of in result[kind]["arms"].items()]
        parts.append(
            f"**{title}**\n\n" + "\n".join(f"| {' | '.join(of)} |" for of in (head, ["---"] * len(head), *rows))
        )
    return "\n\n".join(parts) + "\n"


def stage(name: str, of: dict[str, Any]) -> list[str]:
    """A row of a model before."""
    perplexity = of["perplexity"]
    return [name, f"{of['switch_ratio']:.1%}", "", f"{perplexity['en']:.2f}", f"{perplexity['zh']:.2f}", "", ""]


def row(name: str, of: dict[str, Any]) -> list[str]:
    """A row of an arm."""
    seeds = ", ".join(f"{value:.1%}" for value in of["switch_ratio_of_each_seed"])
    fewer, loss = of.get("switches_less_sft"), of.get("loss_less_sft")
    return [
        f"**{name}**",
        f"{of['switch_ratio']['mean']:.1%} ({seeds})",
        "–" if fewer is None else f"{fewer['mean']:+.1%}, {fewer['low']:+.1%} to {fewer['high']:+.1%}",
        f"{of['perplexity']['en']:.2f}",
        f"{of['perplexity']['zh']:.2f}",
        *(
            "–" if loss is None else f"{loss[tag]['mean']:+.3f}, {loss[tag]['low']:+.3f} to {loss[tag]['high']:+.3f}"
            for tag in ("en", "zh")
        ),
    ]


if __name__ == "__main__":
    main()
