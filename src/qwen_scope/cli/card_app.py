"""`python app.py`: the web app with the flags of the model card's demo."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from qwen_scope.app.config import AppConfig
from qwen_scope.cli import finish
from qwen_scope.cli.app import opening, show
from qwen_scope.cli.common import Source, index_of
from qwen_scope.errors import QwenScopeError

if TYPE_CHECKING:
    from qwen_scope.index.feature_index import FeatureIndex
    from qwen_scope.scope import Scope


@dataclass(frozen=True)
class CardApp:
    """The web app with the flags of the model card's demo; without any, on the model and SAEs that come with the package."""

    model: str | None = None
    """Language model: hub id or folder. Default: the suite's own backbone, or the bundled model."""
    model_name_sae_trained_from: str | None = None
    """What the page calls the model that the SAEs were trained on. Default: the suite's name."""
    model_name_analyzing_now: str | None = None
    """What the page calls the model that is read. Default: its own name."""
    sae_path: str | None = None
    """SAEs: hub id, folder or file. Default: the bundled suite."""
    top_k: int | None = None
    """Features kept per token. Default: what the suite says."""
    num_layers: int | None = None
    """Offer only the layers below this number."""
    sae_width: int | None = None
    """Features of a layer; only checked, as the files say it."""
    d_model: int | None = None
    """Width of the residual stream; only checked, as the files say it."""
    sae_cache_max: int | None = None
    """Layers whose SAEs are kept in memory at most. Default: as many as half of it holds."""
    server_port: int = 7860
    """Port to listen on, on this machine alone."""

    def run(self) -> None:
        """Serves until Ctrl-C."""
        if self.sae_cache_max is not None and self.sae_cache_max < 1:
            raise QwenScopeError(
                f"expected --sae-cache-max of at least 1, found {self.sae_cache_max}; one layer is needed at a time"
            )
        source = Source(self.model, self.sae_path, k=self.top_k)
        suite = self.model_name_sae_trained_from
        show(
            lambda: self._opened(source),
            AppConfig(port=self.server_port),
            opening=opening(source),
            model=self.model_name_analyzing_now,
            suite=None if suite is None else f"SAEs trained on {suite}",
        )

    def _opened(self, source: Source) -> "tuple[Scope, FeatureIndex | None]":
        scope = source.open()
        suite = scope.suite
        suite.most_layers = self.sae_cache_max
        if self.num_layers is not None:
            scope.layers = [layer for layer in scope.layers if layer < self.num_layers]
            if not 0 < self.num_layers <= len(scope.backbone.layers) or not scope.layers:
                raise QwenScopeError(
                    f"expected --num-layers from {min(suite.layers) + 1} to {len(scope.backbone.layers)}, the layers of "
                    f"{scope.backbone.name}, found {self.num_layers}; correct it or leave it out"
                )
        if self.d_model not in (None, suite.d_model):
            raise QwenScopeError(
                f"expected --d-model {suite.d_model}, as {suite.name} has it, found {self.d_model}; correct it or leave it out"
            )
        # Of one layer alone: a wrong number should not fetch them all.
        if self.sae_width is not None and self.sae_width != (width := suite[scope.layers[0]].d_sae):
            raise QwenScopeError(
                f"expected --sae-width {width}, as {suite.name} has it, found {self.sae_width}; correct it or leave it out"
            )
        return scope, index_of(source, scope, None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs it; `arguments` default to those of the process."""
    finish(tyro.cli(CardApp, prog="app.py", args=arguments, config=(tyro.conf.FlagCreatePairsOff,)).run)
