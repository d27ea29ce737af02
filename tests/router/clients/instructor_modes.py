"""instructor: an answer has a type, in each of its modes for OpenAI's and Anthropic's clients."""

import sys

import anthropic
import instructor
import openai
from instructor import Mode
from pydantic import BaseModel


class City(BaseModel):
    name: str
    people: int


ROME = City(name="Rome", people=3)
ASK = [{"role": "user", "content": "which city? answer in JSON"}]
OPENAI = ["TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA", "MD_JSON", "FUNCTIONS"]
RESPONSES = ["RESPONSES_TOOLS"]
ANTHROPIC = ["ANTHROPIC_TOOLS", "ANTHROPIC_JSON"]


def main(url: str) -> None:
    plain = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    for name in (*OPENAI, *RESPONSES):
        if hasattr(Mode, name):
            client = instructor.from_openai(plain, mode=getattr(Mode, name))
            made = client.chat.completions.create(
                model="tq:demo", messages=list(ASK), response_model=City, max_retries=0
            )
            assert made.model_dump() == ROME.model_dump(), name
    other = anthropic.Anthropic(base_url=url, api_key="none")
    for name in ANTHROPIC:
        client = instructor.from_anthropic(other, mode=getattr(Mode, name))
        made = client.messages.create(
            model="tq:demo", messages=list(ASK), response_model=City, max_tokens=50, max_retries=0
        )
        assert made.model_dump() == ROME.model_dump(), name


main(sys.argv[1])
