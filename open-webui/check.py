"""Drives Open WebUI against a running router, in headless Chromium, and takes the screenshots.

    PYTHON open-webui/check.py --router http://127.0.0.1:8000 --out FOLDER

PYTHON is one with the packages open-webui and playwright; Chromium is `chromium` on the PATH, or
CHROMIUM names it. Prints what was seen, as JSON.
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
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

START_SECONDS, ANSWER_SECONDS = 120, 120
# Long enough for the sidecar: its threshold with a hybrid model is 16,000 tokens.
FILLER = "def area(width, height):\n    return width * height  # of a rectangle\n"
QUESTION = "What is the secret code of hotel?"
STORED = {
    "WEBUI_AUTH": "False",
    "ENABLE_OLLAMA_API": "False",
    "OPENAI_API_KEY": "local",
    "OFFLINE_MODE": "True",
    "HF_HUB_OFFLINE": "1",
    "RAG_EMBEDDING_ENGINE": "openai",
    # Its prompts of its own would run beside the ones that are looked at here.
    "ENABLE_TITLE_GENERATION": "False",
    "ENABLE_TAGS_GENERATION": "False",
    "ENABLE_FOLLOW_UP_GENERATION": "False",
    "WEBUI_SECRET_KEY": "only-for-this-check",
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


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
        while not answers(f"{url}/health"):
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


def ask(page: Page, text: str) -> None:
    """In a chat of its own. A long text is put in whole: nobody types it."""
    page.locator("#chat-input").click()
    page.keyboard.insert_text(text)
    page.locator("#send-message-button").click()


def new_chat(page: Page, url: str) -> None:
    page.goto(url)
    page.wait_for_selector("#chat-input")
    dismiss = page.get_by_role("button", name=re.compile("Okay, Let's Go|^Close$"))
    if dismiss.count() and dismiss.first.is_visible():
        dismiss.first.click()


def answer(page: Page) -> str:
    """The text of the answer, once it is complete: the stop button is gone."""
    page.wait_for_selector("#response-content-container, .chat-assistant", timeout=30_000)
    page.wait_for_selector("button[aria-label='Regenerate']", timeout=ANSWER_SECONDS * 1000)
    return page.locator(".chat-assistant").last.inner_text().strip()


def check(page: Page, url: str, router: str, out: Path) -> dict:
    seen: dict = {}
    new_chat(page, url)
    page.locator("#model-selector-model-button").click()
    page.wait_for_selector("[role=option], [data-value]", timeout=10_000)
    page.wait_for_timeout(500)
    seen["models"] = page.locator("[data-value]").evaluate_all(
        "items => items.map(item => item.dataset.value)"
    )
    page.screenshot(path=out / "models.png")
    page.keyboard.press("Escape")

    new_chat(page, url)
    ask(page, "def main():")
    seen["short"] = answer(page)
    page.screenshot(path=out / "answer.png")

    new_chat(page, url)
    fact = "The secret code of hotel is 48213.\n"
    ask(page, FILLER * 500 + fact + FILLER * 500 + QUESTION)
    seen["long"] = answer(page)
    page.screenshot(path=out / "long.png")

    new_chat(page, url)
    ask(page, "# Once more\n" + FILLER * 1000 + QUESTION)
    stop = page.locator("button[aria-label='Stop']")
    stop.wait_for(timeout=30_000)
    # A button pressed before Open WebUI knows its own task does nothing; no person is so quick.
    page.wait_for_timeout(3000)
    with page.expect_response(re.compile("/api/tasks/.*stop")) as response:
        stop.click()
    seen["stop_status"] = response.value.status
    page.screenshot(path=out / "stopped.png")

    page.goto(router)
    page.wait_for_timeout(2000)
    page.screenshot(path=out / "status.png")
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", default="http://127.0.0.1:8000")
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
        page = browser.new_page(viewport={"width": 1200, "height": 760})
        page.set_default_timeout(30_000)
        try:
            print(json.dumps(check(page, url, options.router, options.out), indent=2))
        except Exception:
            page.screenshot(path=options.out / "failure.png")
            raise
        finally:
            browser.close()


if __name__ == "__main__":
    main()
