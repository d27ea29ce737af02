"""Makes `docs/api.md`: `python tests/api_table.py > docs/api.md`."""

from __future__ import annotations

from tqstack.openai_api.fields import CHAT, COMPLETIONS, MESSAGES, RESPONSES, UNREAD, Field
from tqstack.router.dialects import messages, responses
from tqstack.sidecar import refusals

HEAD = """# Fields

What becomes of each field of a request, at the sidecar and at Ollama. Nothing is ignored in
silence: what changes an answer is done, refused with a sentence (400, with the field in `param`),
or named in the header `x-tqstack-left-out`. Made from the code by `tests/api_table.py`; fields of
other servers (vLLM, llama.cpp) are listed where their names are known.

Reasoning is told under both names that clients read: `reasoning_content` and `reasoning`.
"""
FIELDS: dict[str, tuple[dict[str, Field], dict[str, str]]] = {
    "/v1/chat/completions": (CHAT, {**refusals.BOTH, **refusals.CHAT}),
    "/v1/completions": (COMPLETIONS, {**refusals.BOTH, **refusals.TEXT}),
    "/v1/responses": (RESPONSES, responses.REFUSED),
    "/v1/messages": (MESSAGES, messages.REFUSED),
}
# Of what the sidecar refuses, what Ollama has.
AT_OLLAMA = {"suffix": "done where the model's template has a place for it, else a 400"}


def page() -> str:
    return "\n".join([HEAD, *(section(path, *both) for path, both in FIELDS.items())])


def section(path: str, done: dict[str, Field], refused: dict[str, str]) -> str:
    lines = [f"## `{path}`", "", "| field | sidecar | Ollama |", "|---|---|---|"]
    translated = path in ("/v1/responses", "/v1/messages")
    for name, field in sorted(done.items()):
        lines.append(f"| `{name}` | {field.sidecar} | {field.ollama} |")
    for name, why in sorted(refused.items()):
        if name not in done:
            other = "refused" if translated else AT_OLLAMA.get(name, UNREAD)
            lines.append(f"| `{name}` | refused: {why} | {other} |")
    return "\n".join([*lines, ""])


def known(path: str) -> set[str]:
    done, refused = FIELDS[path]
    return done.keys() | refused.keys()


if __name__ == "__main__":
    print(page(), end="")
