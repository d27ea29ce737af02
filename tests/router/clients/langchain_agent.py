"""LangChain: a tool is called and its result sent back, answers are streamed and have types, over
chat, the Responses API and Anthropic's."""

import sys

from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


@tool
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


class City(BaseModel):
    """A city."""

    name: str
    people: int


def check(model) -> None:
    ask = HumanMessage("40 + 2?")
    called = model.bind_tools([add]).invoke([ask])
    [call] = called.tool_calls
    result = ToolMessage(str(add.invoke(call["args"])), tool_call_id=call["id"])
    turns = [ask, called, result]
    assert "42" in str(model.bind_tools([add]).invoke(turns).content)
    assert "42" in "".join(str(c.content) for c in model.bind_tools([add]).stream(turns))
    city = model.with_structured_output(City, method="function_calling").invoke("which city?")
    assert city == City(name="Rome", people=3)


def main(url: str) -> None:
    options = {"model": "tq:demo", "api_key": "none"}
    check(ChatOpenAI(base_url=f"{url}/v1", **options))
    check(ChatOpenAI(base_url=f"{url}/v1", use_responses_api=True, **options))
    other = ChatAnthropic(base_url=url, **options)
    called = other.bind_tools([add]).invoke("40 + 2?")
    assert called.tool_calls[0]["args"] == {"a": 40, "b": 2}


main(sys.argv[1])
