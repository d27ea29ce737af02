"""What a request may hold. Fields that we do not know pass through untouched.

Types are strict where a lax one would hide a client's mistake ("5" is no number); roles are left to
the chat template.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tqstack.openai_api.errors import bad_request, from_validation

# Model names that mean "you choose".
ANY_MODEL = ("", "auto", "default", "tqstack")
Count = Annotated[int, Field(ge=1, strict=True)]
Flag = Annotated[bool, Field(strict=True)]


class Passing(BaseModel):
    """What the router needs of a request that it passes on; the backend judges the rest."""

    model_config = ConfigDict(extra="allow")

    model: Annotated[str, Field(strict=True)] = ""
    stream: Flag | None = False


class _Request(Passing):
    stream_options: dict[str, Any] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2, strict=True, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, strict=True)] | None = None
    top_k: Annotated[int, Field(ge=0, strict=True)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, strict=True)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0, strict=True)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, strict=True)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, strict=True)] | None = None
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=1)] | None = None
    cache_prompt: Flag | None = None

    @property
    def stop_strings(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if stop]

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool((self.stream_options or {}).get("include_usage"))


class Message(BaseModel):
    """One message: text, or a list of parts; both may be absent beside tool calls."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1, strict=True)]
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not self.tool_calls and self.role != "assistant":
            raise ValueError("content is required")
        return self


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: Flag | None = None
    response_format: dict[str, Any] | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TextRequest(_Request):
    """`POST /v1/completions`. A prompt is text or tokens; several prompts are not supported."""

    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[int], Field(min_length=1)]

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens


Text = Annotated[str, Field(min_length=1)]
NonEmpty = Annotated[list[Any], Field(min_length=1)]


class PassingChat(Passing):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]


class PassingText(Passing):
    prompt: Text | NonEmpty


class EmbeddingRequest(Passing):
    """`POST /v1/embeddings`. An input is a text or tokens, or a list of those."""

    input: Text | NonEmpty


RequestType = TypeVar("RequestType", bound=Passing)


def parse_json(body: bytes) -> dict[str, Any]:
    """The body as an object.

    Raises:
        ApiError: 400, if it is no JSON, or no object.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise bad_request(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad_request(f"the body must be a JSON object, not {type(value).__name__}")
    return value


def validate(kind: type[RequestType], value: dict[str, Any]) -> RequestType:
    """The request as its model.

    Raises:
        ApiError: 400, naming the first field that is wrong.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise from_validation(error) from None
