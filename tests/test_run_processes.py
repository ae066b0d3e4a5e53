"""Two processes under torchrun leave what one leaves: whole layers, parts of batches or parts of the features each."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qwen_scope import Suite
from qwen_scope.training.tracking import rows_of

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
OPTIONS = {
    "--d-sae": 64, "--k": 4, "--batch": 64, "--dead-after": 600, "--learning-rate": 1e-3, "--context": 32, "--held-out": 300,
    "--buffer-tokens": 600, "--forward-tokens": 128, "--dtype": "float32", "--save-minutes": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def given(llama, tokenizer, tmp_path_factory) -> list[str]:
    """Corpus and model, as the command takes them."""
    folder = tmp_path_factory.mktemp("given")
    llama.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = ["the", "capital", "of", "France", "is", "Paris", "and", "Rome", "Italy", ",", "not", "Spain", "."]
    draw = random.Random(0)
    lines = [" ".join(draw.choice(words) for _ in range(draw.randrange(5, 60))) for _ in range(60)]
    (folder / "texts").mkdir()
    for number, line in enumerate(lines):
        (folder / "texts" / f"{number:02d}.txt").write_text(line)
    return [str(folder / "texts"), str(folder / "model")]


def command(given: list[str], out: Path, *more: str) -> list[str]:
    options = [str(part) for pair in OPTIONS.items() for part in pair]
    return ["train", given[0], str(out), "--model", given[1], "--layers", "0", "2", *options, *more]


def both(arguments: list[str]) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launch, "-m", "qwen_scope.cli", *arguments]


@pytest.fixture(scope="module")
def single(given, tmp_path_factory) -> Suite:
    folder = tmp_path_factory.mktemp("single")
    subprocess.run([sys.executable, "-m", "qwen_scope.cli", *command(given, folder)], env=ENVIRONMENT, check=True)
    return Suite.from_pretrained(folder)


@pytest.mark.parametrize("parallel", ["layers", "data", "features"])
def test_two_processes_leave_what_one_leaves(given, single, tmp_path, parallel):
    done = subprocess.run(
        both(command(given, tmp_path, "--parallel", parallel)), env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    suite = Suite.from_pretrained(tmp_path)
    assert suite.layers == single.layers
    for layer in suite:
        for name, found in suite[layer].named_parameters():
            expected = getattr(single[layer], name)
            if parallel == "layers":
                assert torch.equal(found, expected), name
            else:
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert (tmp_path / "report.json").exists()


LEAVES = """
import sys
from pathlib import Path

from qwen_scope.training.group import Group

with Group.joined() as group:
    import torch.distributed.nn

    group.wait()
names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
Path(sys.argv[1], f"{group.rank}.txt").write_text("".join(name for name in names if "gloo" in name))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the names of threads from Linux's /proc")
def test_no_thread_of_a_group_outlives_it(tmp_path):
    (tmp_path / "leaves.py").write_text(LEAVES)
    command = [*both([])[:-2], str(tmp_path / "leaves.py"), str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["", ""]


def started(arguments: list[str], rank: int, port: int) -> subprocess.Popen[bytes]:
    """One process of two, as torchrun would start it; torchrun itself would outlive being killed."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = ENVIRONMENT | {name: str(value) for name, value in place.items()}
    words = [sys.executable, "-m", "qwen_scope.cli", *arguments]
    return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_two_killed_processes_go_on(given, single, tmp_path):
    arguments = command(given, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [started(arguments, rank, port) for rank in range(2)]
    while processes[0].poll() is None and not any(
        len(rows_of(path)) > 20 for path in tmp_path.glob("training/*/metrics-*.jsonl")
    ):
        time.sleep(0.01)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "config.json").exists(), "it was killed on the way"
    done = subprocess.run(both(arguments), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    suite = Suite.from_pretrained(tmp_path)
    for layer in suite:
        for name, found in suite[layer].named_parameters():
            assert torch.equal(found, getattr(single[layer], name)), name
