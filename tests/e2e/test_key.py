"""With a key set, both services ask for it, and the router brings it to the sidecar."""

from __future__ import annotations

import httpx
import openai
import pytest

from whole_stack import whole_stack

KEY = "a-key-of-some-length"


def test_both_services_ask_for_the_key_and_pages_of_strangers_get_nothing(tmp_path):
    with whole_stack(tmp_path, None, TQSTACK_API_KEY=KEY) as stack:
        for url in (stack.router, stack.sidecar):
            with pytest.raises(openai.AuthenticationError):
                stack.client(url).models.list()
            known = stack.client(url).with_options(api_key=KEY)
            answer = known.chat.completions.create(
                model="auto", messages=[{"role": "user", "content": "hello"}], max_tokens=2
            )
            assert answer.usage.completion_tokens == 2
            stranger = {"origin": "http://evil.example", "authorization": f"Bearer {KEY}"}
            assert httpx.get(f"{url}/v1/models", headers=stranger).status_code == 403
            rebound = {"host": "evil.example", "authorization": f"Bearer {KEY}"}
            assert httpx.get(f"{url}/v1/models", headers=rebound).status_code == 403
