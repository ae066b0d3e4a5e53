"""`Endpoint`: asks a model behind an OpenAI-compatible address, many questions at a time; what goes wrong is a sentence."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Callable, Coroutine, Hashable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from qwen_scope.errors import QwenScopeError, reason
from qwen_scope.index.labels import HAND, clean
from qwen_scope.stopping import Stopped, stopping

if TYPE_CHECKING:
    from openai import AsyncOpenAI

Key = TypeVar("Key", bound=Hashable)
GIVE_UP = 5
"""Questions in a row without a usable answer after which no more are asked."""
_POLL = 0.2  # seconds after which a Ctrl-C is looked for
# Templates often put the opening mark into the question, so that the answer has the closing one alone.
_THOUGHTS = re.compile(r"\A.*</think>|<think>.*", re.DOTALL)


class Answer(str):
    """An answer in text, which knows what it took."""

    read: int
    """Tokens of its question, as the endpoint counts them; 0 if it does not."""
    written: int
    """Tokens of the answer, thoughts included, as the endpoint counts them."""

    def __new__(cls, text: str, read: int = 0, written: int = 0) -> Answer:
        """A text with its counts."""
        answer = super().__new__(cls, text)
        answer.read, answer.written = read, written
        return answer


class EndpointError(QwenScopeError):
    """An endpoint gave no usable answer."""

    def __init__(self, message: str, final: bool = False):
        super().__init__(message)
        self.final = final
        """Whether other questions would fare the same: nobody is there, the key is wrong, the model is unknown."""


class Endpoint:
    """A model behind an address that speaks OpenAI's chat completions.

    Overload, server errors, broken connections and time-outs are tried again by the `openai` package, after a growing delay
    or the one that the server asks for.

    Args:
        address: such as `http://127.0.0.1:8000/v1`.
        model: what the endpoint calls the model.
        key_variable: environment variable that holds the key; without one, none is sent.
        timeout: seconds that an attempt may take, from connecting to the last byte.
        retries: attempts after the first.
        concurrency: questions that are on their way at once.
        answer_tokens: most tokens of an answer, thoughts included.
        temperature: 0 asks for the most likely answer, so that the same question has the same one.

    Raises:
        QwenScopeError: no such address or variable, a number out of range, or the package openai is not installed.
    """

    def __init__(
        self,
        address: str,
        model: str,
        *,
        key_variable: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        concurrency: int = 4,
        answer_tokens: int = 256,
        temperature: float = 0,
    ):
        if not _is_address(address):
            raise QwenScopeError(
                f"expected the address of an endpoint, such as http://127.0.0.1:8000/v1, found {address!r}; give the whole of it"
            )
        if _holds_secrets(address):
            raise QwenScopeError(
                "expected an address without user, password or query, which errors would show, found one with; name an "
                "environment variable that holds the key instead (--key-variable)"
            )
        # As it stands with the labels, where it must be found again and must not pass for a hand's.
        if model != clean(model) or model in ("", HAND):
            raise QwenScopeError(
                f"expected the name of a model, found {model!r}; give the one that the endpoint knows it by"
            )
        for name, value, least in (
            ("timeout", timeout, 0.001),
            ("retries", retries, 0),
            ("concurrency", concurrency, 1),
            ("answer_tokens", answer_tokens, 1),
            ("temperature", temperature, 0),
        ):
            if not least <= value < float("inf"):
                raise QwenScopeError(f"expected {name} of at least {least}, found {value}; choose a larger number")
        if key_variable is not None and not os.environ.get(key_variable):
            raise QwenScopeError(
                f"expected a key in the environment variable {key_variable}, found none; export it, or name another variable"
            )
        self.address = address
        """Where it is."""
        self.model = model
        """What the model is called there."""
        self.timeout = timeout
        """Seconds for an attempt."""
        self.retries = retries
        """Attempts after the first."""
        self.concurrency = concurrency
        """Questions at once."""
        self.answer_tokens = answer_tokens
        """Most tokens of an answer."""
        self.tokens_read = 0
        """Tokens of prompts so far, as the endpoint counts them; 0 if it does not."""
        self.tokens_written = 0
        """Tokens of answers so far, as the endpoint counts them."""
        # A line break that came along out of a file is no part of it.
        self._key = None if key_variable is None else os.environ[key_variable].strip()
        if self._key is not None and not re.fullmatch("[!-~]+", self._key):
            raise QwenScopeError(
                f"expected a key of ASCII characters without blanks in the environment variable {key_variable}, found others; "
                "export it again"
            )
        self._options: dict[str, Any] = {"temperature": temperature, "max_tokens": answer_tokens}
        self._seeded = True

    def ask(self, *turns: str) -> str:
        """The answer to one question, or to the last turn of a talk: a user's and the model's turns, one after the other.

        Raises:
            EndpointError: there is no usable one.
        """
        answers = []
        failures = self.ask_all([(0, turns)], lambda _, answer: answers.append(answer), total=1)
        for error in failures.values():
            raise error
        return answers[0]

    def ask_all(
        self,
        questions: Iterable[tuple[Key, Sequence[str]]],
        take: Callable[[Key, Answer], None],
        *,
        total: int,
        doing: str | None = None,
        seeds: Callable[[Key], int] | None = None,
    ) -> dict[Key, EndpointError]:
        """Asks questions and hands each answer to `take(key, answer)` in this thread as soon as it is there.

        Ctrl-C, and an endpoint that cannot go on, end it once what is on its way has been answered or has failed; a second
        Ctrl-C ends it at once. Whatever ends it, answers that have come are handed over first.

        Args:
            questions: pairs of a key and the turns of a question as in `ask`, read a few ahead.
            take: may raise `EndpointError` if the answer makes no sense.
            total: how many questions there are, for the progress bar.
            doing: what the bar says; no bar without.
            seeds: the seed sent with each question, for endpoints that draw their answers; none is sent without.

        Returns:
            What went wrong with those that have no usable answer.

        Raises:
            EndpointError: nobody is there, the key or the model is wrong, or five in a row had no usable answer.
            Stopped: somebody asked for it.
        """
        failures: dict[Key, EndpointError] = {}
        if total == 0:
            return failures
        waiting: dict[Future[Answer], Key] = {}
        in_a_row, last = 0, None
        client = self._client()
        bar = tqdm(total=total, desc=doing, unit="answer", disable=doing is None)
        with stopping() as stop, _Loop(client) as loop, bar:

            def hand_over() -> None:
                nonlocal in_a_row, last
                # Not for ever: a signal only sets a flag.
                wait(waiting, timeout=_POLL, return_when=FIRST_COMPLETED)
                for future in [future for future in waiting if future.done()]:
                    error = _failure(take, waiting[future], future)
                    # Only now: whatever interrupts before, the answer is handed over at the end.
                    key = waiting.pop(future)
                    bar.update()
                    if error is None:
                        in_a_row = 0
                        continue
                    failures[key] = error
                    in_a_row += 1
                    if error.final:
                        last = last or error
                    elif in_a_row == GIVE_UP:
                        last = last or EndpointError(f"{error} ({GIVE_UP} questions in a row failed)", final=True)

            try:
                for key, turns in questions:
                    waiting[loop.start(self._answer(client, turns, seeds(key) if seeds else None))] = key
                    while len(waiting) >= self.concurrency:
                        hand_over()
                    if stop.asked or last:
                        break
                # What is on its way may still be answered.
                while waiting:
                    hand_over()
            finally:
                for future, key in waiting.items():
                    if future.done():
                        _failure(take, key, future)
        if last is not None:
            raise last
        if stop.asked:
            raise Stopped("stopped; what was answered is kept, and the same command goes on")
        return failures

    def _client(self) -> AsyncOpenAI:
        openai, httpx = _packages()
        seconds = self.timeout

        class Bounded(openai.DefaultAsyncHttpxClient):
            """Some servers send a blank now and then while they think, which keeps any time-out for reading from passing."""

            async def send(self, request: Any, **options: Any) -> Any:
                try:
                    async with asyncio.timeout(seconds):
                        return await super().send(request, **options)
                except TimeoutError as error:
                    raise httpx.ReadTimeout(f"no answer within {seconds} s", request=request) from error

        return openai.AsyncOpenAI(
            base_url=self.address,
            # The package wants one; servers without keys do not look at it.
            api_key=self._key or "none",
            timeout=self.timeout,
            max_retries=self.retries,
            http_client=Bounded(),
        )

    async def _answer(self, client: AsyncOpenAI, turns: Sequence[str], seed: int | None) -> Answer:
        """One answer, without the thoughts before it.

        Raises:
            EndpointError: there is no usable one.
        """
        openai, _ = _packages()
        try:
            completion = await self._completion(client, turns, seed)
        except openai.APIResponseValidationError as error:
            raise self._nonsense(reason(error)) from error
        except openai.OpenAIError as error:
            raise self._in_words(error) from error
        except (ValueError, RecursionError) as error:  # JSON that does not parse
            raise self._nonsense(f"JSON that does not parse: {reason(error)}") from error
        try:
            text, cut = completion.choices[0].message.content, completion.choices[0].finish_reason == "length"
        except (AttributeError, LookupError, TypeError):
            raise self._nonsense(repr(completion)) from None
        read, written = (_count(completion.usage, name) for name in ("prompt_tokens", "completion_tokens"))
        self.tokens_read += read
        self.tokens_written += written
        if not isinstance(text, str | None):
            raise self._nonsense(repr(text))
        # Lone surrogates, which JSON can hold, are no text to a file or a tokenizer.
        text = _THOUGHTS.sub("", text or "").strip().encode("utf-8", "replace").decode("utf-8")
        if not text and cut:
            raise EndpointError(
                f"expected an answer of {self.model} within {self.answer_tokens} tokens, found only thoughts; allow more "
                "answer tokens"
            )
        if not text:
            raise self._nonsense("an empty one")
        return Answer(text, read, written)

    async def _completion(self, client: AsyncOpenAI, turns: Sequence[str], seed: int | None) -> Any:
        """The endpoint's whole answer. Options that it refuses are left out, or get their newer name, from then on."""
        openai, _ = _packages()
        messages: Any = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
        while True:
            options = self._options if seed is None or not self._seeded else {**self._options, "seed": seed}
            try:
                return await client.chat.completions.create(model=self.model, messages=messages, **options)
            except openai.BadRequestError as error:
                accepted = _without_refused(options, str(error))
                if accepted == options:
                    raise
                self._seeded = self._seeded and ("seed" in accepted or "seed" not in options)
                self._options = {key: value for key, value in accepted.items() if key != "seed"}

    def _nonsense(self, found: str) -> EndpointError:
        return EndpointError(
            f"expected an answer in text from {self.address}, found {self._quoted(found, 80)}; check that the address is whole, "
            "most end in /v1"
        )

    def _quoted(self, said: str, most: int) -> str:
        """The beginning of what a server said, without the key, should it repeat that."""
        return clean(said.replace(self._key, "…") if self._key else said)[:most]

    def _in_words(self, error: Exception) -> EndpointError:
        """What an error of the openai package means here."""
        openai, _ = _packages()
        where, tries = self.address, f"after {self.retries + 1} attempts" if self.retries else "at once"
        if isinstance(error, openai.APITimeoutError):
            return EndpointError(
                f"expected an answer from {where} within {self.timeout:g} s, found none {tries}; allow more time, or lower the "
                "concurrency"
            )
        if isinstance(error, openai.APIConnectionError):
            cause = self._quoted(reason(error.__cause__ or error), 200)
            return EndpointError(
                f"expected an endpoint at {where}, found that it cannot be reached ({cause}); start it, or check the address",
                final=True,
            )
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            sent = "the key that was sent" if self._key else "requests without a key"
            return EndpointError(
                f"expected {where} to let us in, found that it refuses {sent}; export a valid one and name its variable",
                final=True,
            )
        said = self._quoted(_said(error), 200)
        if isinstance(error, openai.NotFoundError):
            return EndpointError(
                f"expected the model {self.model} at {where}, found no such model or address ({said}); check both, most "
                "addresses end in /v1",
                final=True,
            )
        if isinstance(error, openai.RateLimitError):
            return EndpointError(
                f"expected {where} to answer, found that it limits the rate still {tries} ({said}); lower the concurrency, or "
                "go on later"
            )
        return EndpointError(
            f"expected {where} to answer, found that it cannot ({said}); check the model's name, or go on later"
        )

    def __repr__(self) -> str:
        return f"Endpoint({self.address!r}, {self.model!r})"


