"""`qwen-scope serve`: an OpenAI-compatible server whose answers can be steered."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from qwen_scope.cli.common import Index, Source, index_of
from qwen_scope.errors import QwenScopeError
from qwen_scope.server.config import ServerConfig

if TYPE_CHECKING:
    from qwen_scope.index.feature_index import FeatureIndex
    from qwen_scope.scope import Scope

CAUTION = (
    "caution: outside scientific research, it must not be used to interfere with a model's capabilities or to make and spread "
    "harmful content"
)


@dataclass(frozen=True)
class Serve:
    """Serves the model to OpenAI's clients: chats and completions that can be steered, features, and the feature index."""

    source: tyro.conf.OmitArgPrefixes[Source] = Source()
    index: Index = None
    """Folder of a feature index. Default: the one that comes with the package, for its suite."""
    config: tyro.conf.OmitArgPrefixes[ServerConfig] = ServerConfig()

    def run(self) -> None:
        """Listens until Ctrl-C."""
        try:
            from qwen_scope.server.listen import address, listening, serve
        except ModuleNotFoundError as error:
            raise QwenScopeError(
                f"expected the package {error.name} to serve, found it is not installed; run pip install 'qwen-scope[server]'"
            ) from error
        self.config.api_key()
        with listening(self.config) as listener:
            scope = self.source.open()
            index = self._index(scope)

            def started() -> None:
                print(
                    f"serving {scope.backbone.name} with {scope.suite.name} on {address(listener)}/v1 (Ctrl-C ends it)"
                )
                print(CAUTION, flush=True)
                if not self.config.local and self.config.api_key_variable is None:
                    sys.stderr.write(
                        f"warning: anybody who can reach {self.config.host} may use it; ask for a key with --api-key-variable\n"
                    )

            serve(scope, index, self.config, listener, started)

    def _index(self, scope: "Scope") -> "FeatureIndex | None":
        """The index of the suite that is served; its highest activations are what strengths are counted in."""
        index = index_of(self.source, scope, self.index)
        if index is not None and set(scope.layers) <= set(index.layers):
            scope.maxima = index.maxima
        return index
