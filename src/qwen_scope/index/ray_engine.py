"""The engine `ray`: shards read by workers of a Ray cluster, joined here in their order.

Ray Data hands numbers of shards to actors, each of which holds a model and its SAEs. Shards and what was found in them are
files in the index's folder, which all workers must see. A shard whose file is there is not read again.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qwen_scope.errors import QwenScopeError
from qwen_scope.index.config import HarvestConfig
from qwen_scope.index.partial import Keep, Partial
from qwen_scope.index.progress import read_partials, write_partials
from qwen_scope.index.shards import Shards

SHOWN_AFTER = 30
"""Seconds after which a file that another machine has written must be seen here."""


def ray_partials(
    folder: Path,
    work: Path,
    config: HarvestConfig,
    layers: Sequence[int],
    shards: Shards,
    first: int,
    told: Callable[[int], object],
) -> Iterator[dict[int, Partial]]:
    """What each shard from the first on holds, in their order, read by `config.workers` workers.

    Raises:
        QwenScopeError: Ray is not installed, or a worker failed; what others have done is kept.
    """
    ray = _ray()
    done = work / "parts"
    todo = [number for number in range(first, len(shards)) if not _part(done, number).exists()]
    # What an earlier, interrupted harvest has read.
    told(sum(shards.first(n + 1) - shards.first(n) for n in range(first, len(shards))) - _tokens(shards, todo))
    finished = _results(ray, folder, work, config, layers, todo)
    for number in range(first, len(shards)):
        while not _part(done, number).exists():
            read = next(finished, None)
            if read is None:
                _wait_for(_part(done, number))
                break
            told(_tokens(shards, [read]))
        yield read_partials(_part(done, number))[0]


def _results(
    ray: Any, folder: Path, work: Path, config: HarvestConfig, layers: Sequence[int], todo: list[int]
) -> Iterator[int]:
    """Numbers of shards as they are done."""
    if not todo:
        return
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), logging_level=logging.ERROR, include_dashboard=False)
    there = ray.cluster_resources()
    machines = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    gpus = there.get("GPU", 0) if config.device is None or config.device.startswith("cuda") else 0
    if 0 < gpus < config.workers:
        raise QwenScopeError(
            f"expected a GPU for each of the {config.workers} workers, found {gpus:.0f} in the cluster; lower --workers, or give "
            "--device cpu"
        )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = ray.data.from_items([{"shard": number} for number in todo], override_num_blocks=len(todo))
    read = rows.map(
        ShardReader,
        fn_constructor_args=(config, str(folder.resolve()), str(work.resolve()), list(layers)),
        concurrency=config.workers,
        num_cpus=cpus_of_worker(machines, config.workers),
        num_gpus=1 if gpus else 0,
    )
    try:
        for row in read.iter_rows():
            yield int(row["shard"])
    except (ray.exceptions.RayError, OSError) as error:
        cause = getattr(error, "cause", None) or error
        raise QwenScopeError(
            f"expected all workers to read their shards, found that one failed ({_first_line(cause)}); mend that and run the "
            "same command again: what was read is kept"
        ) from error


class ShardReader:
    """A worker: reads the shards whose numbers it is given and writes what it found beside them."""

    def __init__(self, config: HarvestConfig, folder: str, work: str, layers: list[int]):
        from qwen_scope.index.harvest import open_scope

        self.config, self.layers = config, layers
        self.folder, self.work = Path(folder), Path(work)
        self.scope = open_scope(config)
        self.shards = Shards.open(self.work / "shards")
        self.keep = Keep.of(config)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Reads one shard."""
        from qwen_scope.index.read_shard import read_shard

        number = int(row["shard"])
        found = read_shard(
            self.scope,
            self.shards[number],
            self.layers,
            self.keep,
            forward_tokens=self.config.forward_tokens,
            pairs=self.folder if self.config.pairs else None,
        )
        write_partials(_part(self.work / "parts", number), found, {"shards": "1"})
        return {"shard": number}


def _wait_for(part: Path) -> None:
    """Shared folders may show a file some seconds after another machine has written it."""
    for _ in range(SHOWN_AFTER):
        if part.exists():
            return
        time.sleep(1)
    raise QwenScopeError(f"expected {part}, found that no worker wrote it there; give all workers the same folder")


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.safetensors"


def cpus_of_worker(machines: Sequence[int], workers: int) -> int:
    """How many CPU cores each of some workers can have, given those of each machine: a worker is on one machine.

    More than fit would wait for ever. At least 1.
    """
    fits = (n for n in range(1, max(machines, default=0) + 1) if sum(cores // n for cores in machines) >= workers)
    return max(fits, default=1)


def _tokens(shards: Shards, numbers: list[int]) -> int:
    return sum(shards.first(n + 1) - shards.first(n) for n in numbers)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _ray() -> Any:
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError as error:
        raise QwenScopeError(
            "expected the package ray for --engine ray, found it is not installed; run pip install 'qwen-scope[ray]'"
        ) from error
    return ray
