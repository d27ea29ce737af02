#!/usr/bin/env bash
# Says whether this machine can run tqstack; changes nothing, needs only Python.
# Usage: scripts/preflight-check.sh [--model MODEL]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/find-python.sh
source "$root/scripts/find-python.sh"
python=$(find_python)
PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$root/services exec "$python" -m tqstack.service.preflight "$@"
