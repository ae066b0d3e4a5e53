"""Two processes that share the tokens, or the features, of one SAE end with what one process would, but for rounding."""

import os
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from qwen_scope import QwenScopeError, TopKSAE
from qwen_scope.training.config import TrainConfig
from qwen_scope.training.group import Group, Parallel, Ranks
from qwen_scope.training.objective import strongest
from qwen_scope.training.trainer import SAETrainer

D_MODEL, D_SAE, STEPS, RANKS = 16, 64, 8, 2
CONFIG = TrainConfig(d_sae=D_SAE, k=4, batch=100, learning_rate=1e-3, dead_after=150, aux_coefficient=0.5)
WEAK = [0, 1, 2, 40, 41, 42, 43, 44]
"""Features, some of each rank, so weak that they die."""


@dataclass(frozen=True)
class Case:
    """One way to train."""

    parallel: Parallel
    options: dict[str, Any] = field(default_factory=dict)
    adapted: bool = False
    interrupted: bool = False


BOTH: dict[str, Any] = {"batch_topk": True, "prefixes": (0.25, 0.6)}
CASES: dict[str, Case] = {
    f"{parallel} {name}": case
    for parallel in ("data", "features")
    for name, case in {
        "plain": Case(parallel),
        "clipped": Case(parallel, {"clip_norm": 0.02}),
        "untied, without AuxK": Case(parallel, {"tied_init": False, "aux_coefficient": 0.0}),
        "BatchTopK": Case(parallel, {"batch_topk": True}),
        "Matryoshka and BatchTopK": Case(parallel, BOTH),
        "adapted": Case(parallel, {"k": 8}, adapted=True),
        "interrupted": Case(parallel, interrupted=True),
    }.items()
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def residuals() -> Tensor:
    """Sparse sums of 24 directions in 16 dimensions."""
    generator = torch.Generator().manual_seed(0)
    acts = torch.rand(1000, 24, generator=generator) * (torch.rand(1000, 24, generator=generator) < 0.1)
    return 20 * acts @ draw(24, D_MODEL, seed=1) + 50 * draw(D_MODEL, seed=2)


def sae() -> TopKSAE:
    shapes = ((D_SAE, D_MODEL), (D_MODEL, D_SAE), (D_SAE,), (D_MODEL,))
    return TopKSAE(*(draw(*shape, seed=seed) for seed, shape in enumerate(shapes)), k=8)


def train(case: Case, group: Group) -> dict[str, Tensor]:
    """The SAE after some steps, which features are dead, and the FVU at each step."""
    x, config = residuals(), replace(CONFIG, **case.options)
    how: dict[str, Any] = {"group": group, "parallel": case.parallel}
    ranks = Ranks.of(group, case.parallel)
    start = partial(SAETrainer.adapting, config, sae()) if case.adapted else partial(SAETrainer, config)
    trainer = start(x, STEPS, **how)
    own = range(D_SAE)[ranks.features.share(D_SAE)]
    trainer.weights.W_enc[[feature - own.start for feature in WEAK if feature in own]] *= 0.01
    fvus = []
    for number in range(STEPS):
        if case.interrupted and number == 5:
            trainer = SAETrainer.restored(config, trainer.state(), STEPS, **how)
        batch = x[100 * number : 100 * number + 100]
        fvus.append(trainer.step(batch[ranks.batch.share(100)]))
    found = dict(trainer.sae().named_parameters())
    last_fired = ranks.features.gather(trainer.last_fired).flatten()
    return {**{name: p.data for name, p in found.items()}, "last_fired": last_fired, "fvu": torch.tensor(fvus)}


def work(rank: int, folder: str) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the host's name may lead nowhere
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        group = Group.world()
        values = ties()[:, 4 * rank : 4 * rank + 4].sort(dim=1, descending=True, stable=True).values
        found = {name: train(case, group) for name, case in CASES.items()}
        found["strongest"] = {"kept": strongest(values, 3, group)}
        torch.save(found, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_two(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_does(by_two, name):
    expected = train(CASES[name], Group())
    dead = 100 * STEPS - expected["last_fired"] > CONFIG.dead_after
    assert dead[WEAK].sum() >= 2
    for rank in range(RANKS):
        found = by_two[rank][name]
        assert torch.equal(found["last_fired"], expected["last_fired"])
        torch.testing.assert_close(found["fvu"], expected["fvu"], rtol=1e-5, atol=0)
        for part in ("W_enc", "b_enc", "W_dec", "b_dec"):
            allowed = 1e-5 * float(expected[part].abs().max())
            torch.testing.assert_close(found[part], expected[part], rtol=0, atol=allowed)
            assert torch.equal(found[part], by_two[0][name][part]), "ranks differ"


def ties() -> Tensor:
    """Pre-activations of three tokens and eight features."""
    return torch.tensor(
        [
            [1.0, 2, 0, 2, 2, 2, 9, 1],  # 9, and the first two of four equal ones
            [5.0, 5, 5, 5, 5, 5, 5, 5],
            [0.0, 0, 0, 0, 0, 1, 1, 3],
        ]
    )


def test_equal_pre_activations_on_two_ranks_are_decided_by_the_lower_feature(by_two):
    assert by_two[0]["strongest"]["kept"].sum(1).tolist() == [2, 3, 0]
    assert by_two[1]["strongest"]["kept"].sum(1).tolist() == [1, 0, 3]


def test_one_process_alone_needs_no_others():
    alone = Group.world()
    assert alone == Group()
    assert torch.equal(alone.sum(torch.arange(3)), torch.arange(3))
    assert torch.equal(alone.gather(torch.arange(3)), torch.arange(3)[None])
    assert alone.share(7) == slice(0, 7)


def test_features_that_cannot_be_shared_equally():
    with pytest.raises(QwenScopeError, match="that 3 processes can share equally, found 64; choose a multiple of 3"):
        SAETrainer(CONFIG, residuals(), STEPS, group=Group(0, 3), parallel="features")
