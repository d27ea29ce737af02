"""Drives Open WebUI against a running stack, in headless Chromium, and takes the screenshots.

    PYTHON tests/open_webui/drive.py --router http://127.0.0.1:8000 --sidecar http://127.0.0.1:8001

PYTHON is one with the packages open-webui and playwright; Chromium is `chromium` on the PATH, or
CHROMIUM names it. TQSTACK_API_KEY is the key, if the stack wants one. Prints what was seen, as
JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from playwright.sync_api import Page, TimeoutError, sync_playwright

START_SECONDS, ANSWER_SECONDS, STOP_SECONDS = 120, 240, 30
KEY = os.environ.get("TQSTACK_API_KEY", "local")
FACT = "The secret code of hotel is 48213.\n"
QUESTION = "What is the secret code of hotel?"
# Long enough for the sidecar: its threshold with a hybrid model is 16,000 tokens.
FILLER = "def area(width, height):\n    return width * height  # of a rectangle\n"
# Without an end for the embedded model at temperature 0, and one line: the editor keeps no indent.
ENDLESS = "from typing import Any, Callable"
STORED = {
    "WEBUI_AUTH": "False",
    "ENABLE_OLLAMA_API": "False",
    "OPENAI_API_KEY": KEY,
    "OFFLINE_MODE": "True",
    "HF_HUB_OFFLINE": "1",
    "RAG_EMBEDDING_ENGINE": "openai",
    # Its prompts of its own would run beside the ones that are looked at here.
    "ENABLE_TITLE_GENERATION": "False",
    "ENABLE_TAGS_GENERATION": "False",
    "ENABLE_FOLLOW_UP_GENERATION": "False",
    "DEFAULT_MODEL_PARAMS": '{"temperature": 0}',
    "WEBUI_SECRET_KEY": "only-for-this-check",
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def get(url: str) -> bytes | None:
    """The body of a good answer."""
    request = urllib.request.Request(url, headers={"x-api-key": KEY})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.read()
    except (urllib.error.URLError, OSError):
        return None


def running(sidecar: str) -> int:
    """Requests that the sidecar is working on."""
    health = get(f"{sidecar}/health")
    if health is None:
        raise RuntimeError(f"{sidecar} does not answer: name the sidecar with --sidecar")
    return json.loads(health)["requests"]["running"]


def wait_until(condition: Callable[[], bool], what: str, seconds: float) -> float:
    """The seconds that it took."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() > start + seconds:
            raise RuntimeError(f"{what}: not within {seconds} s")
        time.sleep(0.05)
    return time.monotonic() - start


@contextlib.contextmanager
def open_webui(router: str, folder: Path) -> Iterator[str]:
    """Its address. Settings are stored at the first start, so the data folder is a fresh one."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment |= {**STORED, "OPENAI_API_BASE_URL": f"{router}/v1", "DATA_DIR": str(folder)}
    command = Path(sys.executable).with_name("open-webui")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [command, "serve", "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while get(f"{url}/health") is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit((folder / "log").read_text()[-3000:])
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(page: Page, url: str, text: str, model: str = "auto") -> None:
    """In a chat of its own.

    The text is pasted, as a person would. Typed key by key, a long one keeps the page so busy that
    it loses its socket, and Open WebUI then answers without a task that Stop could end.
    """
    open_page(page, f"{url}/?models={model}")
    page.locator("#chat-input").click()
    page.evaluate("text => navigator.clipboard.writeText(text)", text)
    page.keyboard.press("ControlOrMeta+V")
    page.locator("#send-message-button").click()


def open_page(page: Page, url: str) -> None:
    page.goto(url)
    page.wait_for_selector("#chat-input", state="attached")
    dismiss = page.get_by_role("button", name=re.compile("Okay, Let's Go|^Close$"))
    with contextlib.suppress(TimeoutError):
        dismiss.first.click(timeout=2000)


def answer(page: Page) -> str:
    """The text of the answer, once it is complete."""
    page.wait_for_selector("button[aria-label='Regenerate']", timeout=ANSWER_SECONDS * 1000)
    return text_so_far(page)


def text_so_far(page: Page) -> str:
    return page.locator(".chat-assistant").last.inner_text().strip()


def stop(page: Page, sidecar: str) -> float:
    """Press Stop: the seconds until the sidecar works on nothing."""
    page.locator("button[aria-label='Stop']").click()
    return wait_until(lambda: running(sidecar) == 0, "the sidecar has stopped", STOP_SECONDS)


def settings(page: Page, url: str, name: str, heading: str) -> None:
    open_page(page, f"{url}/admin/settings/{name}")
    page.get_by_text(heading, exact=True).wait_for()
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)


def check(page: Page, url: str, sidecar: str, out: Path) -> dict:
    seen: dict = {}
    open_page(page, url)
    page.locator("#model-selector-model-button").click()
    page.wait_for_selector("[data-value]")
    page.wait_for_timeout(500)
    seen["models"] = page.locator("[data-value]").evaluate_all(
        "items => items.map(item => item.dataset.value)"
    )
    page.screenshot(path=out / "models.png")

    settings(page, url, "connections", "Manage OpenAI API Connections")
    page.screenshot(path=out / "connections.png")

    settings(page, url, "models", "Model Defaults")
    page.get_by_text("auto (by prompt length)").last.click()
    page.get_by_text("Advanced Params").click()
    choice = page.get_by_text("Function Calling").locator("xpath=../..").get_by_role("button").last
    choice.click()
    page.screenshot(path=out / "tools.png")

    ask(page, url, FACT + QUESTION)
    seen["short"] = answer(page)

    ask(page, url, FILLER * 500 + FACT + FILLER * 500 + QUESTION)
    seen["long"] = answer(page)
    page.screenshot(path=out / "long.png")

    ask(page, url, "# Once more\n" + FILLER * 1000 + QUESTION)
    wait_until(lambda: running(sidecar) > 0, "the sidecar reads the prompt", ANSWER_SECONDS)
    seen["seconds_to_stop_reading"] = stop(page, sidecar)

    forced = next(name for name in seen["models"] if name.startswith("tq:"))
    ask(page, url, ENDLESS, forced)
    texts: set[str] = set()

    def grows() -> bool:
        texts.add(text_so_far(page))
        return len(texts) > 5

    wait_until(grows, "the answer is streamed", ANSWER_SECONDS)
    page.screenshot(path=out / "answer.png")
    seen["seconds_to_stop_answering"] = stop(page, sidecar)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", default="http://127.0.0.1:8000")
    parser.add_argument("--sidecar", default="http://127.0.0.1:8001")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    options.out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_webui(options.router, Path(folder)) as url,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": 1200, "height": 760},
            permissions=["clipboard-read", "clipboard-write"],
        )
        page.set_default_timeout(30_000)
        try:
            print(json.dumps(check(page, url, options.sidecar, options.out), indent=2))
        except Exception:
            page.screenshot(path=options.out / "failure.png")
            raise
        finally:
            browser.close()


if __name__ == "__main__":
    main()
