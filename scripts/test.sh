#!/usr/bin/env bash
# All checks: lint, types, and every test, as many at a time as there are processors. What takes
# longest and what was skipped is listed at the end. With arguments, pytest alone, which gets them:
#   scripts/test.sh --fast                      no test that starts a process
#   scripts/test.sh tests/router -k fallback
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
export PATH=$venv/bin:$PATH HF_HUB_OFFLINE=1

# A program that some tests need, and the package that has it; without it they are skipped.
want() {
  command -v "$1" >/dev/null || apt_install "$2" ||
    say "$1 is not installed: tests that need it are skipped (on Debian: apt-get install $2)"
}

if [ $# = 0 ]; then
  ruff check .
  ruff format --check .
  basedpyright --pythonpath "$venv/bin/python"
  want g++ g++
  want openssl openssl
  command -v chromium google-chrome >/dev/null || want chromium-headless-shell chromium-headless-shell
fi
LD_PRELOAD=$(python -c 'from tqstack.cli.common import openblas; print(openblas() or "")')
# The processors are busy with tests side by side; BLAS has one thread in each.
export LD_PRELOAD OPENBLAS_NUM_THREADS=1
exec python -m pytest -n logical --dist loadfile --durations 20 --durations-min 1 -rs "$@"
