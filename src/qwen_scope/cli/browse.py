"""`qwen-scope show`, `search`, `pages` and `sql`: what a feature index knows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from qwen_scope.cli.common import Index, Layers, open_index, print_json, quiet_loading
from qwen_scope.errors import QwenScopeError


@dataclass(frozen=True)
class Show:
    """What a feature does: label, statistics, tokens, neighbours and examples."""

    features: tyro.conf.Positional[tuple[str, ...]]
    """Features, such as 15/123."""
    index: Index = None
    """Folder of a feature index. Default: the one that comes with the package."""
    examples: int = 6
    """Examples shown, of the strongest and of those across its range; `--json` has them all."""
    json: bool = False
    """Print JSON instead."""

    def run(self) -> None:
        """Looks up and prints."""
        if self.examples < 0:
            raise QwenScopeError(
                f"expected --examples of 0 or more, found {self.examples}; ask for as many as you like"
            )
        if not self.features:
            raise QwenScopeError("expected a feature to show, found none; try: qwen-scope show 15/123")
        index = open_index(self.index)
        found = [index[name] for name in self.features]
        if self.json:
            print_json([feature.to_dict() for feature in found])
            return
        from qwen_scope.index.show import feature_text

        print("\n\n".join(feature_text(feature, self.examples) for feature in found))


@dataclass(frozen=True)
class Search:
    """Which features are about something: full text over labels, tokens and examples, best first."""

    words: tyro.conf.Positional[tuple[str, ...]]
    """What to search for."""
    index: Index = None
    """Folder of a feature index. Default: the one that comes with the package."""
    layers: Layers = ()
    """Layers to search in. Default: all."""
    count: int = 10
    """Features shown."""
    by: Literal["words", "meaning"] = "words"
    """`meaning` compares sentence embeddings, for which a package with a small model must be installed."""
    json: bool = False
    """Print JSON instead."""

    def run(self) -> None:
        """Searches and prints."""
        index = open_index(self.index)
        if self.by == "meaning":
            quiet_loading()
        hits = index.search(" ".join(self.words), count=self.count, layers=self.layers or None, by=self.by)
        if self.json:
            print_json([hit.to_dict() for hit in hits])
            return
        from qwen_scope.index.show import hits_text

        print(hits_text(hits) if hits else "nothing found; try other words, or --by meaning")


@dataclass(frozen=True)
class Pages:
    """Writes features as web pages that need no server and no network, with an overview."""

    folder: tyro.conf.Positional[Path]
    """Where the pages go."""
    features: tyro.conf.Positional[tuple[str, ...]] = ()
    """Features, such as 15/123. Default: all that have a label."""
    index: Index = None
    """Folder of a feature index. Default: the one that comes with the package."""
    count: int | None = None
    """Instead of those, so many of each layer: those that fire most often without being common."""

    def run(self) -> None:
        """Writes and tells where to look."""
        if self.features and self.count is not None:
            raise QwenScopeError(f"expected features or --count, found both ({self.count}); give one of them")
        index = open_index(self.index)
        from qwen_scope.index.labelling import features_to_label
        from qwen_scope.index.pages import export

        names = self.features or (None if self.count is None else features_to_label(index, count=self.count))
        print(f"open in a browser: {export(index, self.folder, names)}")


@dataclass(frozen=True)
class Sql:
    """Answers a query over the tables `features`, `examples`, `labels`, `documents` and, where they were kept, `pairs`."""

    query: tyro.conf.Positional[str]
    """Such as: SELECT layer, feature, density FROM features ORDER BY density DESC LIMIT 10"""
    index: Index = None
    """Folder of a feature index. Default: the one that comes with the package."""
    json: bool = False
    """Print JSON instead of a table: a list of rows."""

    def run(self) -> None:
        """Asks and prints."""
        found = open_index(self.index).sql(self.query)
        if self.json:
            print_json(found.to_pylist())
            return
        from qwen_scope.index.show import table_text

        print(table_text(found))
