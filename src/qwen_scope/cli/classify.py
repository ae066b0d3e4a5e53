"""`qwen-scope classify`: rules of a few features that tell classes of texts apart."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from qwen_scope.cli.common import Index, Source, given_texts, index_of, print_json
from qwen_scope.errors import QwenScopeError

if TYPE_CHECKING:
    from qwen_scope.data.items import Items

KEPT_BACK = 0.25
"""Share of each label's texts kept back for the test where no other texts are given."""


@dataclass(frozen=True)
class Labelled:
    """Where labelled texts are, and what is to be told apart."""

    positive: str
    """The label of the positive class; all others are negative together."""
    test: str | None = None
    """More texts with labels, to test on. Default: a quarter of each label's, drawn at random, is kept back."""
    label: str = "label"
    """Column that holds the label."""
    column: str | None = None
    """Column that holds the text. Default: `text`."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    test_split: str | None = None
    """Split to test on of the same dataset, or of --test."""
    subset: str | None = None
    """Configuration of a Hugging Face dataset, such as a language."""
    allow_duplicates: bool = False
    """Accept test texts that are among those learnt from."""
    seed: int = 0
    """What everything random follows from."""

    def sets(self, source: str) -> "tuple[Items, Items]":
        """Discovery and test texts. Rows that cannot be used are left out, and named on standard error."""
        from qwen_scope.data.classification.splitting import held_back

        items = self._items(source, self.split)
        if self.test is None and self.test_split is None:
            return held_back(items, KEPT_BACK, self.seed)
        return items, self._items(self.test or source, self.test_split or self.split)

    def _items(self, source: str, split: str) -> "Items":
        from qwen_scope.data.items import read_items

        broken: list[str] = []
        items = read_items(
            source, column=self.column, label=self.label, split=split, subset=self.subset, broken=broken.append
        )
        if broken:
            sys.stderr.write(f"left out {len(broken)} rows of {source}, the first: {broken[0]}\n")
        return items


@dataclass(frozen=True)
class Fit:
    """Learns a rule from labelled texts, tests it, and writes it to a file."""

    texts: tyro.conf.Positional[str]
    """Texts with labels: a JSONL, CSV or Parquet file, or a Hugging Face dataset."""
    rule: tyro.conf.Positional[Path]
    """The file to write, such as rule.json."""
    labelled: tyro.conf.OmitArgPrefixes[Labelled]
    kind: Literal["sparse", "or", "or-layers"] = "sparse"
    """A weighted vote of features of all layers, or the report's rule: positive where any of the best features of one layer, or
    the best one of any layer, fires."""
    most: int = 10
    """Features at most."""
    index: Index = None
    """Folder of a feature index that knows labels and examples. Default: the one that comes with the package, for its suite."""
    source: tyro.conf.OmitArgPrefixes[Source] = Source()
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Learns and prints."""
        _check_installed()
        _check_most(self.most)
        train, test = self.labelled.sets(self.texts)
        from qwen_scope.data.classification.fit import described, fit_rule

        scope = self.source.open()
        index = index_of(self.source, scope, self.index)
        rule = fit_rule(
            scope,
            train,
            self.labelled.positive,
            kind=self.kind,
            most=self.most,
            test=test,
            seed=self.labelled.seed,
            allow_duplicates=self.labelled.allow_duplicates,
        )
        rule = rule if index is None else described(rule, index)
        rule.save(self.rule)
        if self.json:
            print_json(rule.to_dict())
        else:
            print(f'{rule}\n\ntry it: qwen-scope classify explain {self.rule} "any text of yours"')


