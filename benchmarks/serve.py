"""A server under many clients: what it saves to serve them together, and whether it stays up and small.

`python benchmarks/serve.py` takes some fifteen minutes and writes benchmarks/results/serve.json. `qwen-scope serve` runs in a
process of its own with the bundled model; the clients are those of the `openai` package. First, clients with another steering
each, all at once and one after another, which must get the same texts. Then minutes of mixed load: chats and completions,
streamed or not, steered or not, features read, requests that must be refused, and clients that hang up.
"""

import asyncio
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import commandline
import httpx2 as httpx
import machine
from openai import APIStatusError, AsyncOpenAI
from steer import SUBJECTS, chats
from timing import short

REFUSED = (
    {"steering": "15/99999:2x"},
    {"steering": "15/1037:nan"},
    {"steering": "15/1037:=1 15/1037:*2"},
    {"steering": "15/1037:1@5000"},
    {"max_tokens": -1},
)
"""What a request can say that must be answered with 400."""


@dataclass(frozen=True)
class Settings:
    clients: int = 32
    tokens: int = 48
    """Generated for each client, in the comparison."""
    rounds: int = 3
    minutes: float = 10
    load_clients: int = 24
    """Clients of the mixed load."""


QUICK = Settings(clients=3, tokens=4, rounds=1, minutes=0.1, load_clients=4)


async def run(settings: Settings) -> dict[str, Any]:
    with tempfile.TemporaryFile() as log:
        address, process = start(log)
        try:
            await until_up(address, process)
            client = AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)
            async with client:
                compared = await compare(client, settings)
                load = await mixed(client, address, process.pid, settings)
        finally:
            process.terminate()
            process.wait(60)
    return {
        "benchmark": "serve",
        "machine": machine.describe(),
        "parameters": asdict(settings) | {"model": "the bundled one, float32"},
        "together": compared,
        "load": load,
    }


def start(log: Any) -> tuple[str, subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "qwen_scope.cli", "serve", "--port", str(port)]
    return f"http://127.0.0.1:{port}", subprocess.Popen(command, stdout=log, stderr=log)


async def until_up(address: str, process: subprocess.Popen[bytes]) -> None:
    async with httpx.AsyncClient() as web:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"expected a server that starts, found that it ended with {process.returncode}")
            try:
                if (await web.get(f"{address}/health")).status_code == 200:
                    return
            except httpx.TransportError:
                await asyncio.sleep(0.2)
    raise SystemExit("expected a server within two minutes, found none")


async def compare(client: AsyncOpenAI, settings: Settings) -> dict[str, Any]:
    """Each client with another steering, all at once and one after another."""

    async def one(n: int) -> str:
        answer = await client.chat.completions.create(
            model="bundled",
            messages=chats(settings.clients)[n],  # pyright: ignore[reportArgumentType]
            temperature=0,
            max_tokens=settings.tokens,
            extra_body={"steering": f"15/{1037 + 31 * n}:{0.3 + 0.02 * n:.2f}x"},
        )
        return str(answer.choices[0].message.content)

    ratios, at_once, alone = [], [], []
    texts: list[str] = []
    singly: list[str] = []
    await one(0)
    for _ in range(settings.rounds):
        begun = time.perf_counter()
        texts = list(await asyncio.gather(*(one(n) for n in range(settings.clients))))
        at_once.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        singly = [await one(n) for n in range(settings.clients)]
        alone.append(time.perf_counter() - begun)
        ratios.append(alone[-1] / at_once[-1])
    return {
        "seconds": {"together": short(median(at_once)), "one after another": short(median(alone))},
        "times_as_fast": short(median(ratios)),
        "same_texts": sum(a == b for a, b in zip(texts, singly, strict=True)),
    }


async def mixed(client: AsyncOpenAI, address: str, pid: int, settings: Settings) -> dict[str, Any]:
    """Clients that ask for one thing after another, for some minutes."""
    seen: Counter[str] = Counter()
    end = time.monotonic() + 60 * settings.minutes
    memory: list[float] = []

    async def watching() -> None:
        while time.monotonic() < end:
            memory.append(resident_mib(pid))
            await asyncio.sleep(max(0.2, settings.minutes))

    async def asking(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < end:
            seen[await ask(client, address, chance)] += 1

    await asyncio.gather(watching(), *(asking(seed) for seed in range(settings.load_clients)))
    async with httpx.AsyncClient() as web:
        # What clients that hung up have left behind is gone within a moment.
        await asyncio.sleep(2)
        metrics = (await web.get(f"{address}/metrics")).text
    rows = re.findall(r"^\w*(?:running|rows|queue|cache_bytes)\w* ([\d.e+]+)$", metrics, re.MULTILINE)
    third = max(1, len(memory) // 3)
    return {
        "requests": dict(sorted(seen.items())),
        "failed": sum(count for name, count in seen.items() if name.startswith("failed")),
        "left_running": sum(map(float, rows)),
        "resident_mib": {
            "second third": short(median(memory[third : 2 * third] or memory)),
            "last third": short(median(memory[-third:])),
        },
    }


async def ask(client: AsyncOpenAI, address: str, chance: random.Random) -> str:
    """One request of some kind, and how it went."""
    kind = chance.choice(
        ["chat", "chat", "streamed chat", "streamed chat", "completion", "features", "refused", "hung up"]
    )
    subject = chance.choice(SUBJECTS)
    steering = f"15/{chance.randrange(9216)}:{chance.uniform(-1, 1) * 20:.3f}"
    body: dict[str, Any] = {"steering": steering} if chance.random() < 0.8 else {}
    options: dict[str, Any] = {
        "model": "bundled",
        "messages": [{"role": "user", "content": f"Tell me about {subject}."}],
        "max_tokens": chance.randint(1, 60),
        "temperature": chance.choice([0, 1]),
        "seed": chance.randrange(1000),
    }
    try:
        if kind == "chat":
            await client.chat.completions.create(**options, extra_body=body)
        elif kind in ("streamed chat", "hung up"):
            async with await client.chat.completions.create(**options, stream=True, extra_body=body) as chunks:
                count = 0
                async for _ in chunks:
                    count += 1
                    if kind == "hung up" and count == 3:
                        break
        elif kind == "completion":
            options["prompt"] = options.pop("messages")[0]["content"]
            await client.completions.create(**options, extra_body=body)
        elif kind == "features":
            async with httpx.AsyncClient(timeout=600) as web:
                answer = await web.post(f"{address}/v1/features", json={"input": f"All about {subject}", "top": 3})
                if answer.status_code != 200:
                    return f"failed: {answer.status_code} for {kind}"
        else:
            wrong = dict(chance.choice(REFUSED))
            options["max_tokens"] = wrong.pop("max_tokens", 5)
            try:
                await client.chat.completions.create(**options, extra_body=wrong)
            except APIStatusError as error:
                return kind if error.status_code == 400 else f"failed: {error.status_code} instead of 400"
            return "failed: not refused"
    except APIStatusError as error:
        return f"failed: {error.status_code} for {kind}"
    except Exception as error:  # whatever a broken connection raises
        return f"failed: {type(error).__name__} for {kind}"
    return kind


def resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def main() -> None:
    args = commandline.parsed(commandline.parser(__doc__))
    commandline.write(asyncio.run(run(QUICK if args.quick else Settings())), args, "serve")


if __name__ == "__main__":
    main()
