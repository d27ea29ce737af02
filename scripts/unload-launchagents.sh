#!/usr/bin/env bash
# Stops the background services and removes their definitions and logs.
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$venv/bin/python" -m tqstack service uninstall
