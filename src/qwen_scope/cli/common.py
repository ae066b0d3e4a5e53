"""What several commands share: the model and suite, or the index, to read, texts given, JSON printed."""

import json
import sys
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from qwen_scope.errors import QwenScopeError
from qwen_scope.plain import finite

if TYPE_CHECKING:
    from qwen_scope.index.feature_index import FeatureIndex
    from qwen_scope.scope import Scope

Layers = Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--layer",), metavar="N…")]
Index = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")]


@dataclass(frozen=True)
class Source:
    """Which model is read through which SAEs."""

    model: str | None = None
    """Language model: hub id, folder, or `bundled`. Default: the suite's own backbone, or the bundled model."""
    suite: str | None = None
    """SAEs: hub id, catalogue name (see `qwen-scope suites`), folder or file. Default: the bundled suite."""
    layers: Layers = ()
    """Layers to read, counted from 0. Default: all of the suite."""
    k: int | None = None
    """Keep another number of features per token than the suite says."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the language model computes in; the SAEs always compute in float32."""
    device: str | None = None
    """Where to compute, such as `cpu` or `cuda:1`. Default: the first GPU if there is one."""
    kernel: Literal["reference", "cpu-bfloat16", "cpu-float32", "triton"] | None = None
    """Which path encodes. Default: the fastest one on this machine, measured once."""
    prepared: bool = False
    """Keep a copy of each layer used in the cache, laid out so that it opens at once and is shared by processes."""

    def open(self) -> "Scope":
        """Loads the scope."""
        quiet_loading()
        from qwen_scope.scope import Scope

        return Scope.from_pretrained(
            self.model,
            self.suite,
            layers=self.layers or None,
            k=self.k,
            dtype=self.dtype,
            device=self.device,
            kernel=self.kernel,
            prepared=self.prepared,
        )


def given_texts(texts: tuple[str, ...], file: Path | None) -> list[str]:
    """The texts of the command line, or the lines of a file that are not blank.

    Raises:
        QwenScopeError: both are given, or the file cannot be read as text or holds none.
    """
    if file is None:
        return list(texts)
    if texts:
        raise QwenScopeError(f"expected texts or --file, found both ({len(texts)} texts and {file}); give one of them")
    try:
        content = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QwenScopeError(
            f"expected a file of UTF-8 text at {file}, found none that reads ({error}); check it"
        ) from error
    # Not splitlines(), which also cuts at form feeds and other characters within a line.
    lines = [line for line in content.replace("\r\n", "\n").split("\n") if line.strip()]
    if not lines:
        raise QwenScopeError(f"expected lines of text in {file}, found none; write one text a line")
    return lines


def open_index(folder: Path | None) -> "FeatureIndex":
    """The index in a folder, or the one that comes with the package.

    Raises:
        QwenScopeError: no index there, or a package missing that reads it.
    """
    try:
        from qwen_scope.index.feature_index import FeatureIndex
    except ModuleNotFoundError as error:
        raise QwenScopeError(
            f"expected the package {error.name} to read a feature index, found it is not installed; run pip install "
            "'qwen-scope[index]'"
        ) from error
    return FeatureIndex.open(folder)


def index_of(source: Source, scope: "Scope", folder: Path | None) -> "FeatureIndex | None":
    """The index in a folder, or the one that comes with the package where its suite is read; None where there is none of it.

    Raises:
        QwenScopeError: no index there, or one of another suite.
    """
    if folder is None and source.suite is not None:
        return None
    from qwen_scope.fingerprint import fingerprint
    from qwen_scope.suite import Suite

    index = open_index(folder)
    # An index is told by all of its layers, also where some of them alone are read.
    suite = Suite.from_pretrained(source.suite, k=source.k) if source.layers else scope.suite
    if set(index.layers) <= set(suite.layers) and fingerprint(suite, index.layers) == index.about.fingerprint:
        return index
    if folder is not None:
        raise QwenScopeError(
            f"expected an index of {suite.name}, found {folder}, which is of {index.about.suite} or of other weights; name its "
            "suite"
        )
    return None


def names_of(scope: "Scope") -> dict[str, Any]:
    """What a reader of the JSON needs to know about where features come from."""
    suite = scope.suite
    return {"model": scope.backbone.name, "suite": suite.name, "k": suite.k, "activation": suite.activation}


def print_json(value: Any) -> None:
    """Prints strict JSON: what is not a number becomes null, and what JSON has no word for, such as a date, text."""
    print(json.dumps(finite(value), ensure_ascii=False, indent=2, default=_plain))


def _plain(value: Any) -> int | str:
    # SQL's sums are decimals, of integers too.
    return int(value) if isinstance(value, Decimal) and value == value.to_integral_value() else str(value)


def quiet_loading() -> None:
    """Silences transformers' bars where nobody watches, and its advice, which is not about anything the user did."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
