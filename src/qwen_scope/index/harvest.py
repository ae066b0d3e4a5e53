"""`harvest`: a corpus through a model and its SAEs to a feature index on disk, on this machine or on many.

The corpus is cut into shards first (`shards`); each is read by one worker (`read_shard`); what they found is joined in the
order of the shards and saved every few minutes; at the end tables are written (`finish`). A harvest that is stopped or killed
goes on when the same command is given again, with the same result.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen_scope.checkpoint.weights import read_json
from qwen_scope.corpus import located
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import alone, expanded, from_anywhere, replacing
from qwen_scope.fingerprint import fingerprint
from qwen_scope.index.config import HarvestConfig, differences
from qwen_scope.index.feature_index import FeatureIndex
from qwen_scope.index.finish import finish
from qwen_scope.index.layout import layer_folder
from qwen_scope.index.partial import Keep, Partial
from qwen_scope.index.progress import Total
from qwen_scope.index.read_shard import read_shard
from qwen_scope.index.shards import Shards
from qwen_scope.scope import Scope
from qwen_scope.stopping import Stop, Stopped, stopping

WORK = "harvest"
"""Folder in the index's where progress is kept until it is done."""


def harvest(
    corpus: str | Path,
    folder: str | Path,
    config: HarvestConfig | None = None,
    scope: Scope | None = None,
) -> FeatureIndex:
    """Reads a corpus and writes a feature index.

    Run again with the same arguments, it goes on where it was stopped or killed.

    Args:
        corpus: what `qwen_scope.corpus.located` reads: a file, a folder or a Hugging Face dataset. Lines that cannot be read
            are counted, named in `index.about` and left out.
        folder: where the index goes; progress is kept in `folder/harvest` meanwhile.
        config: what is kept; the bundled model and suite unless it says otherwise.
        scope: a model and suite in memory to read with, instead of those that `config` names.

    Returns:
        The index.

    Raises:
        QwenScopeError: a corpus without text, another index or harvest in the folder, a disk that is full.
        Stopped: Ctrl-C; progress is saved.
    """
    config, folder = config or HarvestConfig(), expanded(folder)
    work = folder / WORK
    if config.engine == "ray" and scope is not None:
        raise QwenScopeError(
            "expected names of a model and a suite for workers to load, found a Scope in memory; name them in the config"
        )
    _without_index(folder)
    with _alone(work):
        _without_index(folder)
        # A path means another file in another folder.
        options = {"corpus": from_anywhere(str(corpus)), **config.to_dict()}
        _agree_with_before(work, options)
        scope = scope or open_scope(config)
        layers = list(scope.layers if not config.layers else sorted(set(config.layers)))
        # Under the same name there may be other weights by now.
        options["fingerprint"] = fingerprint(scope.suite, layers)
        _agree_with_before(work, options)
        if not (work / "options.json").exists():
            _without_old_pairs(folder, layers)
        shards = _shards(str(corpus), work / "shards", config, scope)
        with replacing(work / "options.json") as temporary:
            temporary.write_text(json.dumps(options, indent=1) + "\n", encoding="utf-8")
        keep = Keep.of(config)
        with stopping() as stop:
            total = Harvesting(folder, work, config, scope, layers, shards, keep, stop).run()
        finish(folder, total, shards, scope, config, str(corpus), work)
        shutil.rmtree(work, ignore_errors=True)
    return FeatureIndex.open(folder)


def _without_index(folder: Path) -> None:
    if (folder / "index.json").exists():
        raise QwenScopeError(
            f"expected a folder without a feature index, found one in {folder}; choose another, or delete it"
        )


def open_scope(config: HarvestConfig) -> Scope:
    """The model and suite that a config names."""
    return Scope.from_pretrained(
        config.model,
        config.suite,
        layers=config.layers or None,
        dtype=config.dtype,
        device=config.device,
        kernel=config.kernel,
    )


