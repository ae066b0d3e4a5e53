"""Calls one function in a process of its own, so that nothing measured there was paid for before."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch


def call(function: Callable[..., Any], *arguments: Any, through: Sequence[str] = ()) -> Any:
    """What a function of these modules gives for arguments, all as JSON, with as many threads as this process has.

    Args:
        through: a command that runs the command appended to it.

    Raises:
        subprocess.CalledProcessError: the process failed or was killed.
    """
    module = Path(inspect.getfile(inspect.unwrap(function))).stem
    command = [*through, sys.executable, __file__, module, function.__name__, json.dumps(arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    module, name, arguments = sys.argv[1:]
    print(json.dumps(getattr(import_module(module), name)(*json.loads(arguments))))


if __name__ == "__main__":
    main()
