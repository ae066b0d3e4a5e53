"""One typed dataclass per command; tyro makes the options and the help from fields and docstrings.

Nothing heavy is imported before a command runs, so that `--help` is quick.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from qwen_scope.cli.app import App
from qwen_scope.cli.benchmarks import Benchmarks
from qwen_scope.cli.browse import Pages, Search, Show, Sql
from qwen_scope.cli.classify import Classify
from qwen_scope.cli.common import Layers, Source, given_texts, names_of, print_json, quiet_loading
from qwen_scope.cli.find import Find
from qwen_scope.cli.finetune import Finetune
from qwen_scope.cli.harvest import Harvest
from qwen_scope.cli.label import Label
from qwen_scope.cli.serve import Serve
from qwen_scope.cli.steer import Steer
from qwen_scope.cli.synthesize import Synthesize
from qwen_scope.cli.vectors import Vectors
from qwen_scope.errors import QwenScopeError
from qwen_scope.training.run_config import RunConfig


@dataclass(frozen=True)
class Features:
    """The features of texts at each token, strongest first."""

    texts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts to read, each in quotes."""
    source: tyro.conf.OmitArgPrefixes[Source] = Source()
    file: Path | None = None
    """Read texts from a file instead, one a line; `-` is standard input."""
    chat: bool = False
    """Read each text as a user's message through the model's chat template."""
    top: int = 8
    """Features shown per token."""
    json: bool = False
    """Print JSON instead of a table."""
    save: Path | None = None
    """Also write the whole result (all k features) to this safetensors file; takes a single text."""

    def run(self) -> None:
        """Reads and prints."""
        texts = given_texts(self.texts, self.file)
        if not texts:
            raise QwenScopeError(
                'expected a text to read, found none; try: qwen-scope features "The capital of France is"'
            )
        if self.top < 1:
            raise QwenScopeError(f"expected --top of at least 1, found {self.top}; ask for one or more features")
        if self.save is not None and len(texts) > 1:
            raise QwenScopeError(f"expected a single text with --save, found {len(texts)}; save them one at a time")
        from qwen_scope.render import layer_table

        scope = self.source.open()
        inputs = [[{"role": "user", "content": text}] for text in texts] if self.chat else texts
        results = scope.features(inputs)
        if self.save is not None:
            results[0].save(self.save)
        if self.json:
            print_json({**names_of(scope), "texts": [result.to_dict(self.top) for result in results]})
            return
        for result in results:
            print(f"{result.text!r}")
            for layer in result:
                print(f"\n{layer_table(layer.top(self.top))}")
            print()


