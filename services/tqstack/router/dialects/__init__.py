"""Other APIs in terms of chat completions, for backends that do not speak them themselves."""

from __future__ import annotations

from typing import Any, Protocol

from tqstack.openai_api.errors import ApiError


class Stream(Protocol):
    """Turns a stream of chat completion chunks into another API's events."""

    def feed(self, data: bytes) -> bytes:
        """Events for whole events of the chat stream."""
        ...

    def end(self) -> bytes:
        """The closing events, once the chat stream is known to be whole."""
        ...


class Dialect(Protocol):
    """An API that can be translated to chat completions and back."""

    def to_chat(self, request: dict[str, Any]) -> dict[str, Any]:
        """The request as a chat request.

        Raises:
            ApiError: 400 for what is malformed, or has no counterpart.
        """
        ...

    def from_chat(self, answer: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
        """A chat completion as this API's answer to `request`."""
        ...

    def stream(self, request: dict[str, Any]) -> Stream: ...

    def error_body(self, error: ApiError) -> dict[str, Any]: ...

    def error_event(self, error: ApiError) -> bytes:
        """An error as the last event of a stream that has begun."""
        ...
