"""The table of fields is whole: what the installed SDKs can send is in it, and the page is its."""

from __future__ import annotations

from pathlib import Path

import pytest
from anthropic.types import message_create_params
from anthropic.types.beta import message_create_params as beta_create_params
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

import api_table
from tqstack.openai_api.schema import ChatRequest, TextRequest

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
OF_THE_TRANSPORT = {"betas", "thread", "output_format"}  # headers; refused or renamed by the SDK


def fields_of(params: type) -> set[str]:
    return {name for base in params.__mro__ for name in getattr(base, "__annotations__", {})}


@pytest.mark.parametrize(
    "path, params",
    [
        ("/v1/chat/completions", chat_create_params.CompletionCreateParamsNonStreaming),
        ("/v1/completions", completion_create_params.CompletionCreateParamsNonStreaming),
        ("/v1/responses", response_create_params.ResponseCreateParamsNonStreaming),
        ("/v1/messages", message_create_params.MessageCreateParamsNonStreaming),
        ("/v1/messages", beta_create_params.MessageCreateParamsNonStreaming),
    ],
)
def test_each_field_of_a_current_sdk_has_its_line(path, params):
    assert fields_of(params) - api_table.known(path) - OF_THE_TRANSPORT == set()


@pytest.mark.parametrize(
    "path, schema", [("/v1/chat/completions", ChatRequest), ("/v1/completions", TextRequest)]
)
def test_each_field_of_our_own_has_its_line(path, schema):
    assert set(schema.model_fields) - api_table.known(path) == set()


def test_the_page_is_made_from_the_code():
    assert PAGE.read_text(encoding="utf-8") == api_table.page()
