"""How good are the labels that the bundled model writes? Serves it here, labels some features, scores them, prints JSON.

python scripts/label_quality.py INDEX --layer 15 --count 50 > figures.json

The features are drawn at random from those that fire, so that the mean is of all of them. The index is only read: labels go
to a temporary file, or to the one that --labels names. The server is `transformers serve`, which needs fastapi and uvicorn.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from qwen_scope.bundled import model_folder
from qwen_scope.index import FeatureIndex
from qwen_scope.index.endpoint import Endpoint
from qwen_scope.index.label_config import LabelConfig
from qwen_scope.index.labelling import PROMPT, label
from qwen_scope.index.labels import Labels

NAME = "SmolLM2-135M-Instruct"
"""What the served model is called."""
START = 120
"""Seconds that the server may take to start."""


@contextmanager
def serving(work: Path) -> Iterator[str]:
    """Runs `transformers serve` with the bundled model while the block runs; gives its address."""
    served = work / NAME
    served.mkdir()
    for file in model_folder().iterdir():
        if file.name != "config.json":
            (served / file.name).symlink_to(file)
    # The server looks up the model's class here; the bundled folder does not say it.
    config = json.loads((model_folder() / "config.json").read_text(encoding="utf-8"))
    (served / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", NAME, "--host", "127.0.0.1"]
    # It says what it does on standard output, which is ours for the figures.
    with (work / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu", "--dtype", "float32"],
            cwd=work,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=log,
        )
        try:
            _wait(server, f"http://127.0.0.1:{port}/health", work / "server.log")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait()


def _wait(server: subprocess.Popen, address: str, log: Path) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"the server did not start; it said:\n{log.read_text(encoding='utf-8')[-2000:]}")


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", nargs="?", type=Path, help="default: the one that comes with the package")
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--answer-tokens", type=int, default=48)
    parser.add_argument("--labels", type=Path, help="keep the labels in this file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        index = FeatureIndex.open(given.index)
        index.labels = Labels(given.labels or work / "labels.jsonl", about=index.about)
        dead = index.table(given.layer, ["dead"])["dead"].to_pylist()
        alive = [(given.layer, number) for number, never in enumerate(dead) if not never]
        features = sorted(random.Random(given.seed).sample(alive, min(given.count, len(alive))))
        config = LabelConfig(seed=given.seed)
        with serving(work) as address:
            endpoint = Endpoint(address, NAME, timeout=300.0, concurrency=1, answer_tokens=given.answer_tokens)
            report = label(index, features, endpoint, config)
        scores = report.scores
        assert scores is not None
        # Keys of JSON are strings.
        failed = {f"{layer}/{number}": why for (layer, number), why in {**report.failed, **scores.failed}.items()}
        figures = {
            "suite": index.about.suite,
            "corpus": index.about.corpus,
            "layer": given.layer,
            "model": NAME,
            "prompt": PROMPT,
            "config": asdict(config),
            "answer_tokens": given.answer_tokens,
            "labelled": report.labelled,
            "failed": failed,
            "scores": {name: value for name, value in asdict(scores).items() if name != "failed"},
            "labels": [{"feature": f"{layer}/{n}", **asdict(found)} for (layer, n), found in index.labels.items()],
        }
    print(json.dumps(figures, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
