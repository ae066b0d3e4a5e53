"""What clients may ask, as OpenAI defines it and with fields of our own. What would change the answer and is not done here is
refused, and so is a field that nobody knows: a misspelt one must not pass for having had its effect.
"""

from __future__ import annotations

import json
import secrets
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qwen_scope.errors import QwenScopeError
from qwen_scope.generation.sampling import Sampling
from qwen_scope.server.config import ServerConfig
from qwen_scope.server.refused import Refused

MOST_STEERING = 65_536
"""Characters of a steering as JSON; far more than the most edits need."""
MOST_CANDIDATES = 20
"""Most likely tokens that a client may ask for beside each one, as OpenAI allows."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "min_p": (None, 0),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "web_search_options": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None, "medium"),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
}
"""Fields that would change the answer, with the values that ask for nothing."""

IGNORED = {
    "metadata",
    "moderation",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
"""Fields that make no difference to the answer."""


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="one of system, developer, user, assistant"
    )
    content: str | list[Any] | None = Field(None, description="text, or a list of parts of text")

    def plain(self, param: str) -> dict[str, str]:
        """Role and text, as templates take them.

        Raises:
            Refused: it holds something else than text.
        """
        unused = {"name", "refusal", "annotations"}
        for name, value in (self.model_extra or {}).items():
            if value not in (None, []) and name not in unused:
                raise Refused(400, f"expected messages of text alone, found {name} in one; leave it out", param)
        texts: list[str] = []
        for part in [self.content or ""] if not isinstance(self.content, list) else self.content:
            text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
            if not isinstance(text, str):
                raise Refused(
                    400, f"expected the content as text or parts of text, found {shown(part)}; send text", param
                )
            texts.append(text)
        return {"role": "system" if self.role == "developer" else self.role, "content": "".join(texts)}


class StreamOptions(BaseModel):
    """How a streamed answer is sent."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None


class TemplateOptions(BaseModel):
    """What the chat template is told."""

    model_config = ConfigDict(strict=True, extra="forbid")

    enable_thinking: bool | None = None


