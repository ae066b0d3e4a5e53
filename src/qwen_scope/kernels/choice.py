"""The one place that decides which path encodes: by what the machine can do and by a short measurement, once.

What was measured is kept in `kernels.json` in the cache folder, for this processor, number of threads, shape and versions.
"""

import json
import os
import platform
import sys
import time
import warnings
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.errors import QwenScopeError, reason
from qwen_scope.files import cache_folder, replacing
from qwen_scope.kernels import reference
from qwen_scope.kernels.screen import BoundBroken, Screen
from qwen_scope.kernels.threads import thread_count

Kernel = Literal["reference", "cpu-bfloat16", "cpu-float32", "triton"]
"""`reference`: the card's arithmetic by torch alone. The others return the exact largest pre-activations, found through a
fast product in bfloat16 or float32 on the CPU (see `screen`), or on a CUDA device."""

SMALL = 2**20
"""Encoders of fewer weights than this take microseconds on any path: the reference, without a measurement."""
PROBE_FLOPS = 8e9
"""Size of the product that is timed."""
ROUNDS = 3
ATTEMPTS = 2
"""How often a path may lose before the reference is chosen for good: the machine may have been busy."""


@dataclass(frozen=True)
class Choice:
    """The path chosen, and why."""

    kernel: Kernel
    why: str

    def __str__(self) -> str:
        return f"{self.kernel} ({self.why})"


_chosen: dict[str, Choice] = {}


def choose(W_enc: Float[Tensor, "d_sae d_model"], b_enc: Float[Tensor, " d_sae"], k: int) -> Choice:
    """The fastest path for this encoder on this machine.

    On a CPU it is faster than the reference both for one token and for a batch, or it is the reference.
    """
    if W_enc.numel() < SMALL:
        return Choice("reference", "the encoder is small")
    if W_enc.dtype not in (torch.float32, torch.bfloat16):
        return Choice("reference", f"the weights are {W_enc.dtype}".replace("torch.", ""))
    if not screening_pays(k, len(b_enc)):
        return Choice("reference", "more than a quarter of the features is kept")
    problem = unavailable("triton" if W_enc.device.type == "cuda" else "cpu-float32", W_enc.device)
    if problem:
        return Choice("reference", problem)
    key = _key(W_enc, k)
    if key not in _chosen and (found := _remembered(key)):
        _chosen[key] = found
    return _chosen.get(key) or _measured(key, W_enc.detach(), b_enc.detach(), k)


def screening_pays(k: int, d_sae: int) -> bool:
    """Whether k is small enough for a screen: where most features are kept, all must be computed anyway."""
    return 4 * k <= d_sae


def unavailable(kernel: Kernel, device: torch.device) -> str | None:
    """Why a path cannot run on a device, None if it can."""
    if kernel == "reference":
        return None
    if kernel == "triton":
        missing = None if util.find_spec("triton") else "triton is not installed"
        return missing if device.type == "cuda" else "the SAE is not on a CUDA device"
    if device.type != "cpu":
        return f"the SAE is on {device}"
    try:
        from qwen_scope.kernels import compiled
    except ImportError as error:
        return f"numba cannot be used ({reason(error)})"
    del compiled
    return None


def screen_of(kernel: Kernel, W_enc: Float[Tensor, "d_sae d_model"], b_enc: Float[Tensor, " d_sae"]) -> Any:
    """What a path keeps beside the weights; None for the reference, and for weights it cannot serve.

    Raises:
        QwenScopeError: it cannot run on this machine and device.
    """
    if problem := unavailable(kernel, W_enc.device):
        raise QwenScopeError(
            f"expected the kernel {kernel} to be usable, found that {problem}; leave out kernel= (--kernel)"
        )
    if kernel == "reference" or W_enc.dtype not in (torch.float32, torch.bfloat16):
        return None
    if kernel == "triton":
        from qwen_scope.kernels.triton_screen import TritonScreen

        return TritonScreen.of(W_enc, b_enc)
    return Screen.of(W_enc, b_enc, "bfloat16" if kernel == "cpu-bfloat16" else "float32")


