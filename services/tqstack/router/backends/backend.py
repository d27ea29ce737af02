"""One backend: where it is, how it is, what it has to do, and what it serves."""

from __future__ import annotations

import contextlib
from functools import cached_property
from typing import Any

import orjson

from tqstack.router.backends.address import Address
from tqstack.router.backends.definition import Definition
from tqstack.router.backends.load import Load
from tqstack.router.backends.ollama import LEAST, Contexts
from tqstack.router.backends.probe import Health, Probe, is_router
from tqstack.router.failure import Failure, too_long
from tqstack.router.needs import FEATURES
from tqstack.router.offers import Kind, State, View
from tqstack.router.upstream import Upstream, UpstreamError

_CHAT_ONLY = ("/v1/responses", "/v1/messages")  # sidecar, Ollama: translated by the router
# What the sidecar cannot do, unless its `/health` lists it under `capabilities`.
_SIDECAR_LACKS = frozenset({"embeddings", "images", "logprobs", "json_object", "json_schema"})
# What Ollama (0.33) refuses, and what it reads over; another server in its place may do it.
_OLLAMA_LACKS = frozenset({"tokenize", "prompts"})
_OLLAMA_IGNORES = frozenset(
    {"guided", "tool_choice", "choices", "echo", "logit_bias", "text_logprobs"}
)
_TOKENIZE = "/tokenize"  # vLLM's, and the sidecar's
_TOKENIZE_SECONDS = 10.0


