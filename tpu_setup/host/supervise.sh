#!/usr/bin/env bash
# Runs the command until it has finished, is stopped, or fails for good. The run resumes from its folder each time.
#
# SIGTERM to this script is passed on, and the run saves: this is how stop.sh stops it, and how a machine that goes down
# ends it. Everything else that ends the command (a crash; a lost host, which is exit status 75, or SIGABRT by the JAX
# runtime) starts it again, except exit status 2, a mistake of the user's.
set -uo pipefail
# shellcheck source=tpu_setup/host/run_state.sh
source "$(dirname "${BASH_SOURCE[0]}")/run_state.sh"

pause_seconds=${LOOPLM_PAUSE_SECONDS:-30}   # before a restart: the other hosts have to notice, too
short_seconds=${LOOPLM_SHORT_SECONDS:-600}  # an attempt this short counts as a failure
max_short=5                                 # this many in a row end the run

stopping=0 interrupted=0 child=
trap stop TERM INT

main() {
  local attempt short=0 status started
  echo $$ >"$run/pid"
  mapfile -d '' -t command <"$run/command"
  export_environment
  for ((attempt = 1; ; attempt++)); do
    ((!stopping)) || leave
    log "attempt $attempt: ${command[*]}"
    started=$SECONDS
    "${command[@]}" &
    await $!
    log "attempt $attempt ended with status $status"
    ((status != 0)) || finish finished
    ((!stopping)) || leave
    ((status != 2)) || finish "failed status 2"
    if ((SECONDS - started < short_seconds)); then short=$((short + 1)); else short=0; fi
    ((short < max_short)) || finish "failed status $status, $max_short short attempts in a row"
    sleep "$pause_seconds" &
    await $!
  done
}

# The status of a child. A trap interrupts `wait`, though the child lives.
await() {
  child=$1
  ((!stopping)) || kill -TERM "$child" 2>/dev/null
  while :; do
    interrupted=0
    wait "$child"
    status=$?
    ((interrupted)) || break
  done
  child=
}

stop() {
  stopping=1 interrupted=1
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null
}

# Lines KEY=VALUE, taken literally.
export_environment() {
  local line
  [[ -r $home/host.env ]] || return 0
  while IFS= read -r line || [[ -n $line ]]; do
    [[ $line =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] && export "${line%%=*}=${line#*=}"
  done <"$home/host.env"
  return 0
}

# Without an outcome the run counts as dead, and `tpu watch` starts it again.
leave() {
  [[ ! -e $run/stop ]] || finish stopped
  log "the machine goes down"
  exit 0
}

finish() {
  log "$1"
  echo "$1" >"$run/outcome.new"
  mv "$run/outcome.new" "$run/outcome"
  exit 0
}

log() { echo "supervisor, $(date --utc +%FT%TZ): $*"; }

main