@torch.no_grad()
def _measured(key: str, W_enc: Tensor, b_enc: Tensor, k: int) -> Choice:
    if not _all_remembered():
        sys.stderr.write("qwen-scope: compiling and measuring kernels for this machine (once, up to half a minute)\n")
    kernels: list[Kernel] = ["triton"] if W_enc.device.type == "cuda" else ["cpu-bfloat16", "cpu-float32"]
    batch = 1024 if W_enc.is_cuda else max(4, min(64, int(PROBE_FLOPS / (2 * W_enc.numel()))))
    inputs = [_probe(tokens, W_enc) for tokens in (1, batch)]
    runs = _runs(["reference", *kernels], W_enc, b_enc, k)
    choice = Choice("reference", "nothing else runs here")
    for _ in range(ATTEMPTS if len(runs) > 1 else 0):
        kernel, (one, many) = _fastest(_seconds(runs, inputs))
        told = f"times as fast as the reference for 1 token, {many:.1f} for {batch}, here"
        # One token takes a fraction of a millisecond on a GPU, whatever the path.
        if (many if W_enc.is_cuda else min(one, many)) >= 1:
            choice = Choice(kernel, f"{one:.1f} {told}")
            break
        choice = Choice("reference", f"{kernel} is {one:.1f} {told}")
    if len(runs) > len(kernels):  # else it says something of these weights, not of the machine
        _chosen[key] = choice
        _remember(key, choice)
    return choice


def _fastest(seconds: dict[Kernel, list[float]]) -> tuple[Kernel, list[float]]:
    """The path, other than the reference, that does best where it does worst, and how many times as fast it is."""
    ratios: dict[Kernel, list[float]] = {
        kernel: [at / by for at, by in zip(seconds["reference"], times, strict=True)]
        for kernel, times in seconds.items()
        if kernel != "reference"
    }
    return max(ratios.items(), key=lambda item: min(item[1]))


def _runs(kernels: list[Kernel], W_enc: Tensor, b_enc: Tensor, k: int) -> dict[Kernel, Any]:
    """What encodes with each path that works here."""
    runs: dict[Kernel, Any] = {}
    for kernel in kernels:
        if kernel == "reference":
            runs[kernel] = lambda x: reference.encode_rows(x, W_enc, b_enc, k)
            continue
        try:
            screen = screen_of(kernel, W_enc, b_enc)
            if screen is not None and screen.sums_in_float32():
                screen.encode(_probe(3, W_enc), k)
                screen.encode(_probe(1, W_enc), k)
                runs[kernel] = lambda x, screen=screen: screen.encode(x, k)
        except Exception as error:
            # A compiler that does not work on this machine can raise anything; the reference always works.
            if not isinstance(error, BoundBroken):
                warnings.warn(f"the kernel {kernel} cannot be used here: {reason(error)}", stacklevel=2)
    return runs


def _probe(tokens: int, W_enc: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, W_enc.shape[1], generator=generator).to(W_enc.device)


def _seconds(runs: dict[Kernel, Any], inputs: list[Tensor]) -> dict[Kernel, list[float]]:
    """Median seconds of each path for each input, in interleaved rounds."""
    taken: dict[Kernel, list[list[float]]] = {kernel: [[] for _ in inputs] for kernel in runs}
    for at, x in enumerate(inputs):
        for _ in range(ROUNDS):
            for kernel, run in runs.items():
                start = time.perf_counter()
                run(x)
                if x.is_cuda:
                    torch.cuda.synchronize()
                taken[kernel][at].append(time.perf_counter() - start)
    return {kernel: [median(times) for times in of] for kernel, of in taken.items()}


def _key(W_enc: Tensor, k: int) -> str:
    where = torch.cuda.get_device_name(W_enc.device) if W_enc.is_cuda else f"{_cpu()} {thread_count()} threads"
    versions = f"qwen-scope {_version('qwen-scope')} torch {torch.__version__} numba {_version('numba')}"
    shape = f"{W_enc.shape[1]}x{W_enc.shape[0]} k{k} {W_enc.dtype}".replace("torch.", "")
    return f"{where} | {versions} | {shape}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()} {torch.backends.cpu.get_cpu_capability()} {os.cpu_count()}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def _file() -> Path:
    return cache_folder() / "kernels.json"


def _all_remembered() -> dict[str, Any]:
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home
        return {}
    return found if isinstance(found, dict) else {}


def _remembered(key: str) -> Choice | None:
    found = _all_remembered().get(key)
    if not isinstance(found, dict) or found.get("kernel") not in get_args(Kernel):
        return None
    return Choice(found["kernel"], str(found.get("why", "")))


def _remember(key: str, choice: Choice) -> None:
    try:
        with replacing(_file()) as temporary:
            everything = {**_all_remembered(), key: {"kernel": choice.kernel, "why": choice.why}}
            temporary.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    except (QwenScopeError, RuntimeError):
        return  # a cache that cannot be written costs a second in every process, no more
