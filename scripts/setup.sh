#!/usr/bin/env bash
# Makes the environment in .venv from requirements.lock. Sourced by the other scripts; safe to repeat.
# Needs Python 3.11 or newer, which PYTHON may name.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
# shellcheck source=scripts/find-python.sh
source "$root/scripts/find-python.sh"
say() { printf 'tqstack: %s\n' "$*" >&2; }

# apt-get install, where this user may; otherwise the caller says what that costs.
apt_install() {
  command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] || return 1
  say "installing $*"
  local install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@")
  "${install[@]}" >/dev/null 2>&1 && return
  apt-get update -qq >/dev/null 2>&1 && "${install[@]}" >/dev/null 2>&1
}

make_venv() {
  local python
  python=$(find_python)
  "$python" -m venv "$venv" 2>/dev/null && return
  apt_install python3-venv && "$python" -m venv "$venv" && return
  say "$python cannot make a virtual environment; on Debian: apt-get install python3-venv"
  return 1
}

install_packages() {
  local wanted
  wanted=$(cat "$root/requirements.lock" "$root/pyproject.toml" | cksum)
  [ "$(cat "$venv/.installed" 2>/dev/null)" = "$wanted" ] && return
  # An environment whose making was interrupted has no pip.
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
  say "installing packages into .venv (some minutes the first time)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes \
    -r "$root/requirements.lock"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    --no-build-isolation -e "$root"
  printf '%s' "$wanted" >"$venv/.installed"
}

# MLX on a Linux CPU carries a slow BLAS; tqstack preloads OpenBLAS if the system has it.
want_openblas() {
  [ "$(uname -s)" = Linux ] && [ ! -e /dev/nvidiactl ] || return 0
  compgen -G '/usr/lib/*/openblas-pthread/libopenblas.so.0' >/dev/null && return
  apt_install libopenblas0-pthread ||
    say "OpenBLAS is not installed: prompts are read about five times more slowly without it" \
      "(as root: apt-get install libopenblas0-pthread)"
}

[ -x "$venv/bin/python" ] || make_venv
install_packages
want_openblas