class Backend:
    """
    Attributes:
        address: where it is.
        probe: how it is.
        load: what it has to do for us.
    """

    def __init__(
        self,
        definition: Definition,
        upstream: Upstream,
        *,
        hung_seconds: float = 10,
        still_seconds: float = 180,
    ):
        self.definition = definition
        self.name = definition.name
        self.kind: Kind = definition.kind
        key = definition.key.get_secret_value()
        self.address = Address(definition.url, key, definition.certificate, upstream)
        self.load = Load(definition.at_once)
        self._contexts = Contexts(self.address.fetch) if self.kind == "ollama" else None
        self.probe = Probe(
            self.name,
            self.address,
            enabled=definition.enabled,
            reports={"sidecar": True, "ollama": False, "openai": None}[self.kind],
            contexts=self._contexts,
            changed=self._health_changed,
            hung_seconds=hung_seconds,
            still_seconds=still_seconds,
        )
        # Answered with 404; asked again after it was away.
        self._unsupported_paths: set[str] = set(self._never_supported)
        self._views: dict[State, View] = {}

    @cached_property
    def _never_supported(self) -> tuple[str, ...]:
        return _CHAT_ONLY if self.kind == "sidecar" else ()

    def speaks(self, path: str) -> bool:
        """Whether it takes this path itself, as far as is known.

        Ollama takes them all, but drops namespaces of tools, fails on custom ones, and reads over
        tool_choice and forms in Messages: what is translated here loses less.
        """
        return path not in self._unsupported_paths and not (path in _CHAT_ONLY and self.is_ollama)

    def does_not_speak(self, path: str) -> None:
        self._unsupported_paths.add(path)

    @property
    def is_ollama(self) -> bool:
        """Whether it is an Ollama, and no other server in its place, as far as is known."""
        return self._contexts is not None and self._contexts.is_ollama

    @property
    def health(self) -> Health:
        return self.probe.health

    @property
    def models(self) -> list[dict[str, Any]]:
        """Entries of its `/v1/models`, as far as it may be asked for them."""
        allowed, models = self.definition.models, self.health.models
        if self.router_id:  # its names with prefixes are its own affair
            models = [e for e in models if e["id"] != "auto" and not _has_prefix(e)]
        return [e for e in models if not allowed or e["id"] in allowed]

    @property
    def router_id(self) -> str | None:
        """Of another router like this one."""
        return self.health.report["id"] if is_router(self.health.report) else None

    @property
    def busy(self) -> bool:
        """Whether it has requests running, ours or others."""
        return bool(self.load.running or self.health.running)

    def view(self) -> View:
        """What is known of it; the same object while that does not change."""
        state = self.probe.health.state
        if state == "up" and self.load.sick:
            state = "sick"
        view = self._views.get(state)
        if view is None:
            view = self._views[state] = self._make_view(state)
        return view

    def _make_view(self, state: State) -> View:
        definition = self.definition
        models = {entry["id"]: _context(entry) for entry in self.models}
        own = definition.default_model or next(iter((*definition.models, *models)), "")
        if self.router_id and not definition.default_model:
            own = "auto"  # it chooses
            models[own] = max((length for length in models.values() if length), default=None)
        if isinstance(length := self.health.model.get("context_length"), int):
            models[own] = length
        lacks = ignores = frozenset()
        can = self.health.report.get("capabilities")
        if self.kind == "sidecar":
            lacks = _SIDECAR_LACKS - set(can or ())
        elif self.router_id and isinstance(can, list):
            lacks = FEATURES - set(can)
        elif self.is_ollama:
            lacks, ignores = _OLLAMA_LACKS, _OLLAMA_IGNORES
        return View(
            self.name,
            state,
            models,
            own,
            str(self.health.model.get("architecture") or ""),
            self.kind,
            definition.role,
            definition.priority,
            lacks,
            ignores,
            cuts=self.is_ollama,
            router=self.router_id,
        )

    async def check_context(self, model: str, tokens: float, seconds: float) -> None:
        """Makes sure that it holds so many tokens, where only loading the model can tell.

        Raises:
            Failure: it does not.
        """
        if tokens < LEAST or not (self._contexts and self._contexts.unknown(model)):
            return
        with contextlib.suppress(UpstreamError):  # the request itself will tell
            await self._contexts.load(model, seconds)
        await self.probe.check()
        context = self.view().context(model)
        if context is not None and tokens >= context:
            raise too_long(self.name, model, context)

    async def count_tokens(self, chat: dict[str, Any]) -> int | None:
        """Tokens of a chat's prompt by the model's own template, if this backend tells."""
        if self.health.state != "up" or not self.speaks(_TOKENIZE):
            return None
        try:
            _, answer = await self.address.fetch(_TOKENIZE, orjson.dumps(chat), _TOKENIZE_SECONDS)
        except UpstreamError:
            return None
        except ValueError:
            answer = {}
        count = answer.get("count")
        if not isinstance(count, int):
            self.does_not_speak(_TOKENIZE)
            return None
        return count

    def report(self) -> dict[str, Any]:
        """What `/health` and the status page tell of this backend."""
        view = self.view()
        return {
            "state": view.state,
            "kind": self.kind,
            "role": view.role,
            "detail": self.health.detail,
            "url": self.address.url,
            "model": view.own_model,
            "models": len(view.models),
            "context_length": view.context(view.own_model),
            "running": self.load.running,
            "at_once": self.load.at_once,
            "prefill_speed": self.load.prefill_speed,
            "health": self.health.report,
        }

    def succeeded(self) -> None:
        self.probe.answered()
        self.load.succeeded()

    def failed(self, failure: Failure) -> None:
        """Counts a failure, if it was this backend's, and has it probed at once."""
        if not failure.sick:
            return
        self.load.failed()
        if failure.kind == "refused":
            self.probe.refuses()
        self.probe.doubt()

    def _health_changed(self, before: Health, after: Health) -> None:
        self._views.clear()
        if after.state == before.state:
            return
        if after.state == "up" and before.state in ("down", "loading"):
            # A fresh process owes nothing for its predecessor, and may be a newer version.
            self.load.succeeded()
            self._unsupported_paths = set(self._never_supported)
        elif self._contexts and after.state == "down":
            self._contexts.restart()


def _has_prefix(entry: dict[str, Any]) -> bool:
    """Whether another router's entry is one of those that name a backend of its own."""
    return entry["id"].startswith((f"{entry.get('backend')}:", "tq:"))


def _context(entry: dict[str, Any]) -> int | None:
    """Tokens that a model can hold, by its entry in `/v1/models` (`max_model_len` is vLLM's)."""
    length = entry.get("context_length") or entry.get("max_model_len")
    return length if isinstance(length, int) else None
