"""Processes that train one SAE together, on `torch.distributed`: gloo between CPUs, nccl between GPUs.

Two ways to share the work, which both give what one process would but for rounding: each rank takes part of the tokens
and holds the whole SAE, or takes all tokens and holds part of the features.
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from qwen_scope.errors import QwenScopeError, reason

Parallel = Literal["data", "features"]
"""What ranks share: `data`, the tokens of a batch in equal parts; `features`, the rows of the weights."""


@dataclass(frozen=True)
class Group:
    """This process's place among those that train together; by default it is alone and nothing is sent.

    All ranks call `sum` and `gather` in the same order, with tensors of the same shape.
    """

    rank: int = 0
    """Number of this process, from 0."""
    size: int = 1
    """How many there are."""
    local_rank: int = 0
    """Number of this process among those on its machine."""

    @staticmethod
    @contextmanager
    def joined() -> "Iterator[Group]":
        """The processes that `torchrun` or `accelerate launch` has started, connected while the block runs; else this one.

        Raises:
            QwenScopeError: the others cannot be reached.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield Group()
            return
        # Loading a model imports this one, whose default arguments bind the group of that moment: gloo's threads would then
        # outlive the group, and now and then abort the process when Python ends beneath them.
        importlib.import_module("torch.distributed.nn")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            # Long, since others wait while the first one tokenizes or evaluates.
            dist.init_process_group(backend, timeout=timedelta(days=1))
        except (RuntimeError, ValueError) as error:
            raise QwenScopeError(
                f"expected the processes of one run to find each other, found that they do not ({reason(error)}); start "
                "them with torchrun"
            ) from error
        try:
            yield Group(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
        finally:
            dist.destroy_process_group()

    @staticmethod
    def world() -> "Group":
        """All processes that `torch.distributed.init_process_group` brought together; this one alone before that."""
        if not dist.is_available() or not dist.is_initialized():
            return Group()
        return Group(dist.get_rank(), dist.get_world_size())

    def sum(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The sum over all ranks, the same bits on each; the tensor given may be overwritten."""
        if self.size > 1:
            tensor = tensor.contiguous()
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "size *shape"]:
        """What each rank has, stacked in their order."""
        if self.size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on at least one rank."""
        return bool(self.sum(torch.tensor(int(flag))))

    def wait(self) -> None:
        """Returns when all ranks have come here."""
        self.any(False)

    def gather_objects(self, thing: Any) -> list[Any]:
        """What each rank has, small and of plain types, in their order."""
        found = [thing] * self.size
        if self.size > 1:
            dist.all_gather_object(found, thing)
        return found

    def share(self, total: int) -> slice:
        """This rank's equal part of `total` things.

        Raises:
            QwenScopeError: they cannot be shared equally.
        """
        if total % self.size:
            raise QwenScopeError(
                f"expected a number that {self.size} processes can share equally, found {total}; choose a multiple of "
                f"{self.size}"
            )
        part = total // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


class Ranks(NamedTuple):
    """Whom a rank adds up with: sums over tokens go through `batch`, sums over features through `features`."""

    batch: Group = Group()
    """Ranks that hold other tokens of the batch."""
    features: Group = Group()
    """Ranks that hold other features."""

    @staticmethod
    def of(group: Group, parallel: Parallel) -> "Ranks":
        """A group that shares the tokens, or the features."""
        return Ranks(batch=group) if parallel == "data" else Ranks(features=group)
