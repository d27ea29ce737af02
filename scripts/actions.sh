#!/usr/bin/env bash
# What install.sh and uninstall.sh do alike. Sourced by them.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
script=$(basename "$0")
dry=''

say() { printf '%s: %s\n' "${script%.sh}" "$*"; }
tqstack() { "$root/.venv/bin/python" -m tqstack "$@"; }
config_file() { printf '%s' "${TQSTACK_CONFIG:-$HOME/ai/turboquant/config.env}"; }
refuse() { echo "$script: $1 is not known" >&2 && usage >&2 && exit 2; }

# Every change is made here: NAME for people, then the command.
act() {
  say "$1"
  shift
  [ -n "$dry" ] || "$@"
}
