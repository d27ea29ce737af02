#!/usr/bin/env bash
# Runs every client of docs/clients.md that is installed against a router with a scripted model, and
# the router in front of a real Ollama, if one is in PATH or OLLAMA_PROGRAM names it.
# Folders with environments of their own (Python's, npm's): CLIENTS=FOLDER[:FOLDER...]
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-.venv/bin/python}" -m pytest -q -rs --no-header tests/router/test_clients.py \
  tests/router/test_real_ollama.py tests/router/test_ollama_beyond_chat.py "$@"
