"""pydantic-ai: a tool is run, and an answer has a type, over chat and over the Responses API."""

import sys

# This file's folder would hide the package of the same name.
sys.path.pop(0)

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class City(BaseModel):
    name: str
    people: int


ROME = City(name="Rome", people=3)


def main(url: str) -> None:
    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        model = kind("tq:demo", provider=provider)
        agent = Agent(model, instructions="be brief")

        @agent.tool_plain
        def add(a: int, b: int) -> int:
            """Adds two numbers."""
            return a + b

        assert "42" in agent.run_sync("40 + 2?").output
        assert Agent(model, output_type=City).run_sync("which city?").output == ROME
        native = Agent(model, output_type=NativeOutput(City))
        assert native.run_sync("which city?").output == ROME


main(sys.argv[1])
