"""`qwen-scope find`: which features separate these texts from those."""

from dataclasses import dataclass
from pathlib import Path

from qwen_scope.cli.common import Index, Layers, given_texts, names_of, open_index, print_json, quiet_loading
from qwen_scope.errors import QwenScopeError


@dataclass(frozen=True)
class Find:
    """Which features fire in these texts but not, or less often, in those; without others to compare with, than in the corpus.

    With --text and --span: which fire on a part of one text, such as what is wrong in an answer, but not elsewhere in it.
    """

    positive: tuple[str, ...] = ()
    """Texts to find features of, each in quotes."""
    negative: tuple[str, ...] = ()
    """Texts to compare with. Default: the corpus of the index."""
    positive_file: Path | None = None
    """More positive texts from a file, one a line; `-` is standard input."""
    negative_file: Path | None = None
    """More negative texts from a file, one a line."""
    text: str | None = None
    """One text to diagnose, instead of texts to compare."""
    span: tuple[str, ...] = ()
    """With --text, the parts of it to find features of, as they are written there; every place where one occurs counts."""
    index: Index = None
    """Folder of a feature index. Default: the one that comes with the package."""
    layers: Layers = ()
    """Layers to search. Default: all of the index."""
    count: int = 20
    """Features shown at most."""
    only: bool = False
    """Only features that fire at none of the negative tokens: what fires here but not there."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> None:
        """Reads the texts and prints what was found."""
        positive = [*self.positive, *given_texts((), self.positive_file)]
        negative = [*self.negative, *given_texts((), self.negative_file)]
        self._check(bool(positive), bool(negative))
        quiet_loading()
        index = open_index(self.index)
        if self.text is not None:
            found = index.diagnose(self.text, self.span, layers=self.layers or None, count=self.count, only=self.only)
        else:
            found = index.find(positive, negative or None, layers=self.layers or None, count=self.count, only=self.only)
        if self.json:
            print_json({**names_of(index.scope), **found.to_dict()})
        else:
            print(found)

    def _check(self, positive: bool, negative: bool) -> None:
        """Raises a QwenScopeError unless there are either texts to compare, or one text and parts of it."""
        if (self.text is not None or self.span) and (positive or negative):
            raise QwenScopeError(
                "expected either --text with --span, or texts to compare, found both; give a text's parts, or whole texts"
            )
        if self.text is None and self.span:
            raise QwenScopeError("expected --text, the text that --span is a part of, found none; give both")
        if self.text is not None and not self.span:
            raise QwenScopeError("expected --span, the part of --text to find features of, found none; give both")
        if self.text is None and not positive:
            raise QwenScopeError(
                'expected texts to find features of, found none; try: qwen-scope find --positive "Bonjour, je voudrais un café"'
            )
