"""Who writes: the loaded model, steered or not, or a model behind an endpoint. Each stays within a purse."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from tqdm import tqdm

from qwen_scope.data.synthesis.config import SynthesisConfig
from qwen_scope.data.synthesis.purse import Purse, Spent
from qwen_scope.generation.generate import ROWS, generate
from qwen_scope.generation.sampling import Sampling
from qwen_scope.index.endpoint import Answer, Endpoint, EndpointError
from qwen_scope.scope import Scope
from qwen_scope.steering.edit import Edit
from qwen_scope.stopping import Stopped, stopping
from qwen_scope.tokens import TokenizedText, tokenize

GO_ON = "what was written is kept, and the same command goes on"
_TEMPLATE = 64  # tokens that an endpoint may put around a question
_BYTES_A_TOKEN = 4

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Ask(Generic[K]):
    """Something to be written."""

    key: K
    """What it is called."""
    prompt: str
    """What is asked."""
    seed: int
    """What chance depends on."""
    edit: Edit | None = None
    """What the model is steered by while it writes."""
    most: int | None = None
    """Tokens at most, if not as many as a text may have."""


class Written(NamedTuple):
    """What was written."""

    text: str
    """As it came."""
    cut: bool
    """Whether it reached the most tokens."""
    spent: Spent
    """What it took."""


@dataclass
class Outcome(Generic[K]):
    """How far the asking went."""

    whole: bool = True
    """Whether all were asked for: else the purse had no more."""
    failed: dict[K, str] = field(default_factory=dict)
    """Those that have no usable answer, and why."""


class Writer(Protocol):
    """Whoever writes."""

    name: str
    """The model."""

    def write(
        self, asks: Sequence[Ask[K]], take: Callable[[Mapping[K, Written]], None], purse: Purse, doing: str
    ) -> Outcome[K]:
        """Has things written, in order, as far as the purse reaches, and hands over what was, as soon as it is there.

        Args:
            asks: what to write.
            take: may raise `EndpointError` for an answer of an endpoint that makes no sense.
            purse: what it may take.
            doing: what the progress bar says.

        Raises:
            EndpointError: an endpoint that cannot go on.
            Stopped: Ctrl-C.
            QwenScopeError: a prompt or steering that the model does not take.
        """
        ...


class Local:
    """The loaded model.

    Args:
        scope: the model and suite.
        config: how it is asked, and how tokens are drawn.
        name: what the model is called.
    """

    def __init__(self, scope: Scope, config: SynthesisConfig, name: str):
        self.name = name
        """The model."""
        self._scope, self._config = scope, config

    def write(
        self, asks: Sequence[Ask[K]], take: Callable[[Mapping[K, Written]], None], purse: Purse, doing: str
    ) -> Outcome[K]:
        """See `Writer.write`; some texts are generated together."""
        rest, whole = deque(asks), True
        with stopping() as stop, tqdm(total=len(asks), desc=doing, unit="text", disable=len(asks) < 8) as bar:
            while rest and whole:
                some: list[tuple[Ask[K], TokenizedText, Spent]] = []
                while rest and len(some) < ROWS:
                    prompt = self._read(rest[0].prompt)
                    most = Spent(len(prompt), self._most(rest[0]))
                    if not purse.hold(most):
                        break
                    some.append((rest.popleft(), prompt, most))
                # Texts may take less than was held back for them, so that there is enough for another.
                whole = bool(some)
                if some:
                    take(self._generate(some, purse))
                bar.update(len(some))
                # Also after the last of these: whoever asks has more.
                if stop.asked:
                    raise Stopped(f"stopped; {GO_ON}")
        return Outcome(whole)

    def _generate(self, some: list[tuple[Ask[K], TokenizedText, Spent]], purse: Purse) -> dict[K, Written]:
        config, scope = self._config, self._scope
        stop = ("\n",) if config.asking == "list" else ()
        found = generate(
            scope.backbone,
            scope.suite,
            [prompt for _, prompt, _ in some],
            [scope.changes(ask.edit) for ask, _, _ in some],
            [Sampling(self._most(ask), config.temperature, config.top_p, 0, ask.seed, stop) for ask, _, _ in some],
            progress=False,
        )
        written: dict[K, Written] = {}
        for (ask, prompt, most), made in zip(some, found, strict=True):
            spent = Spent(len(prompt), len(made.ids))
            purse.settle(most, spent)
            written[ask.key] = Written(made.text, made.finish == "length", spent)
        return written

    def _most(self, ask: Ask[K]) -> int:
        return ask.most or self._config.max_new_tokens

    def _read(self, prompt: str) -> TokenizedText:
        given: Any = prompt if self._config.asking == "list" else [{"role": "user", "content": prompt}]
        return tokenize(given, self._scope.backbone.tokenizer, reply=True)[0][0]


class Remote:
    """A model behind an endpoint.

    Before a question is sent, as much is held back as it may take at most: as many tokens as the question has bytes, some for
    the template, and the most tokens of an answer. An endpoint that counts no tokens is reckoned with a token for four bytes.

    Args:
        endpoint: whom to ask.
        lost: is told of tokens that brought no usable answer.
    """

    def __init__(self, endpoint: Endpoint, lost: Callable[[Spent], object]):
        self.name = endpoint.model
        """What the endpoint calls the model."""
        self._endpoint, self._lost = endpoint, lost

    def write(
        self, asks: Sequence[Ask[K]], take: Callable[[Mapping[K, Written]], None], purse: Purse, doing: str
    ) -> Outcome[K]:
        """See `Writer.write`."""
        endpoint, outcome = self._endpoint, Outcome[K]()
        rest, on_way = deque(asks), dict[K, Ask[K]]()
        before = Spent(endpoint.tokens_read, endpoint.tokens_written)
        used = Spent()

        def questions() -> Iterator[tuple[K, tuple[str]]]:
            while rest and purse.hold(self._most(rest[0])):
                ask = rest.popleft()
                on_way[ask.key] = ask
                yield ask.key, (ask.prompt,)

        def taken(key: K, answer: Answer) -> None:
            nonlocal used
            ask, spent = by_key[key], Spent(answer.read, answer.written)
            counted = spent
            if not spent.tokens:
                spent = Spent(*(len(text.encode()) // _BYTES_A_TOKEN + 1 for text in (ask.prompt, answer)))
            # An answer that could not be kept is handed over once more at the end, but was paid for once.
            if on_way.pop(key, None) is not None:
                used = used.plus(counted)
                purse.settle(self._most(ask), spent)
            take({key: Written(answer, False, spent)})

        by_key = {ask.key: ask for ask in asks}
        try:
            while rest:
                left = len(rest)
                failed = endpoint.ask_all(
                    questions(), taken, total=left, doing=doing, seeds=lambda key: by_key[key].seed
                )
                outcome.failed |= {key: str(error) for key, error in failed.items()}
                for key in failed:
                    if key in on_way:
                        purse.settle(self._most(on_way.pop(key)), Spent())
                # What was on its way took less than was held back for it, perhaps enough for another question.
                if len(rest) == left:
                    outcome.whole = False
                    break
        except EndpointError as error:
            raise EndpointError(f"{error} ({GO_ON})", final=error.final) from error
        finally:
            whole = Spent(endpoint.tokens_read, endpoint.tokens_written)
            lost = Spent(whole.read - before.read - used.read, whole.written - before.written - used.written)
            purse.spend(lost)
            self._lost(lost)
        return outcome

    def _most(self, ask: Ask[K]) -> Spent:
        return Spent(len(ask.prompt.encode()) + _TEMPLATE, self._endpoint.answer_tokens)
