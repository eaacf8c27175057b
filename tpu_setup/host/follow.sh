#!/usr/bin/env bash
# The log of this host's run, as it grows, until the run ends.
set -euo pipefail
# shellcheck source=tpu_setup/host/run_state.sh
source "$(dirname "${BASH_SOURCE[0]}")/run_state.sh"

main() {
  if [[ ! -e $run/log ]]; then
    say "nothing was launched here yet"
    return
  fi
  if alive; then
    tail --lines 100 --follow --pid "$(cat "$run/pid")" "$run/log"
  else
    tail --lines 100 "$run/log"
    say "nothing is running"
  fi
}

main
