#!/usr/bin/env bash
# Installs the background services and starts them: launchd on macOS, systemd on Linux.
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$venv/bin/python" -m tqstack service install
