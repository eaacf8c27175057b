#!/usr/bin/env bash
# launch.sh ARGUMENTS...: start `looplm ARGUMENTS...` on this host, under the supervisor, unless it runs already.
set -euo pipefail
# shellcheck source=tpu_setup/host/run_state.sh
source "$(dirname "${BASH_SOURCE[0]}")/run_state.sh"

main() {
  [[ -e $home/prepared ]] || { say "not prepared: tpu prepare" >&2 && return 1; }
  mkdir -p "$run"
  printf '%s\0' "$home/venv/bin/looplm" "$@" >"$run/command.new"
  if alive; then
    already_running
    return
  fi
  mv "$run/command.new" "$run/command"
  rm -f "$run/outcome" "$run/pid" "$run/stop"
  setsid nohup bash "$(dirname "${BASH_SOURCE[0]}")/supervise.sh" </dev/null >>"$run/log" 2>&1 &
  until_alive
  say "started"
}

already_running() {
  if cmp -s "$run/command" "$run/command.new"; then
    say "runs already"
  else
    say "another run is alive: tpu stop" >&2
    return 1
  fi
}

# A run that ended within the first moments has an outcome instead.
until_alive() {
  local tenth
  for ((tenth = 0; tenth < 100; tenth++)); do
    if alive || [[ -e $run/outcome ]]; then return; fi
    sleep 0.1
  done
  say "the supervisor did not start: $run/log" >&2
  return 1
}

main "$@"
