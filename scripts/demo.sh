#!/usr/bin/env bash
# Starts the stack with the embedded model, asks a short and a 12,000-token question with the OpenAI
# SDK, tells who answered and how fast, and stops. --keep leaves it running until Ctrl-C.
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$venv/bin/python" "$root/scripts/demo.py" "$@"