@dataclass(frozen=True)
class Apply:
    """Decides every text of a corpus and writes a row of JSON for each; goes on where it was stopped."""

    rule: tyro.conf.Positional[Path]
    """A rule that `fit` wrote."""
    corpus: tyro.conf.Positional[str]
    """What to read: a text, JSONL, CSV or Parquet file, a folder of files, or a Hugging Face dataset."""
    out: tyro.conf.Positional[Path]
    """The JSONL file to write, a row a text: place, positive, score, features that fire, and the text."""
    column: str | None = None
    """Column of the corpus that holds its text or chat messages. Default: `text`, `messages`, or the only one."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    subset: str | None = None
    """Configuration of a Hugging Face dataset, such as a language."""
    source: tyro.conf.OmitArgPrefixes[Source] = Source()
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Decides and tells how many."""
        _check_installed()
        from qwen_scope.data.classification.apply import apply
        from qwen_scope.data.classification.rule import Rule

        rule = Rule.load(self.rule)
        done = apply(
            rule, self.source.open(), self.corpus, self.out, column=self.column, split=self.split, subset=self.subset
        )
        if self.json:
            print_json(done.to_dict())
            return
        print(f"{done.positive} of {done.texts} texts are {rule.positive!r}; every text is in {self.out}")
        if done.undecided:
            print(f"{done.undecided} cannot be read by the model; their rows say why")
        if done.left_out_first:
            print(f"left out {done.left_out} lines or rows that cannot be read, the first: {done.left_out_first[0]}")


@dataclass(frozen=True)
class Explain:
    """What a rule says of texts, and which tokens decide it."""

    rule: tyro.conf.Positional[Path]
    """A rule that `fit` wrote."""
    texts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts, each in quotes."""
    file: Path | None = None
    """Read texts from a file instead, one a line; `-` is standard input."""
    source: tyro.conf.OmitArgPrefixes[Source] = Source()
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Explains and prints."""
        _check_installed()
        texts = given_texts(self.texts, self.file)
        if not texts:
            raise QwenScopeError(
                'expected a text to explain, found none; try: qwen-scope classify explain rule.json "any text of yours"'
            )
        from qwen_scope.data.classification.rule import Rule

        rule = Rule.load(self.rule)
        scope = self.source.open()
        found = [rule.explain(scope, text) for text in texts]
        if self.json:
            print_json([{"text": text, **each.to_dict()} for text, each in zip(texts, found, strict=True)])
            return
        print("\n\n".join(f"{text!r}\n{each}" for text, each in zip(texts, found, strict=True)))


@dataclass(frozen=True)
class Evaluate:
    """Rules of features beside bag of words, linear probes and length alone, on texts that none of them learnt from."""

    texts: tyro.conf.Positional[str]
    """Texts with labels: a JSONL, CSV or Parquet file, or a Hugging Face dataset."""
    folder: tyro.conf.Positional[Path]
    """Where evaluation.json and evaluation.png go."""
    labelled: tyro.conf.OmitArgPrefixes[Labelled]
    most: int = 20
    """Features of the sparse rule at most."""
    source: tyro.conf.OmitArgPrefixes[Source] = Source()
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> None:
        """Compares and prints."""
        _check_installed()
        _check_most(self.most)
        train, test = self.labelled.sets(self.texts)
        from qwen_scope.data.classification.evaluate import evaluate

        found = evaluate(
            self.source.open(),
            train,
            test,
            self.labelled.positive,
            most=self.most,
            seed=self.labelled.seed,
            allow_duplicates=self.labelled.allow_duplicates,
        )
        plot = found.save(self.folder)
        if self.json:
            print_json(found.to_dict())
        else:
            print(f"{found}\n\nplot: {plot}")


@dataclass(frozen=True)
class Classify:
    """Tells classes of texts apart by a few features: learns a rule, applies it, explains it, compares it with baselines."""

    do: (
        Annotated[Fit, tyro.conf.subcommand("fit")]
        | Annotated[Apply, tyro.conf.subcommand("apply")]
        | Annotated[Explain, tyro.conf.subcommand("explain")]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    )

    def run(self) -> None:
        """Does what is asked for."""
        self.do.run()


def _check_most(most: int) -> None:
    """Raises a QwenScopeError unless so many features can be asked for: before any text is read."""
    if most < 1:
        raise QwenScopeError(f"expected --most of at least 1, found {most}; ask for one or more features")


def _check_installed() -> None:
    """Raises a QwenScopeError unless the packages that classification needs are there."""
    try:
        import matplotlib  # noqa: F401

        import qwen_scope.data.classification  # noqa: F401
    except ModuleNotFoundError as error:
        raise QwenScopeError(
            f"expected the package {error.name} to classify texts, found it is not installed; run pip install "
            "'qwen-scope[data]'"
        ) from error
