#!/usr/bin/env bash
# stop.sh SECONDS: let the run save and end; wait for it that long.
set -euo pipefail
# shellcheck source=tpu_setup/host/run_state.sh
source "$(dirname "${BASH_SOURCE[0]}")/run_state.sh"

main() {
  local deadline=$((SECONDS + $1))
  if ! alive; then
    say "nothing runs"
    return
  fi
  touch "$run/stop"
  kill -TERM "$(cat "$run/pid")" 2>/dev/null || true
  while alive; do
    if ((SECONDS >= deadline)); then
      say "still saving after $1 s: tpu stop again, with a longer --grace" >&2
      return 1
    fi
    sleep 0.2
  done
  say "$(cat "$run/outcome" 2>/dev/null || echo "ended without an outcome")"
}

main "$1"