@dataclass(frozen=True)
class Harvesting:
    """The middle part of a harvest: all shards, to one `Partial` of each layer."""

    folder: Path
    work: Path
    config: HarvestConfig
    scope: Scope
    layers: list[int]
    shards: Shards
    keep: Keep
    stop: Stop

    def run(self) -> Mapping[int, Partial]:
        """Reads what is not read yet.

        Raises:
            Stopped: somebody asked for it; what was read is saved.
        """
        total = Total.open(self.work, self.scope.suite, self.layers, self.keep)
        saved_at = time.monotonic()
        with tqdm(
            total=self.shards.about.tokens,
            initial=self.shards.first(total.shards),
            desc="harvesting",
            unit="token",
            unit_scale=True,
            smoothing=0,
            mininterval=0.5,
        ) as bar:

            def told(tokens: int) -> None:
                bar.update(tokens)
                if self.stop.asked:
                    self._save(total)
                    raise Stopped(
                        f"stopped after {total.shards} of {len(self.shards)} shards, which are saved in {self.work}; run the "
                        f"same command again to go on ({bar.n - self.shards.first(total.shards)} tokens of the next shard "
                        "will be read again)"
                    )

            for found in self._read(total.shards, told):
                total.add(found, self.keep)
                if time.monotonic() - saved_at > 60 * self.config.save_minutes:
                    self._save(total)
                    saved_at = time.monotonic()
        # Writing the tables may fail, or be stopped.
        self._save(total)
        return total.layers

    def _save(self, total: Total) -> None:
        total.save(self.work)
        # What workers of Ray have read is needed until it is in what was saved, or it would have to be read again.
        for part in (self.work / "parts").glob("*.safetensors"):
            if int(part.stem) < total.shards:
                part.unlink()

    def _read(self, first: int, told: Callable[[int], object]) -> Iterator[dict[int, Partial]]:
        """What each shard from the first on holds, in their order."""
        if self.config.engine == "ray":
            from qwen_scope.index.ray_engine import ray_partials

            yield from ray_partials(self.folder, self.work, self.config, self.layers, self.shards, first, told)
            return
        for number in range(first, len(self.shards)):
            yield read_shard(
                self.scope,
                self.shards[number],
                self.layers,
                self.keep,
                forward_tokens=self.config.forward_tokens,
                pairs=self.folder if self.config.pairs else None,
                told=told,
            )


def _shards(corpus: str, folder: Path, config: HarvestConfig, scope: Scope) -> Shards:
    """The corpus in shards, cut unless a harvest with the same options did so before."""
    backbone = scope.backbone
    limit = backbone.context_length
    if limit is not None and config.context > limit:
        raise QwenScopeError(
            f"expected a context of at most {limit} tokens, which {backbone.name} was made for, found {config.context}; "
            "lower --context"
        )
    if (folder.parent / "options.json").exists() and (folder / "cut.json").exists():
        return Shards.open(folder)
    if backbone.tokenizer is None:
        raise QwenScopeError(f"expected a tokenizer beside {backbone.name}, found none; add its files")
    return Shards.write(
        folder,
        lambda broken: located(corpus, column=config.column, split=config.split, config=config.subset, broken=broken),
        backbone.tokenizer,
        context=config.context,
        shard_tokens=config.shard_tokens,
        tokens=config.tokens,
    )


def _without_old_pairs(folder: Path, layers: list[int]) -> None:
    """Removes the pairs of a harvest that was given up, or they would be taken for those of this one."""
    for layer in layers:
        for path in (layer_folder(folder, layer) / "pairs").glob("*.parquet"):
            path.unlink()


def _agree_with_before(work: Path, options: Mapping[str, Any]) -> None:
    path = work / "options.json"
    if path.exists() and (different := differences(read_json(path), dict(options))):
        raise QwenScopeError(
            f"expected the options of the harvest that was begun in {work}, found that {'; '.join(different)}; give the same "
            "options, or delete that folder to begin anew"
        )


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Keeps a second harvest out of the folder."""
    if work.is_dir() and any(work.iterdir()) and not (work / "lock").exists():
        raise QwenScopeError(
            f"expected to keep progress in {work}, found a folder of other things, which would be removed at the end; "
            "choose another folder"
        )
    with alone(work / "lock", work):
        yield
