#!/usr/bin/env bash
# Installs tqstack: packages, settings, model, background services. Safe to repeat, and to repeat
# after it was interrupted. What it did is undone if one of its steps fails.
set -euo pipefail
# shellcheck source=scripts/actions.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/actions.sh"

usage() {
  cat <<'END'
Usage: ./install.sh [--model MODEL] [--no-service] [--yes] [--dry-run]
  --model MODEL  what the sidecar serves: demo, a folder, or a name on the Hugging Face hub
  --no-service   no background services; start it with: .venv/bin/tqstack up
  --yes          ask nothing
  --dry-run      print every action, change nothing
END
}

model='' service=1 yes=''
while [ $# -gt 0 ]; do
  case $1 in
    --model) model=${2:?--model needs a value} && shift ;;
    --no-service) service='' ;;
    --yes) yes=1 ;;
    --dry-run) dry=1 ;;
    --help | -h) usage && exit ;;
    *) refuse "$1" ;;
  esac
  shift
done

config=$(config_file)

undo=() # commands, the last is run first
undo_all() {
  local code=$? i
  trap - EXIT
  if [ $code != 0 ] && [ ${#undo[@]} != 0 ]; then
    say "it failed: undoing what was done"
    for ((i = ${#undo[@]} - 1; i >= 0; i--)); do
      say "undo: ${undo[i]}"
      eval "${undo[i]}" || say "this could not be undone"
    done
  fi
  exit $code
}
trap undo_all EXIT
trap 'exit 130' INT TERM HUP

will_undo() { [ -n "$dry" ] || undo+=("$(printf '%q ' "$@")"); }

# An environment that was here before is never removed: ours carries a mark from its first moment.
make_environment() {
  if [ ! -d "$root/.venv" ]; then
    mkdir -p "$root/.venv.new"
    touch "$root/.venv.new/.made-by-install"
    mv "$root/.venv.new" "$root/.venv"
  fi
  PIP_NO_CACHE_DIR=1 bash "$root/scripts/setup.sh"
}

write_config() {
  # With settings as they were kept beside it, so that a failure can bring them back.
  [ ! -f "$config" ] || cp -p "$config" "$config.before-install"
  tqstack config write ${model:+--set "SIDECAR_MODEL=$model"}
}

restore_config() {
  if [ -f "$config.before-install" ]; then
    mv "$config.before-install" "$config"
  else
    rm -f "$config"
    rmdir -p "$(dirname "$config")" 2>/dev/null || true
  fi
}

remove_services() { tqstack service uninstall; }

say "checking this machine"
bash "$root/scripts/preflight-check.sh" ${model:+--model "$model"}
if [ -z "$yes$dry" ] && [ -t 0 ]; then
  read -r -p "install into $root/.venv and $(dirname "$config")? [Y/n] " answer
  case $answer in [nN]*) exit 0 ;; esac
fi

[ -d "$root/.venv" ] || will_undo rm -rf "$root/.venv" "$root/.venv.new"
act "packages: $root/.venv" make_environment

will_undo restore_config
act "settings: $config${model:+, SIDECAR_MODEL=$model}; what you changed stays" write_config

# What has come of a model is kept even if this fails: the next try goes on from there.
act "model: download it, unless it is here or not needed" tqstack model download

if [ -n "$service" ]; then
  # Services that ran before are not taken away.
  tqstack service status >/dev/null 2>&1 || will_undo remove_services
  act "services: install and start them" tqstack service install
  act "services: wait until the router answers" tqstack service wait
fi

undo=()
if [ -n "$dry" ]; then
  say "nothing was changed"
  exit
fi
rm -f "$config.before-install"
say "done. Check it: .venv/bin/tqstack doctor. Remove it: ./uninstall.sh"
[ -n "$service" ] || say "start it: .venv/bin/tqstack up"
