#!/usr/bin/env bash
# Removes what install.sh made: services, logs, packages; asks about the model and the settings.
set -euo pipefail
# shellcheck source=scripts/actions.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/actions.sh"

usage() {
  cat <<'END'
Usage: ./uninstall.sh [--yes] [--dry-run]
  --yes      ask nothing: the downloaded model and the settings go as well
  --dry-run  print every action, change nothing
Without a terminal and without --yes, model and settings stay.
END
}

yes=''
while [ $# -gt 0 ]; do
  case $1 in
    --yes) yes=1 ;;
    --dry-run) dry=1 ;;
    --help | -h) usage && exit ;;
    *) refuse "$1" ;;
  esac
  shift
done

config=$(config_file)

agreed() {
  local answer=n
  [ -z "$yes$dry" ] || return 0
  [ ! -t 0 ] || read -r -p "$1 [y/N] " answer
  case $answer in [yY]*) ;; *) return 1 ;; esac
}

remove_config() {
  local folder
  folder=$(dirname "$config")
  rm -f "$config" "$config.before-install" "$folder/keys.json" "$folder/backends.toml"
  rmdir -p "$(dirname "$config")" 2>/dev/null || true
}

if [ -x "$root/.venv/bin/python" ]; then
  act "services: stop them, remove their definitions and logs" tqstack service uninstall
  if agreed "remove the downloaded model?"; then
    act "model: remove what was downloaded" tqstack model remove || say "the model stays"
  fi
else
  say "there is no $root/.venv: services, if there are any, stay; ./install.sh makes it again"
fi
if [ -f "$config" ] && agreed "remove the settings, $config?"; then
  act "settings: $config" remove_config
fi
if [ -f "$root/.venv/.made-by-install" ]; then
  act "packages: $root/.venv" rm -rf "$root/.venv"
fi
if [ -n "$dry" ]; then say "nothing was changed"; else say "done"; fi
