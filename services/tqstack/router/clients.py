"""What each client has used, and whether its limits allow more."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

from tqstack.openai_api.errors import ApiError
from tqstack.router.journal import Record
from tqstack.router.keys import Keys


class Bucket:
    """Tokens that may be used: so many at first, and as many again in every minute.

    A prompt is taken by its estimate, and put right when its usage is known; so it may go below
    zero. There is no clock inside: every call brings the time, in seconds.
    """

    def __init__(self, a_minute: int, now: float):
        self.a_minute = a_minute
        self._level = float(a_minute)
        self._at = now

    def wait(self, tokens: int, now: float) -> float:
        """Seconds until so many may be taken; one larger than the bucket, when it is full."""
        self._fill(now)
        return max(0.0, min(tokens, self.a_minute) - self._level) * 60 / self.a_minute

    def take(self, tokens: int, now: float) -> None:
        self._fill(now)
        self._level -= tokens

    def _fill(self, now: float) -> None:
        gained = max(0.0, now - self._at) * self.a_minute / 60
        self._level, self._at = min(float(self.a_minute), self._level + gained), now


@dataclass
class Use:
    """Of one client, since the router started."""

    running: int = 0
    requests: int = 0
    refused: int = 0  # for its limits
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    bucket: Bucket | None = field(default=None, repr=False)


class Clients:
    """By name; who needs no key has none, and no limits."""

    def __init__(self, keys: Keys):
        self.uses: dict[str, Use] = {}
        self._keys = keys

    def begin(self, name: str, tokens: int) -> None:
        """A request with a prompt of about so many tokens comes.

        Raises:
            ApiError: 429, if the client's limits do not allow it now.
        """
        use = self.uses.setdefault(name, Use())
        key, now = self._keys.named.get(name), time.monotonic()
        if key and key.at_once and use.running >= key.at_once:
            raise _refuse(use, f"the key {name!r} allows {key.at_once} requests at a time", 1)
        if key and key.tokens_a_minute:
            bucket = use.bucket
            if bucket is None or bucket.a_minute != key.tokens_a_minute:
                bucket = use.bucket = Bucket(key.tokens_a_minute, now)
            if wait := bucket.wait(tokens, now):
                allowed = f"the key {name!r} allows {key.tokens_a_minute:,} tokens a minute"
                raise _refuse(use, f"{allowed}, and this prompt has about {tokens:,}", wait)
            bucket.take(tokens, now)
        else:
            use.bucket = None
        use.running += 1
        use.requests += 1

    def end(self, record: Record, estimate: int) -> None:
        """A request that has begun with this estimate is over."""
        use = self.uses[record.client]
        read = record.prompt_tokens
        if read is None:
            read = 0 if record.first_token is None else estimate
        output = record.output_tokens or 0
        use.running -= 1
        use.prompt_tokens += read
        use.cached_tokens += record.cached_tokens or 0
        use.output_tokens += output
        if use.bucket:
            use.bucket.take(read + output - estimate, time.monotonic())

    def report(self) -> dict[str, dict[str, Any]]:
        """What the status page shows of those with names."""
        report = {}
        for name in {**self._keys.named, **self.uses}:
            if not name:
                continue
            use, key = self.uses.get(name, Use()), self._keys.named.get(name)
            report[name] = {
                "running": use.running,
                "requests": use.requests,
                "refused": use.refused,
                "prompt_tokens": use.prompt_tokens,
                "cached_tokens": use.cached_tokens,
                "output_tokens": use.output_tokens,
                "at_once": key.at_once if key else None,
                "tokens_a_minute": key.tokens_a_minute if key else None,
            }
        return report


def _refuse(use: Use, message: str, seconds: float) -> ApiError:
    use.refused += 1
    return ApiError(
        429,
        f"{message}; ask again in {math.ceil(seconds)} s",
        code="rate_limit_exceeded",
        retry_after=math.ceil(seconds),
    )