class Asked(BaseModel):
    """What chats and completions have in common."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = Field(None, description="the name of the model as text")
    max_tokens: int | None = Field(None, ge=1, description="an integer of at least 1")
    temperature: float | None = Field(None, description="a number from 0")
    top_p: float | None = Field(None, description="a number above 0 up to 1")
    top_k: int | None = Field(None, ge=-1, description="an integer; 0 or -1 for all tokens")
    seed: int | None = Field(None, description="an integer")
    stop: str | list[str] | None = Field(None, description="text or a list of texts")
    n: int | None = Field(None, ge=1, description="an integer of at least 1")
    ignore_eos: bool | None = Field(None, description="true or false")
    stream: bool | None = Field(None, description="true or false")
    stream_options: StreamOptions | None = Field(None, description='an object such as {"include_usage": true}')
    steering: Any = None
    trace: bool | None = Field(None, description="true or false")

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def candidates(self) -> int | None:
        """Most likely tokens wanted beside each one; None if no probabilities are wanted."""
        raise NotImplementedError

    @property
    def thinking(self) -> bool | None:
        """Whether the model should think first, where its template knows of it."""
        return None

    def default_tokens(self, config: ServerConfig) -> int:
        """Tokens generated where nobody says how many."""
        raise NotImplementedError

    def inputs(self) -> Any:
        """What is to be continued, as `Scope.generate` takes it."""
        raise NotImplementedError

    def samplings(self, config: ServerConfig) -> list[Sampling]:
        """How each of the `n` texts of a prompt is drawn: they differ in their seeds.

        Raises:
            Refused: more than the server allows, or numbers that make no sense.
        """
        most = self.max_tokens or self.default_tokens(config)
        if most > config.max_new_tokens:
            raise Refused(
                400,
                f"expected at most {config.max_new_tokens} tokens to generate, found {most}; ask for fewer",
                "max_tokens",
            )
        if self.trace and most > config.max_traced_tokens:
            raise Refused(
                400,
                f"expected at most {config.max_traced_tokens} tokens with trace, found {most}; set max_tokens lower",
                "max_tokens",
            )
        seed = secrets.randbits(31) if self.seed is None else self.seed
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        try:
            return [
                Sampling(
                    max_new_tokens=most,
                    temperature=1.0 if self.temperature is None else self.temperature,
                    top_p=1.0 if self.top_p is None else self.top_p,
                    top_k=max(0, self.top_k or 0),
                    seed=seed + choice,
                    stop=tuple(stop),
                    candidates=self.candidates or 0,
                    ignore_eos=bool(self.ignore_eos),
                )
                for choice in range(self.n or 1)
            ]
        except QwenScopeError as error:
            raise Refused.of(error) from error


class ChatRequest(Asked):
    """A body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, description="a list of messages, at least one")
    max_completion_tokens: int | None = Field(None, ge=1, description="an integer of at least 1")
    logprobs: bool | None = Field(None, description="true or false")
    top_logprobs: int | None = Field(
        None, ge=0, le=MOST_CANDIDATES, description=f"an integer from 0 to {MOST_CANDIDATES}"
    )
    chat_template_kwargs: TemplateOptions | None = Field(
        None, description='an object such as {"enable_thinking": false}'
    )

    def model_post_init(self, context: Any, /) -> None:
        """Takes the newer name of a field for the older one."""
        self.max_tokens = self.max_completion_tokens or self.max_tokens

    @property
    def candidates(self) -> int | None:
        """Most likely tokens wanted beside each one; None if no probabilities are wanted."""
        if self.top_logprobs and not self.logprobs:
            raise Refused(400, "expected logprobs with top_logprobs, found it left out; set it to true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def thinking(self) -> bool | None:
        """Whether the model should think first, where its template knows of it."""
        return self.chat_template_kwargs.enable_thinking if self.chat_template_kwargs else None

    def default_tokens(self, config: ServerConfig) -> int:
        """As many as the server allows."""
        return min(config.max_new_tokens, config.max_traced_tokens) if self.trace else config.max_new_tokens

    def inputs(self) -> Any:
        """The messages."""
        return plain(self.messages)


class CompletionRequest(Asked):
    """A body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="text, a list of texts, or token ids, at least one"
    )
    logprobs: int | None = Field(None, ge=0, le=MOST_CANDIDATES, description=f"an integer from 0 to {MOST_CANDIDATES}")

    @property
    def candidates(self) -> int | None:
        """Most likely tokens wanted beside each one; None if no probabilities are wanted."""
        return self.logprobs

    def default_tokens(self, config: ServerConfig) -> int:
        """As OpenAI's."""
        return min(16, config.max_new_tokens)

    def inputs(self) -> Any:
        """The prompt or prompts."""
        return self.prompt


class FeaturesRequest(BaseModel):
    """A body of /v1/features."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = Field(None, description="the name of the model as text")
    input: str | list[str] | list[int] | list[list[int]] | None = Field(
        None, description="text, a list of texts, or token ids"
    )
    messages: list[Message] | None = Field(None, min_length=1, description="a list of messages, at least one")
    layers: list[int] | None = Field(None, description="a list of integers")
    top: int | None = Field(None, ge=1, description="an integer of at least 1")
    chat_template_kwargs: TemplateOptions | None = Field(
        None, description='an object such as {"enable_thinking": false}'
    )

    @property
    def thinking(self) -> bool | None:
        """Opens the assistant's turn with thinking on or off; None reads the messages alone."""
        return self.chat_template_kwargs.enable_thinking if self.chat_template_kwargs else None

    def inputs(self) -> Any:
        """What is to be read, as `Scope.features` takes it.

        Raises:
            Refused: nothing, or two things.
        """
        if (self.input is None) == (self.messages is None):
            found = "neither" if self.input is None else "both"
            raise Refused(400, f"expected input or messages, found {found}; send one of them", "input")
        return plain(self.messages) if self.messages is not None else self.input


Request = TypeVar("Request", bound=BaseModel)


def plain(messages: list[Message]) -> list[dict[str, str]]:
    """Messages as templates take them."""
    return [message.plain(f"messages.{n}") for n, message in enumerate(messages)]


def read(body: bytes, kind: type[Request]) -> Request:
    """A body as a request of some kind.

    Raises:
        Refused: no JSON, a field that is missing, of another kind, unknown, or not supported.
    """
    try:
        content = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 are a ValueError too
        raise Refused(400, f"expected a body of JSON, found none that reads ({short(error)}); correct it") from error
    if not isinstance(content, dict):
        raise Refused(400, f"expected an object of JSON, found {shown(content)}; send one")
    if issubclass(kind, Asked):
        for name, harmless in UNSUPPORTED.items():
            if name in content and not any(_same(content[name], value) for value in harmless):
                raise Refused(
                    400,
                    f"expected no {name}, which this server does not support, found {shown(content[name])}; leave it out",
                    name,
                    "unsupported_parameter",
                )
        content = {name: value for name, value in content.items() if name not in UNSUPPORTED}
    content = {name: value for name, value in content.items() if name not in IGNORED}
    if unknown := sorted(set(content) - set(kind.model_fields)):
        raise Refused(
            400,
            f"expected fields that this server knows, found {shown(unknown[0])}; correct its name or leave it out",
            unknown[0][:100],
            "unknown_parameter",
        )
    try:
        return kind.model_validate(content)
    except (ValidationError, RecursionError, OverflowError) as error:
        raise _sentence(error, kind) from error


def _sentence(error: Exception, kind: type[BaseModel]) -> Refused:
    """What pydantic found first, as one sentence."""
    if not isinstance(error, ValidationError):
        return Refused(400, f"expected values of ordinary size, found others ({short(error)}); make them smaller")
    first = error.errors(include_url=False)[0]
    name, *inside = first["loc"]
    field, found, param = kind.model_fields[str(name)], first["input"], str(name)
    if name == "messages" and len(inside) > 1:
        field, param = Message.model_fields[str(inside[1])], f"messages.{inside[0]}.{inside[1]}"
    what = "it missing" if first["type"] == "missing" else shown(found)
    return Refused(400, f"expected {param} to be {field.description}, found {what}; correct it", param)


def check_steering(given: Any, most: int) -> None:
    """Bounds the work that a steering can make before it is known to be one.

    Raises:
        Refused: it is too long.
    """
    try:
        length = len(json.dumps(given))
    except RecursionError:
        length = MOST_STEERING + 1
    if length > MOST_STEERING:
        raise Refused(
            400,
            f"expected a steering of at most {MOST_STEERING} characters of JSON without deep nesting, found more; steer up to "
            f"{most} features",
            "steering",
        )


def shown(value: Any) -> str:
    """A value as an error quotes it."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:79]}…"


def short(error: Exception) -> str:
    """Another library's message, to quote."""
    return (str(error) or type(error).__name__)[:200]


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _same(value: Any, other: Any) -> bool:
    return value == other and (type(value) is type(other) or isinstance(value, int | float))
