"""openai-agents: a tool is run over the Responses API and over chat; then a conversation that the
server is to remember."""

import asyncio
import sys

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

set_tracing_disabled(True)


@function_tool
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


async def main(url: str) -> None:
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
    for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
        agent = Agent(name="a", instructions="be brief", tools=[add], model=kind("tq:demo", client))
        assert "42" in (await Runner.run(agent, "40 + 2?")).final_output
        streamed = Runner.run_streamed(agent, "40 + 2?")
        async for _ in streamed.stream_events():
            pass
        assert "42" in streamed.final_output
    settings = ModelSettings(store=True)
    model = OpenAIResponsesModel("tq:demo", client)
    agent = Agent(name="a", tools=[add], model=model, model_settings=settings)
    first = await Runner.run(agent, "40 + 2?", auto_previous_response_id=True)
    again = await Runner.run(agent, "and now?", previous_response_id=first.last_response_id)
    assert "42" in again.final_output


asyncio.run(main(sys.argv[1]))
