"""What a model's chat template takes, and how a request's wishes are told to it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, meta
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tqstack.openai_api.errors import bad_request
from tqstack.openai_api.schema import ChatRequest

# What the renderer gives a template, or is told itself: no request sets them.
_OWN = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "conversation",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)
_THINKING = "enable_thinking"  # mlx-lm gives it the name that the family has for it


def template_options(tokenizer: TokenizerWrapper, request: ChatRequest) -> dict[str, Any]:
    """Arguments for the template.

    Raises:
        ApiError: 400 for a name that the template does not know.
    """
    known = _names(tokenizer) | {_THINKING}
    wanted = dict(request.chat_template_kwargs or {})
    for name in wanted:
        if name not in known or name in _OWN:
            names = ", ".join(sorted(known - _OWN))
            raise bad_request(
                f"chat_template_kwargs: this model's template knows no {name!r}; it takes {names}",
                "chat_template_kwargs",
            )
    if effort := request.reasoning_effort:
        if effort != "none" and "reasoning_effort" in known:
            wanted.setdefault("reasoning_effort", effort)
        wanted.setdefault(_THINKING, effort != "none")
    if request.tools and request.tool_choice != "none":
        wanted["tools"] = request.tools
    return wanted


def _names(tokenizer: TokenizerWrapper) -> frozenset[str]:
    template = tokenizer.chat_template
    templates = template.values() if isinstance(template, dict) else [template]
    found: set[str] = set()
    for one in templates:
        if isinstance(one, str):
            found |= _names_in(one)
    return frozenset(found)


@lru_cache(16)
def _names_in(template: str) -> frozenset[str]:
    """Names that a template uses and does not define."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        # `{% generation %}` is transformers' own tag; it has no names in it.
        plain = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        found = meta.find_undeclared_variables(environment.parse(plain))
    except TemplateSyntaxError:
        return frozenset()
    return frozenset(found - {"raise_exception", "strftime_now", "bos_token", "eos_token"})
