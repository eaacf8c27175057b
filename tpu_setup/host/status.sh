#!/usr/bin/env bash
# One line "STATE HOST DETAIL": unprepared, absent, running, finished, stopped, failed, or dead (after a reboot).
set -euo pipefail
# shellcheck source=tpu_setup/host/run_state.sh
source "$(dirname "${BASH_SOURCE[0]}")/run_state.sh"

main() {
  local outcome
  if [[ ! -e $home/prepared ]]; then
    echo "unprepared $(hostname)"
  elif [[ ! -e $run/command ]]; then
    echo "absent $(hostname)"
  elif alive; then
    echo "running $(hostname) $(tail -n 1 "$run/log" 2>/dev/null)"
  elif outcome=$(cat "$run/outcome" 2>/dev/null); then
    echo "${outcome%% *} $(hostname) $outcome"
  else
    echo "dead $(hostname)"
  fi
}

main
