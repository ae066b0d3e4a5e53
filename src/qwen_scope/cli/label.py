"""`qwen-scope label`: labels by hand, by a model behind an endpoint, and out of files."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from qwen_scope.cli.common import Index, Layers, open_index
from qwen_scope.errors import QwenScopeError
from qwen_scope.index.label_config import LabelConfig

if TYPE_CHECKING:
    from qwen_scope.index.feature_index import FeatureIndex


@dataclass(frozen=True)
class Label:
    """Labels features: asks a model behind an OpenAI-compatible endpoint, or takes what people write.

    Says what it will take before it starts, keeps every answer at once, and goes on where it was stopped. Exits with status 1
    if some features have no usable answer.
    """

    index: Index = None
    """Folder of a feature index. Default: the one that comes with the package."""
    features: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--feature",), metavar="LAYER/NUMBER…")] = ()
    """Features to label, such as 15/123. Default: `count` of each layer, those that fire most often without being common."""
    layers: Layers = ()
    """Layers to take features from if none are named. Default: all."""
    count: int = 50
    """How many of each layer if none are named."""
    endpoint: str | None = None
    """Address of the endpoint, such as http://127.0.0.1:8000/v1."""
    model: str | None = None
    """What the endpoint calls the model."""
    key_variable: str | None = None
    """Environment variable that holds the key, such as OPENAI_API_KEY. Default: no key is sent."""
    timeout: float = 60.0
    """Seconds that one attempt to get an answer may take."""
    retries: int = 4
    """Further attempts after overload, server errors and time-outs, each after a longer pause."""
    concurrency: int = 4
    """Questions on their way at once."""
    answer_tokens: int = 256
    """Most tokens of an answer; models that think first need thousands."""
    config: tyro.conf.OmitArgPrefixes[LabelConfig] = field(default_factory=LabelConfig)
    text: str | None = None
    """Instead of asking, label the one feature named by hand; an empty text takes its label back."""
    import_file: Annotated[Path | None, tyro.conf.arg(name="import", metavar="FILE")] = None
    """Instead of asking, take in labels from a file of JSON lines."""
    export_file: Annotated[Path | None, tyro.conf.arg(name="export", metavar="FILE")] = None
    """Instead of asking, write all labels to a file of JSON lines."""

    def run(self) -> None:
        """Does what is asked for."""
        asked = [self.endpoint is not None, self.text is not None, bool(self.import_file), bool(self.export_file)]
        if sum(asked) != 1:
            raise QwenScopeError(
                f"expected one of --endpoint, --text, --import and --export, found {sum(asked)} of them; say what to do"
            )
        index = open_index(self.index)
        if self.text is not None:
            self._by_hand(index, self.text)
        elif self.import_file is not None:
            imported = index.labels.import_(self.import_file)
            print(imported)
            if imported.broken and not imported.added + imported.older:
                sys.exit(1)
        elif self.export_file is not None:
            print(f"wrote {index.labels.export(self.export_file)} labels to {self.export_file}")
        else:
            self._ask(index)

    def _by_hand(self, index: "FeatureIndex", text: str) -> None:
        if len(self.features) != 1:
            raise QwenScopeError(
                f"expected one feature with --text, found {len(self.features)}; name it, such as --feature 15/123"
            )
        index.label(self.features[0], text)
        print(f"{self.features[0]}: {text}" if text.strip() else f"{self.features[0]}: label by hand taken back")

    def _ask(self, index: "FeatureIndex") -> None:
        if self.endpoint is None or self.model is None:
            raise QwenScopeError("expected a model with --endpoint, found none; give --model, as the endpoint calls it")
        from qwen_scope.index.endpoint import Endpoint
        from qwen_scope.index.labelling import features_to_label, label

        endpoint = Endpoint(
            self.endpoint,
            self.model,
            key_variable=self.key_variable,
            timeout=self.timeout,
            retries=self.retries,
            concurrency=self.concurrency,
            answer_tokens=self.answer_tokens,
        )
        features = self.features or features_to_label(index, self.layers or None, self.count)
        report = label(index, features, endpoint, self.config, told=lambda plan: print(plan, flush=True))
        print(report)
        if report.failed or (report.scores and report.scores.failed):
            sys.exit(1)
