#!/usr/bin/env bash
# Runs `ollama serve` with the settings that suit this stack and that its version honours.
# What is set in the environment already wins.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/find-python.sh
source "$root/scripts/find-python.sh"
python=$(find_python)
settings=$(PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$root/services "$python" -m tqstack.service.ollama)
while IFS='=' read -r name value; do
  [ -n "$name" ] || continue
  export "$name=${!name:-$value}"
  echo "$name=${!name}"
done <<<"$settings"
exec ollama serve
