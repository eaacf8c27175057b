# shellcheck shell=bash
# Where a host keeps its run, and whether the run is alive. Sourced by the other scripts of this folder.

home=$HOME/looplm
run=$home/run
# shellcheck disable=SC2034  # used by those who source this
export home run

# A process id may have been given to another after a reboot, so its name is looked at too.
alive() {
  local pid
  pid=$(cat "$run/pid" 2>/dev/null) || return 1
  kill -0 "$pid" 2>/dev/null && grep -qa supervise.sh "/proc/$pid/cmdline" 2>/dev/null
}

say() { echo "$(hostname): $*"; }
