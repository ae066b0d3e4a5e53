"""SASFT by two processes takes the same steps as by one: tokens are counted over both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys, warnings
import torch
import conftest
from qwen_scope.suite import Suite
from test_sasft import SENTENCES, config, dataset, trainer
from qwen_scope.finetuning.restraints import Restrained, Restraints

torch.set_num_threads(1)
folder, rows = sys.argv[1], int(sys.argv[2])
suite = Suite.of({layer: conftest.random_sae(seed=layer) for layer in range(3)}, name="tiny")
restraints = Restraints.of([Restrained("1/5", "xx", {"en": -3.0}), Restrained("2/6", "", {"xx": 0.0})], suite, ["en", "xx"])
model = conftest.build(conftest.CONFIGS["llama"]())
options = {"per_device_train_batch_size": rows, "max_steps": 3, "learning_rate": 1e-2, "optim": "sgd"}
if rows == 2:
    options["ddp_backend"] = "gloo"
tuned = trainer(model, folder, restraints, suite, data=dataset(SENTENCES * 3), **options)
tuned.train()
if tuned.accelerator.is_main_process:
    state = {name: weight.detach() for name, weight in tuned.accelerator.unwrap_model(tuned.model).state_dict().items()}
    torch.save((state, [row for row in tuned.state.log_history if "loss" in row]), f"{folder}/out.pt")
"""


def run(folder: Path, processes: int) -> tuple[dict, list]:
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if processes == 2 else []
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, *launch, str(folder / "script.py"), str(folder), str(4 // processes)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "out.pt")


def test_two_processes_take_the_steps_of_one(tmp_path):
    (one, told), (two, told_by_two) = run(tmp_path / "one", 1), run(tmp_path / "two", 2)
    for name, weight in one.items():
        assert torch.allclose(weight, two[name], rtol=1e-4, atol=1e-5), name
    for row, other in zip(told, told_by_two, strict=True):
        for figure in ("reduce_loss", "sft_loss", "above_limit"):
            assert row[figure] == pytest.approx(other[figure], rel=1e-3)
