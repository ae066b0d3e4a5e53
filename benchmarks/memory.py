"""The peak memory of one operation above the weights, measured in a process of its own.

`measure` starts this file as that process. There: a tiny SAE first, so that the libraries' code and thread pools are
paid for; then weights and residuals, made in place and thereby touched; then the operation, once.

Linux: writing 5 to /proc/self/clear_refs sets the kernel's own high-water mark (VmHWM) back to the present resident
set, so VmHWM afterwards, less VmRSS before, is the operation's peak: no sampling, no moment missed. Elsewhere:
`ru_maxrss` after less `ru_maxrss` before, a lower bound, close because making the weights in place leaves the
process near its maximum.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from contenders import CONTENDERS, Contender, Sizes, residuals

OPERATIONS = ("encode", "encode + decode")
TINY = Sizes(d_model=64, d_sae=512, k=8)


def measure(name: str, operation: str, tokens: int, sizes: Sizes, seed: int) -> float:
    """The peak above the weights in MiB, by a fresh process."""
    numbers = [str(n) for n in (tokens, sizes.d_model, sizes.d_sae, sizes.k, seed)]
    done = subprocess.run([sys.executable, __file__, name, operation, *numbers], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def apply(contender: Contender, operation: str, x: torch.Tensor) -> object:
    return contender.encode(x) if operation == "encode" else contender.reconstruct(x)


def method() -> str:
    if can_reset_peak():
        return "VmHWM after, less VmRSS before, the mark reset through /proc/self/clear_refs"
    return "ru_maxrss after, less ru_maxrss before (a lower bound)"


def can_reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_kib(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (highest) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def highest_kib() -> float:
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest / 1024 if sys.platform == "darwin" else highest


@torch.no_grad()
def peak_above_weights(name: str, operation: str, tokens: int, sizes: Sizes, seed: int) -> float:
    apply(CONTENDERS[name](TINY, seed), operation, residuals(16, TINY.d_model, seed))
    contender, x = CONTENDERS[name](sizes, seed), residuals(tokens, sizes.d_model, seed)
    gc.collect()
    linux = can_reset_peak()
    before = resident_kib("VmRSS") if linux else highest_kib()
    apply(contender, operation, x)
    after = resident_kib("VmHWM") if linux else highest_kib()
    return round((after - before) / 1024, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of one case above the weights, in MiB, as JSON.")
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("operation", choices=OPERATIONS)
    for number in ("tokens", "d_model", "d_sae", "k", "seed"):
        parser.add_argument(number, type=int)
    args = parser.parse_args()
    sizes = Sizes(args.d_model, args.d_sae, args.k)
    print(json.dumps(peak_above_weights(args.name, args.operation, args.tokens, sizes, args.seed)))


if __name__ == "__main__":
    main()
