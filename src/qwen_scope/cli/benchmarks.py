"""`qwen-scope benchmarks`: which sets repeat themselves or each other, seen through features."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from qwen_scope.cli.common import Source, print_json
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import is_file, is_folder

FIELDS = {"name", "source", "column", "template", "split", "subset"}
LAYER = 15
"""Whose features unless told: the middle one of the bundled suite."""


@dataclass(frozen=True)
class Benchmarks:
    """How redundant sets are, how much they share, what each adds; of two, which features differ. As table, plots and a page."""

    folder: tyro.conf.Positional[Path]
    """Where footprints, plots and report.html go. Footprints already there are not made again."""
    sets: tyro.conf.Positional[tuple[str, ...]] = ()
    """Sets: files, folders or Hugging Face datasets, each perhaps as NAME=SOURCE."""
    source: tyro.conf.OmitArgPrefixes[Source] = Source()
    spec: Path | None = None
    """More sets from a JSON file: a list of objects with name, source, and perhaps column, template, split, subset."""
    position: Literal["last", "any"] = "last"
    """Count what fires at the last token of each item, as the report does, or at any."""
    column: str | None = None
    """Column that holds the text of the sets named on the command line."""
    template: str | None = None
    """Instead, a text made of columns, such as 'Question: {question}'; \\n is a new line."""
    split: str = "train"
    """Of Hugging Face datasets, the split to read."""
    count: int | None = None
    """Read so many items of each set at most."""
    resamples: int = 100
    """Half-samples that the intervals of overlaps rest on; 0 for none."""
    scores: Path | None = None
    """A panel's scores from a JSON file, {"set": [[of model 1 at each item], [of model 2], …], …}: do they agree?"""
    general: str | None = None
    """With --scores, the set of general ability that is taken out of the similarity of others."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> None:
        """Reads the sets and prints what they share."""
        layers = self.source.layers or (LAYER,)
        if len(layers) != 1:
            raise QwenScopeError(f"expected one --layer, found {len(layers)}; run the command for each")
        if self.resamples < 0:
            raise QwenScopeError(
                f"expected --resamples of 0 or more, found {self.resamples}; choose 0 for no intervals"
            )
        wanted = self._wanted()
        try:
            from qwen_scope.bundled import suite_folder
            from qwen_scope.data.footprints import footprints, stamp
            from qwen_scope.data.panel import read_scores
            from qwen_scope.data.study import study
            from qwen_scope.files import from_anywhere
        except ModuleNotFoundError as error:
            raise QwenScopeError(
                f"expected the package {error.name} to compare sets, found it is not installed; run pip install "
                "'qwen-scope[data]'"
            ) from error

        scores = None if self.scores is None else read_scores(self.scores)
        source = replace(self.source, layers=layers)
        names = {
            name: value and from_anywhere(value) for name, value in (("model", source.model), ("suite", source.suite))
        }
        # A suite that was trained on has the same name.
        files = [stamp(place) for place in (names["model"], names["suite"] or str(suite_folder())) if place]
        made = footprints(
            source.open,
            wanted,
            self.folder / "footprints",
            layer=layers[0],
            position=self.position,
            count=self.count,
            read_with={**names, "files": files, "k": source.k, "dtype": source.dtype},
        )
        found = study(made, resamples=self.resamples, scores=scores, general=self.general)
        page = found.save(self.folder)
        if self.json:
            print_json(found.to_dict())
        else:
            print(f"{found}\n\nopen in a browser: {page}")

    def _wanted(self) -> list[dict[str, Any]]:
        template = None if self.template is None else self.template.replace("\\n", "\n")
        options = {"column": self.column, "template": template, "split": self.split}
        wanted: list[dict[str, Any]] = []
        for each in self.sets:
            name, equals, source = each.partition("=")
            named = (
                {"name": name, "source": source}
                if equals
                else {"name": Path(each).name.partition(".")[0], "source": each}
            )
            wanted.append({**named, **options})
        if self.spec is not None:
            wanted += _read_spec(self.spec)
        if not wanted:
            raise QwenScopeError(
                "expected sets to compare, found none; try: qwen-scope benchmarks out maths=gsm8k.jsonl code=humaneval.jsonl"
            )
        names = [each["name"] for each in wanted]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise QwenScopeError(f"expected sets of different names, found {twice[0]} twice; name them as NAME=SOURCE")
        return wanted


def _read_spec(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise QwenScopeError(
            f"expected a JSON file of sets at {path}, found none that reads ({error}); check it"
        ) from error
    whole = isinstance(found, list) and all(
        isinstance(each, dict)
        and {"name", "source"} <= set(each) <= FIELDS
        and all(isinstance(value, str) for value in each.values())
        for each in found
    )
    if not whole:
        raise QwenScopeError(
            f"expected a list of sets with name, source and perhaps column, template, split and subset in {path}, found another "
            "form; correct it"
        )
    # Sources are named from where the file is, as in any list of files.
    beside = {each["source"]: path.parent / each["source"] for each in found}
    return [
        each | {"source": str(place)} if is_file(place := beside[each["source"]]) or is_folder(place) else each
        for each in found
    ]
