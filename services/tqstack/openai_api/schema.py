"""What a request may hold. Fields that we do not know pass through untouched.

Types are strict where a lax one would hide a client's mistake ("5" is no number); roles are left to
the chat template.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tqstack.openai_api.errors import bad_request, from_validation

# Model names that mean "you choose".
ANY_MODEL = ("", "auto", "default", "tqstack")
Count = Annotated[int, Field(ge=1, strict=True)]
MOST_CHOICES = 16
MOST_LOGPROBS = 20
Alternatives = Annotated[int, Field(ge=0, le=MOST_LOGPROBS, strict=True)]
TokenId = Annotated[int, Field(strict=True, ge=0)]
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
    top_k: Annotated[int, Field(ge=-1, strict=True)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, strict=True)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0, strict=True)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, strict=True)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, strict=True)] | None = None
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: Flag | None = None
    min_tokens: Annotated[int, Field(ge=0, strict=True)] | None = None
    ignore_eos: Flag | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    prompt_logprobs: Alternatives | None = None
    response_format: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: Annotated[str, Field(min_length=1)] | None = None
    guided_choice: list[str] | None = None
    guided_grammar: Annotated[str, Field(min_length=1)] | None = None
    structured_outputs: dict[str, Any] | None = None
    json_schema: dict[str, Any] | str | None = None
    grammar: Annotated[str, Field(min_length=1)] | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=MOST_CHOICES)] | None = None
    cache_prompt: Flag | None = None

    @field_validator("logit_bias")
    @classmethod
    def _of_tokens(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        if any(not token.isdecimal() for token in bias or ()):
            raise ValueError("tokens are named by their numbers")
        return bias

    @field_validator("prompt_logprobs")
    @classmethod
    def _not_streamed(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("stream"):
            raise ValueError("they come with a whole answer; leave out stream")
        return value

    @property
    def stop_strings(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if stop]

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool((self.stream_options or {}).get("include_usage"))

    @property
    def wants_running_usage(self) -> bool:
        """Whether every chunk of a stream tells the usage so far."""
        return bool((self.stream_options or {}).get("continuous_usage_stats"))


class Message(BaseModel):
    """One message: text, or a list of parts; both may be absent beside tool calls."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1, strict=True)]
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    function_call: dict[str, Any] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        calls = self.tool_calls or self.function_call
        if self.content is None and not calls and self.role != "assistant":
            raise ValueError("content is required")
        return self


class Function(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(min_length=1, strict=True)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["function"] = "function"
    function: Function


class ChatRequest(_Request):
    """`POST /v1/chat/completions`. OpenAI's `functions` of before become tools."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: Flag | None = None
    functions: list[Function] | None = None
    function_call: Literal["none", "auto"] | dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag | None = None
    logprobs: Flag | None = None
    top_logprobs: Alternatives | None = None
    modalities: list[str] | None = None
    verbosity: str | None = None

    @field_validator("tools")
    @classmethod
    def _well_formed(cls, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        """Checked, and passed to the template as they came."""
        for tool in tools or ():
            try:
                Tool.model_validate(tool)
            except ValidationError as error:
                problem = error.errors()[0]
                where = ".".join(map(str, problem["loc"]))
                raise ValueError(f"a tool needs type function and a name; {where}") from None
        return tools

    @model_validator(mode="after")
    def _newer_names(self) -> ChatRequest:
        if self.functions and not self.tools:
            dumped = (function.model_dump(exclude_none=True) for function in self.functions)
            self.tools = [{"type": "function", "function": function} for function in dumped]
            choice = self.function_call
            named = isinstance(choice, dict)
            self.tool_choice = {"type": "function", "function": choice} if named else choice
        return self

    @field_validator("top_logprobs")
    @classmethod
    def _of_something(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("send logprobs: true with it")
        return value

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told beside each; None: nothing is."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def legacy_functions(self) -> bool:
        """Whether calls are to be answered in the form of before tools."""
        return bool(self.functions)

    @property
    def continues(self) -> bool:
        """Whether the answer goes on with the last message, which the assistant has begun."""
        if self.continue_final_message is not None:
            return self.continue_final_message
        last = self.messages[-1]
        begun = last.role == "assistant" and bool(last.content) and not last.tool_calls
        return begun and self.add_generation_prompt is None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[Annotated[int, Field(strict=True)]], Field(min_length=1)]
NonEmpty = Annotated[list[Any], Field(min_length=1)]


class TextRequest(_Request):
    """`POST /v1/completions`. A prompt is text or tokens; each of a list gets its own answers."""

    prompt: (
        Text
        | Tokens
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[Tokens], Field(min_length=1)]
    )
    max_tokens: Annotated[int, Field(ge=0, strict=True)] | None = None
    echo: Flag | None = None
    best_of: Annotated[int, Field(strict=True, ge=1, le=MOST_CHOICES)] | None = None
    logprobs: Alternatives | None = None

    @model_validator(mode="after")
    def _says_something(self) -> TextRequest:
        if self.max_tokens == 0 and not (self.echo or self.prompt_logprobs is not None):
            raise ValueError("max_tokens: 0 needs echo, or there is nothing to answer")
        return self

    @field_validator("best_of")
    @classmethod
    def _of_several(cls, value: int | None, info: ValidationInfo) -> int | None:
        wanted = info.data.get("n") or 1
        if value and value < wanted:
            raise ValueError("there must be at least n to choose from")
        if value and value > wanted and info.data.get("stream"):
            raise ValueError("a stream cannot wait for the best; leave out stream")
        return value

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told beside each; None: nothing is."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        given: Any = self.prompt
        several = isinstance(given, list) and not isinstance(given[0], int)
        return given if several else [given]

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens


class TokenizeRequest(Passing):
    """`POST /tokenize` of a text; a chat is a `ChatRequest`."""

    prompt: Text
    add_special_tokens: Flag = True


class DetokenizeRequest(Passing):
    """`POST /detokenize`."""

    tokens: Tokens


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
