"""`qwen-scope benchmarks`: which sets repeat themselves or each other, seen through features."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from qwen_scope.cli.common import Source, print_json
from qwen_scope.errors import QwenScopeError

FIELDS = {"name", "source", "column", "template", "split", "subset"}


@dataclass(frozen=True)
class Benchmarks:
    """Footprints of sets: how redundant each is, how much they share, what each adds; as table, plots and a page."""

    folder: tyro.conf.Positional[Path]
    """Where footprints, plots and report.html go. Footprints already there are not made again."""
    sets: tyro.conf.Positional[tuple[str, ...]] = ()
    """Sets: files, folders or Hugging Face datasets, each perhaps as NAME=SOURCE."""
    spec: Path | None = None
    """More sets from a JSON file: a list of objects with name, source, and perhaps column, template, split, subset."""
    layer: int = 15
    """Whose features, counted from 0."""
    position: Literal["last", "any"] = "last"
    """Count what fires at the last token of each item, as the report does, or at any."""
    column: str | None = None
    """Column that holds the text of the sets named on the command line."""
    template: str | None = None
    """Instead, a text made of columns, such as 'Question: {question}'; \\n is a new line."""
    count: int | None = None
    """Read so many items of each set at most."""
    resamples: int = 100
    """Half-samples that the intervals of overlaps rest on; 0 for none."""
    source: Annotated[Source, tyro.conf.arg(name="")] = Source()
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> None:
        """Reads the sets and prints what they share."""
        wanted = self._wanted()
        from qwen_scope.data.footprints import footprints
        from qwen_scope.data.study import study

        made = footprints(
            self.source.open,
            wanted,
            self.folder / "footprints",
            layer=self.layer,
            position=self.position,
            count=self.count,
        )
        found = study(made, resamples=self.resamples)
        page = found.save(self.folder)
        if self.json:
            print_json(found.to_dict())
        else:
            print(f"{found}\n\nopen in a browser: {page}")

    def _wanted(self) -> list[dict[str, Any]]:
        template = None if self.template is None else self.template.replace("\\n", "\n")
        named = []
        for each in self.sets:
            name, equals, source = each.partition("=")
            named.append((name, source) if equals else (Path(each).name.partition(".")[0], each))
        wanted = [
            {"name": name, "source": source, "column": self.column, "template": template} for name, source in named
        ]
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
    except (OSError, ValueError) as error:
        raise QwenScopeError(
            f"expected a JSON file of sets at {path}, found none that reads ({error}); check it"
        ) from error
    whole = isinstance(found, list) and all(
        isinstance(each, dict)
        and {"name", "source"} <= set(each) <= FIELDS
        and all(isinstance(v, str) for v in each.values())
        for each in found
    )
    if not whole:
        raise QwenScopeError(
            f"expected a list of sets with name, source and perhaps column, template, split and subset in {path}, found another "
            "form; correct it"
        )
    # Sources are named from where the file is, as in any list of files.
    beside = [
        each | {"source": str(path.parent / each["source"])} if (path.parent / each["source"]).exists() else each
        for each in found
    ]
    return beside
