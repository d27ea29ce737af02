"""How an answer is made to begin with a tool call: its beginning is written for the model.

The call's arguments are still the model's own.
"""

from __future__ import annotations

import json
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from tqstack.openai_api.errors import bad_request

# By mlx-lm's parser of the family: what comes between the start marker and a function's name, and
# what follows the name.
_FORMS = {
    "json_tools": ('\n{"name": ', ', "arguments": '),
    "qwen3_coder": ("\n<function=", ">\n"),
}


def forced_tool(choice: Any, tools: list[dict[str, Any]] | None) -> str | None:
    """The name of the tool that must be called; "" for any; None if none must be.

    Raises:
        ApiError: 400, if it is not there.
    """
    if choice in (None, "auto", "none"):
        return None
    names = [tool["function"]["name"] for tool in tools or ()]
    if not names:
        raise bad_request("tool_choice: there are no tools to choose from", "tool_choice")
    if choice == "required":
        return names[0] if len(names) == 1 else ""
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type") != "function" or name not in names:
        raise bad_request(f"tool_choice: there is no tool {name!r} in tools", "tool_choice")
    return str(name)


def call_beginning(tokenizer: TokenizerWrapper, name: str, reasoning: bool) -> str:
    """Text that an answer begins with if it must call `name` (any tool: "").

    Args:
        reasoning: the prompt has opened a reasoning block, which is closed first.

    Raises:
        ApiError: 400, if it is not known how this model calls tools.
    """
    parser = getattr(tokenizer.tool_parser, "__module__", "").rpartition(".")[2]
    start = tokenizer.tool_call_start
    if not start or (name and parser not in _FORMS):
        raise bad_request(
            "tool_choice: this model cannot be made to call a tool; send auto", "tool_choice"
        )
    closing = f"{tokenizer.think_end}\n\n" if reasoning else ""
    if not name:
        return closing + start
    before, after = _FORMS[parser]
    written = json.dumps(name) if parser == "json_tools" else name
    return f"{closing}{start}{before}{written}{after}"
