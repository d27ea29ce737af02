"""An Ollama with two models of ours, where one is installed: `OLLAMA_PROGRAM`, or in PATH."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from processes import free_port, wait_for
from router import puppet

NOT_HERE = "there is no Ollama here: name its program in OLLAMA_PROGRAM, or put it in PATH"
GIVEN, NUM_CTX = 4096, 512  # tokens
# The same model with Ollama's own kind of template, and a context of its own.
OWN_TEMPLATE = f'''FROM puppet
PARAMETER num_ctx {NUM_CTX}
TEMPLATE """{{{{- range .Tools }}}}{{{{ . }}}}{{{{ end }}}}
{{{{- range $i, $_ := .Messages }}}}<|start|>{{{{ .Role }}}}
{{{{ if .Thinking }}}}<think>{{{{ .Thinking }}}}</think>{{{{ end }}}}{{{{ .Content }}}}
{{{{- if .ToolCalls }}}}{{{{ range .ToolCalls }}}}<tool_call>
{{"name": "{{{{ .Function.Name }}}}", "arguments": {{{{ .Function.Arguments }}}}}}
</tool_call>{{{{ end }}}}{{{{ end }}}}
{{{{- if ne (len (slice $.Messages $i)) 1 }}}}<|end|>
{{{{ end }}}}{{{{ end }}}}"""
'''


@dataclass(frozen=True)
class Ollama:
    url: str
    process: int

    def runners(self) -> list[psutil.Process]:
        """The processes that hold its models."""
        children = psutil.Process(self.process).children(recursive=True)
        return [child for child in children if "--model" in child.cmdline()]


def program() -> str | None:
    return os.environ.get("OLLAMA_PROGRAM") or shutil.which("ollama")


@contextmanager
def real_ollama(home: Path, remotes: str = "") -> Iterator[Ollama]:
    """With the models `puppet`, which has a template for tools and reasoning, `own`, and `vectors`
    for embeddings.

    Args:
        remotes: hosts where its cloud models may be; empty: it has none.
    """
    ollama, url = program(), f"http://127.0.0.1:{free_port()}"
    assert ollama, NOT_HERE
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "OLLAMA_HOST": url[7:]}
    environment |= {"OLLAMA_MODELS": str(home / "models"), "OLLAMA_NO_CLOUD": "1"}
    if remotes:  # and nowhere else
        environment |= {"OLLAMA_NO_CLOUD": "0", "OLLAMA_REMOTES": remotes}
        environment |= {"HTTPS_PROXY": "http://127.0.0.1:1", "NO_PROXY": "127.0.0.1"}
    environment["OLLAMA_CONTEXT_LENGTH"] = str(GIVEN)  # else by the machine's memory
    log = home / "ollama.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [ollama, "serve"],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(f"{url}/api/version", log)
        puppet.write(home / "puppet.gguf")
        puppet.write(home / "vectors.gguf", embeds=True)
        models = {name: f"FROM {home / name}.gguf\n" for name in ("puppet", "vectors")}
        for name, text in {**models, "own": OWN_TEMPLATE}.items():
            (home / "Modelfile").write_text(text)
            make = [ollama, "create", name, "-f", str(home / "Modelfile")]
            subprocess.run(make, env=environment, check=True, capture_output=True, timeout=120)
        yield Ollama(url, process.pid)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        with suppress(ProcessLookupError):  # and what it has left behind
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
