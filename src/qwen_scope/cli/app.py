"""`qwen-scope app`: the web app."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from qwen_scope.app.config import AppConfig
from qwen_scope.cli.common import Index, Source, index_of, quiet_loading
from qwen_scope.errors import QwenScopeError

if TYPE_CHECKING:
    from qwen_scope.index.feature_index import FeatureIndex
    from qwen_scope.scope import Scope


@dataclass(frozen=True)
class App:
    """Opens the web app: prompts, comparisons, steering, features and data sets, in a browser."""

    source: tyro.conf.OmitArgPrefixes[Source] = Source()
    index: Index = None
    """Folder of a feature index. Default: the one that comes with the package, for its suite."""
    config: tyro.conf.OmitArgPrefixes[AppConfig] = AppConfig()

    def run(self) -> None:
        """Serves until Ctrl-C."""

        def opened() -> "tuple[Scope, FeatureIndex | None]":
            scope = self.source.open()
            return scope, index_of(self.source, scope, self.index)

        show(opened, self.config, opening=opening(self.source))


def show(
    opened: "Callable[[], tuple[Scope, FeatureIndex | None]]",
    config: AppConfig,
    *,
    opening: str,
    model: str | None = None,
    suite: str | None = None,
) -> None:
    """Loads the model and serves the page until Ctrl-C.

    Args:
        opened: loads the model and its SAEs, and opens their index if there is one.
        config: where it listens, who may use it, and how much.
        opening: the Python expression that opens the same scope.
        model: what the page calls the model. Default: its own name.
        suite: what it calls the SAEs. Default: theirs.

    Raises:
        QwenScopeError: Gradio is not installed, the address cannot be listened on, or the model cannot be opened.
    """
    quiet_loading()
    try:
        from qwen_scope.app.serve import running
        from qwen_scope.steering.recipe import model_name
    except ModuleNotFoundError as error:
        raise QwenScopeError(
            f"expected the package {error.name} to show the web app, found it is not installed; run pip install "
            "'qwen-scope[app]'"
        ) from error
    # What is wrong with it should be known before a model is loaded.
    config.password()
    scope, index = opened()
    if index is not None:
        # So that the first visitor does not wait for SAEs to load. A suite without an index may be too large to load unasked.
        scope.features("The first text takes longer.", errors=True)
    with running(scope, index, config, model=model, suite=suite, opening=opening) as address:
        print(
            f"{model_name(scope.backbone, scope.suite)} through {scope.suite.name}: open {address} in a browser (Ctrl-C ends it)",
            flush=True,
        )
        if not config.local and config.password_variable is None:
            sys.stderr.write(
                f"warning: anybody who can reach {config.host} may use it; ask for a password with --password-variable\n"
            )
        while True:
            time.sleep(3600)


def opening(source: Source) -> str:
    """The Python expression that opens the same scope."""
    given = [repr(each) for each in (source.model, source.suite)]
    while given and given[-1] == "None":
        given.pop()
    given += [f"{name}={value!r}" for name, value in (("k", source.k), ("device", source.device)) if value is not None]
    given += [f"layers={list(source.layers)!r}"] * bool(source.layers)
    given += [f"dtype={source.dtype!r}"] * (source.dtype != "float32")
    return f"Scope.from_pretrained({', '.join(given)})"
