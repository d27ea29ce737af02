#!/usr/bin/env bash
# Prints the path of a Python 3.11 or newer, which PYTHON may name. Sourced by the other scripts.
set -euo pipefail

find_python() {
  local name
  for name in ${PYTHON:-} python3.13 python3.12 python3.11 python3; do
    if command -v "$name" >/dev/null &&
      "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
    then
      command -v "$name"
      return
    fi
  done
  echo "tqstack: no Python 3.11 or newer was found; install one, or set PYTHON=/path/to/it" >&2
  return 1
}