class _Loop:
    """An event loop in a thread of its own: so it also runs inside a notebook, and Ctrl-C meets the caller, not a request."""

    def __init__(self, client: AsyncOpenAI):
        self._client = client
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self, work: Coroutine[Any, Any, Answer]) -> Future[Answer]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def __enter__(self) -> _Loop:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        """Nothing is left running or open."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()
        await self._loop.shutdown_asyncgens()


def _failure(take: Callable[[Key, Answer], None], key: Key, future: Future[Answer]) -> EndpointError | None:
    """Hands over an answer that has come; what was wrong with it, if anything was."""
    try:
        take(key, future.result())
    except EndpointError as error:
        return error
    return None


def _said(error: Any) -> str:
    """The status that an error of the package openai came with, and what the server said to it."""
    body = getattr(error, "body", None)
    words = body.get("message") or body.get("detail") or body if isinstance(body, dict) else body
    return f"{getattr(error, 'status_code', '')} {words or reason(error)}"


def _count(usage: object, name: str) -> int:
    """A count of tokens that an endpoint tells of, or 0 if it does not."""
    found = getattr(usage, name, None)
    return max(0, found) if isinstance(found, int) else 0


def _is_address(address: str) -> bool:
    _, httpx = _packages()
    try:
        return re.match(r"https?://[^/\s]", address) is not None and bool(httpx.URL(address).host)
    except (httpx.InvalidURL, ValueError):
        return False


def _holds_secrets(address: str) -> bool:
    url = _packages()[1].URL(address)
    return bool(url.userinfo or url.query)


def _without_refused(options: dict[str, Any], refusal: str) -> dict[str, Any]:
    """Options without one that an endpoint's refusal names; newer models call `max_tokens` otherwise."""
    if "max_tokens" in options and "max_completion_tokens" in refusal:
        return {
            **{key: options[key] for key in options if key != "max_tokens"},
            "max_completion_tokens": options["max_tokens"],
        }
    return {key: value for key, value in options.items() if key not in ("temperature", "seed") or key not in refusal}


def _packages() -> tuple[Any, Any]:
    """The package openai, and the one that it speaks HTTP with."""
    try:
        import httpx2
        import openai
    except ImportError as error:
        raise QwenScopeError(
            "expected the package openai to ask an endpoint, found it is not installed; run pip install 'qwen-scope[index]'"
        ) from error
    return openai, httpx2
