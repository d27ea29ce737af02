#!/usr/bin/env bash
# All checks: lint, types, tests. Arguments go to pytest: scripts/test.sh tests/router -k fallback
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
export PATH=$venv/bin:$PATH HF_HUB_OFFLINE=1
if [ $# = 0 ]; then
  ruff check .
  ruff format --check .
  basedpyright --pythonpath "$venv/bin/python"
fi
LD_PRELOAD=$(python -c 'from tqstack.cli.common import openblas; print(openblas() or "")')
export LD_PRELOAD
exec python -m pytest "$@"
