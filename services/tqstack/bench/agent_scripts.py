"""Sessions as coding agents make them, as scripts: pure, no server here.

A script yields the next request and is given the message that the server answered; what the tools
"said" is written down beforehand. Each scenario begins like no other, so its first prompt is cold.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from tqstack.bench.prompts import HeldOutText

Message = dict[str, Any]

OUTPUT_TOKENS = 300  # of a tool
CONVERSATIONS, CONVERSATION_TURNS = 6, 3
PREFIXES = 3
USER_TURNS, STEPS = 3, 3  # of the scenario whose reasoning is taken out


@dataclass(frozen=True)
class Turn:
    """A request.

    Attributes:
        cold: begins like nothing before it.
        leave: the client closes while its prompt is read.
    """

    messages: list[Message]
    cold: bool = False
    leave: bool = False
    note: str = ""


Script = Generator[Turn, Message, None]


def _tool(name: str, what: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": "string", "description": text} for key, text in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {
        "type": "function",
        "function": {"name": name, "description": what, "parameters": schema},
    }


TOOLS = [
    _tool("read_file", "Read a text file of the project.", path="path, relative to the root"),
    _tool(
        "edit_file",
        "Replace a piece of text that occurs once in a file.",
        path="path, relative to the root",
        old="the text as it is",
        new="the text as it shall be",
    ),
    _tool("run", "Run a command in the project's root and read what it prints.", command="bash"),
    _tool("search", "Search all files for a regular expression.", pattern="as ripgrep takes it"),
]
_SYSTEM = """Session {id}. You are a coding agent in a user's project. Read before you write, make
small changes, and run the tests after each. Call one tool at a time. These files are open:

"""


@dataclass(frozen=True)
class Writer:
    """Writes messages.

    Args:
        turns: of the tool session.
        system_tokens: of an agent's system prompt; it is shorter where many are needed.
        document_tokens: of the long prompts.
    """

    text: HeldOutText
    turns: int = 12
    system_tokens: int = 2500
    document_tokens: int = 8000

    def system(self, name: str, share: float = 1) -> Message:
        content = _SYSTEM.format(id=self.text.prompt(name, 1).strip())
        tokens = round(share * self.system_tokens)
        return {"role": "system", "content": content + self.text.text(f"{name}/system", tokens)}

    def document(self, name: str) -> list[Message]:
        """A chat about a long text."""
        return [self.system(name, 1 / 25), self.user(name, self.document_tokens)]

    def user(self, name: str, tokens: int = 40) -> Message:
        return {"role": "user", "content": f"Look at this:\n{self.text.text(name, tokens)}"}

    def results(self, name: str, answer: Message) -> list[Message]:
        """What follows an answer: a result for every tool call; one, if it made none."""
        calls = [call["id"] for call in answer.get("tool_calls", [])] or [f"call_{name}"]
        return [
            {
                "role": "tool",
                "tool_call_id": call,
                "content": self.text.text(f"{name}/{i}", OUTPUT_TOKENS),
            }
            for i, call in enumerate(calls)
        ]


def tool_session(writer: Writer) -> Script:
    """One task: every turn's answer is followed by the output of a tool."""
    messages = [writer.system("tools"), writer.user("task")]
    for turn in range(writer.turns):
        answer = yield Turn(messages, cold=turn == 0)
        messages = [*messages, answer, *writer.results(f"tools{turn}", answer)]


def shared_system(writer: Writer) -> Script:
    """Two sessions with the same system prompt."""
    for session in range(2):
        messages = [writer.system("shared"), writer.user(f"shared{session}")]
        for turn in range(2):
            note = f"session {session + 1}"
            answer = yield Turn(messages, cold=not session and not turn, note=note)
            messages = [*messages, answer, writer.user(f"shared{session}/{turn}")]


def edited_message(writer: Writer) -> Script:
    """The user's last message is changed and sent again, twice."""
    messages = [writer.system("edited"), writer.user("edited")]
    answer = yield Turn(messages, cold=True)
    for i in range(3):
        note = "edited" if i else ""
        yield Turn([*messages, answer, writer.user(f"edited{i}", 100)], note=note)


def stripped_reasoning(writer: Writer) -> Script:
    """When the next user turn begins, the template drops what earlier answers thought.

    The first half of an answer stands for its reasoning.
    """
    messages = [writer.system("reasoning", 1 / 2)]
    for turn in range(USER_TURNS):
        stripped = [_without_reasoning(message) for message in messages]
        messages = [*stripped, writer.user(f"reasoning{turn}")]
        for step in range(STEPS):
            note = "reasoning dropped" if turn and not step else ""
            answer = yield Turn(messages, cold=not turn and not step, note=note)
            messages = [*messages, answer, *writer.results(f"reasoning{turn}/{step}", answer)]


def _without_reasoning(message: Message) -> Message:
    if message["role"] != "assistant" or message.get("stripped"):
        return message
    content = message.get("content") or ""
    shown = {k: v for k, v in message.items() if k not in ("reasoning", "reasoning_content")}
    return shown | {"content": content[len(content) // 2 :], "stripped": True}


def round_robin(writer: Writer) -> Script:
    """Six conversations in turn."""
    chats = [
        [writer.system(f"chat{i}", 1 / 3), writer.user(f"chat{i}")] for i in range(CONVERSATIONS)
    ]
    for turn in range(CONVERSATION_TURNS):
        for i, messages in enumerate(chats):
            answer = yield Turn(messages, cold=turn == 0, note=f"conversation {i + 1}")
            chats[i] = [*messages, answer, writer.user(f"chat{i}/{turn}", 100)]


def long_prefix(writer: Writer) -> Script:
    """A second question about a long document; several documents."""
    for i in range(PREFIXES):
        messages = writer.document(f"long{i}")
        answer = yield Turn(messages, cold=True)
        yield Turn([*messages, answer, writer.user(f"long{i}/second")])


def cancelled(writer: Writer) -> Script:
    """A long prompt whose client leaves while it is read, and sends it again."""
    messages = writer.document("cancelled")
    yield Turn(messages, cold=True, leave=True, note="client left")
    yield Turn(messages, note="again")


SCRIPTS: dict[str, Callable[[Writer], Script]] = {
    "tool-session": tool_session,
    "shared-system": shared_system,
    "edited-message": edited_message,
    "stripped-reasoning": stripped_reasoning,
    "round-robin": round_robin,
    "long-prefix": long_prefix,
    "cancelled": cancelled,  # the last: a server may still be reading for nobody
}


def turns(name: str, writer: Writer) -> int:
    """How many requests a scenario makes."""
    script, count = SCRIPTS[name](writer), 0
    try:
        next(script)
        while True:
            count += 1
            script.send({"role": "assistant", "content": ""})
    except StopIteration:
        return count