@dataclass(frozen=True)
class Check:
    """How well the SAEs fit the model, and which classic mistake explains it if they do not.

    Exits with status 1 if a mistake was found.
    """

    source: tyro.conf.OmitArgPrefixes[Source] = Source()
    file: Path | None = None
    """Measure on the texts of a file, one a line, instead of the built-in sample; `-` is standard input."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> None:
        """Measures and prints."""
        texts = given_texts((), self.file)
        report = self.source.open().check(texts or None)
        if self.json:
            print_json(report.to_dict())
        else:
            print(report)
        if not report.ok:
            sys.exit(1)


@dataclass(frozen=True)
class Suites:
    """The suites that can be used by name: the 14 published groups and the bundled one."""

    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> None:
        """Lists them."""
        from qwen_scope.bundled import suite_config
        from qwen_scope.catalog import PUBLISHED

        rows: list[dict[str, Any]] = [
            {
                "name": group.short_name,
                "repository": group.repo_id,
                "backbone": group.backbone,
                "layers": group.n_layers,
                "d_model": group.d_model,
                "d_sae": group.d_sae,
                "k": group.k,
                "bytes_per_layer": 4 * (2 * group.d_model * group.d_sae + group.d_model + group.d_sae),
            }
            for group in PUBLISHED
        ]
        bundled = suite_config()
        if self.json:
            print_json({"bundled": json.loads(bundled.to_json()), "published": rows})
            return
        print(f"{'name':<24} {'layers':>6} {'d_model':>7} {'d_sae':>7} {'k':>4} {'GB a layer':>10}  repository")
        for row in rows:
            print(
                f"{row['name']:<24} {row['layers']:>6} {row['d_model']:>7} {row['d_sae']:>7} {row['k']:>4} "
                f"{row['bytes_per_layer'] / 1e9:>10.2f}  {row['repository']}"
            )
        layers = ", ".join(f"{layer} (d_sae {d_sae})" for layer, d_sae in bundled.layers.items())
        print(
            f"\nbundled, used when no suite is named: {bundled.name} for {bundled.backbone}, k {bundled.k}, layers {layers}"
        )


@dataclass(frozen=True)
class Convert:
    """Writes a suite of SAEs in another file format."""

    source: tyro.conf.Positional[str]
    """Suite to read: hub id, catalogue name, folder or file."""
    folder: tyro.conf.Positional[Path]
    """Folder to write; layers can be added to one that already holds the same suite."""
    format: Literal["safetensors", "published", "sae-lens", "sparsify"] = "safetensors"
    """`safetensors` with our config.json, the `published` layer{n}.sae.pt, or another library's layout."""
    layers: Layers = ()
    """Only these layers. Default: all."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the tensors written. Default: as they are."""
    k: int | None = None
    """Features kept per token, where nothing in the source says it."""

    def run(self) -> None:
        """Reads and writes, a layer at a time."""
        from qwen_scope.devices import as_dtype
        from qwen_scope.suite import Suite

        suite = Suite.from_pretrained(self.source, k=self.k, layers=self.layers or None)
        suite.save_pretrained(self.folder, self.format, dtype=as_dtype(self.dtype) if self.dtype else None)
        print(f"wrote layers {', '.join(map(str, suite.layers))} of {suite.name} to {self.folder} as {self.format}")
        if "model_file_sha256" in suite.provenance and self.format in ("sae-lens", "sparsify"):
            print("this format cannot say that the SAEs belong to the bundled model; read them with --model bundled")


@dataclass(frozen=True)
class Train:
    """Trains SAEs of some layers of a language model on a corpus; goes on where it was stopped."""

    corpus: tyro.conf.Positional[str]
    """What to read: a text, JSONL, CSV or Parquet file, a folder of files, or a Hugging Face dataset."""
    folder: tyro.conf.Positional[Path]
    """Where the suite and its report go; its progress too."""
    config: tyro.conf.OmitArgPrefixes[RunConfig]

    def run(self) -> None:
        """Trains and tells where to look."""
        quiet_loading()
        from qwen_scope.training.run import train

        suite = train(self.corpus, self.folder, self.config)
        layer = suite.layers[0]
        print(
            f"{suite}\nreport: {self.folder / 'README.md'}\ntry it: qwen-scope check --suite {self.folder}\n"
            f'        qwen-scope features "any text of yours" --suite {self.folder} --layer {layer}'
        )


@dataclass(frozen=True)
class Demo:
    """Features of a few real sentences on the bundled model and SAEs, and what to try next."""

    def run(self) -> None:
        """Shows them."""
        from qwen_scope.cli.demo import demo

        demo(Source().open())


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Features, tyro.conf.subcommand("features")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Suites, tyro.conf.subcommand("suites")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Finetune, tyro.conf.subcommand("finetune")]
    | Annotated[Harvest, tyro.conf.subcommand("harvest")]
    | Annotated[Label, tyro.conf.subcommand("label")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Search, tyro.conf.subcommand("search")]
    | Annotated[Pages, tyro.conf.subcommand("pages")]
    | Annotated[Sql, tyro.conf.subcommand("sql")]
    | Annotated[Find, tyro.conf.subcommand("find")]
    | Annotated[Benchmarks, tyro.conf.subcommand("benchmarks")]
    | Annotated[Classify, tyro.conf.subcommand("classify")]
    | Annotated[Synthesize, tyro.conf.subcommand("synthesize")]
    | Annotated[Steer, tyro.conf.subcommand("steer")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
    | Annotated[App, tyro.conf.subcommand("app")]
    | Annotated[Vectors, tyro.conf.subcommand("vectors")]
)
"""All commands."""
