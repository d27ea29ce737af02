"""From a request to what the engine is to do for each of its answers."""

from __future__ import annotations

from typing import Any

from tqstack.engine.engine import Engine
from tqstack.engine.grammar import Grammar, GrammarError
from tqstack.engine.jobs import Job
from tqstack.engine.sampling import Sampling
from tqstack.models.runtime import Runtime
from tqstack.openai_api.errors import bad_request
from tqstack.openai_api.schema import ChatRequest, TextRequest
from tqstack.sidecar.defaults import sampling_defaults
from tqstack.sidecar.forms import bad_form, grammar_of
from tqstack.sidecar.prompt import Prompt, check_tokens

Request = ChatRequest | TextRequest


def ranked(request: Request) -> bool:
    """Whether more answers are made than are wanted, and the likeliest are given."""
    return isinstance(request, TextRequest) and (request.best_of or 0) > (request.n or 1)


def samples(request: Request) -> int:
    """Answers that are made of each prompt."""
    best_of = request.best_of if isinstance(request, TextRequest) else None
    return max(best_of or 1, request.n or 1)


def checked_grammar(
    engine: Engine, runtime: Runtime, request: Request, prompt: Prompt
) -> Grammar | None:
    """The form of the request's answers, compiled.

    Raises:
        ApiError: 400, if it cannot be had; with why.
    """
    found = grammar_of(runtime.tokenizer, request, prompt.reasoning)
    if found is None:
        return None
    grammar, param = found
    try:
        engine.check(grammar)
    except GrammarError as error:
        raise bad_form(str(error), param) from None
    return grammar


def make_job(
    runtime: Runtime,
    request: Request,
    prompt: Prompt,
    sample: int = 0,
    grammar: Grammar | None = None,
) -> Job:
    """
    Args:
        sample: which of the samples of its prompt it is; each has a seed of its own.
    """
    room = runtime.context_length - len(prompt.tokens)
    limit = runtime.default_max_tokens if request.token_limit is None else request.token_limit
    logprobs = request.wanted_logprobs
    return Job(
        prompt.tokens,
        max(1, min(limit, room)),
        _sampling(runtime, request, sample),
        prompt.boundaries,
        request.cache_prompt is not False,
        min_tokens=request.min_tokens or 0,
        stop_tokens=tuple(sorted(set(request.stop_token_ids or ()))),
        ignore_eos=bool(request.ignore_eos),
        logprobs=0 if logprobs is None and ranked(request) else logprobs,
        prompt_logprobs=_prompt_logprobs(request),
        grammar=grammar,
    )


def _prompt_logprobs(request: Request) -> int | None:
    echoed = request.logprobs if isinstance(request, TextRequest) and request.echo else None
    wanted = [count for count in (request.prompt_logprobs, echoed) if count is not None]
    return max(wanted, default=None)


def _sampling(runtime: Runtime, request: Request, sample: int) -> Sampling:
    told = sampling_defaults(runtime.spec.path)

    def wish(name: str, otherwise: Any) -> Any:
        value = getattr(request, name)
        return told.get(name, otherwise) if value is None else value

    return Sampling(
        wish("temperature", 1.0),
        wish("top_p", 1.0),
        max(0, wish("top_k", 0)),
        wish("min_p", 0.0),
        None if request.seed is None else (request.seed + sample + 2**63) % 2**64 - 2**63,
        wish("repetition_penalty", None),
        request.presence_penalty,
        request.frequency_penalty,
        tuple((int(token), bias) for token, bias in (request.logit_bias or {}).items()),
    )


def check_wishes(runtime: Runtime, request: Request) -> None:
    """
    Raises:
        ApiError: 400, if wishes for tokens make no sense with this model.
    """
    for name in ("logit_bias", "stop_token_ids"):
        ids = [int(token) for token in getattr(request, name) or ()]
        check_tokens(runtime.tokenizer, ids, name)
    limit, least = request.token_limit, request.min_tokens or 0
    if limit is not None and least > limit:
        raise bad_request(
            f"min_tokens: {least} are more than the {limit} that the answer may have", "min_tokens"
        )
