"""Times of several contenders in interleaved rounds, as ratios within a round.

Machines drift; the ratio within a round drifts little, so the figure to read is the median of the rounds' ratios.
"""

import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

OURS = "qwen_scope"
PAUSE = 0.02
"""Before each call: idle threads of torch's spin for some milliseconds, which would count against whoever comes next."""


def time_case(calls: dict[str, Callable[[], object]], seconds_per_case: float, min_rounds: int) -> dict[str, Any]:
    """Median seconds of each call, and how many times as fast as each of the others ours is.

    A round runs every call once, every other round in reverse order.
    """
    rounds: list[dict[str, float]] = []
    start = time.perf_counter()
    while len(rounds) < min_rounds or time.perf_counter() - start < seconds_per_case:
        order = list(calls) if len(rounds) % 2 == 0 else list(calls)[::-1]
        rounds.append({name: seconds(calls[name]) for name in order})
    ratios = {name: [r[name] / r[OURS] for r in rounds] for name in calls if name != OURS}
    return {
        "rounds": len(rounds),
        "seconds": {name: short(median(r[name] for r in rounds)) for name in calls},
        "times_as_fast": {name: short(median(values)) for name, values in ratios.items()},
        "times_as_fast_quartiles": {name: quartiles(values) for name, values in ratios.items()},
    }


def quartiles(values: list[float]) -> list[float]:
    """The lower and the upper: half of the rounds lie between."""
    return [short(value) for value in quantiles(values, n=4, method="inclusive")[::2]]


def short(value: float) -> float:
    return float(f"{value:.4g}")


def seconds(call: Callable[[], object]) -> float:
    time.sleep(PAUSE)
    start = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - start
    del result
    return elapsed
