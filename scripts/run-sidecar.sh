#!/usr/bin/env bash
# Runs the sidecar in this terminal, with the settings of config.env and the environment.
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$venv/bin/python" -m tqstack sidecar "$@"
