# shellcheck shell=bash
# What the user reads. Everything but the answers of a command goes to stderr, so that a dry run is a clean script.

# What other programs said may be part of it, so control characters are replaced: a terminal would obey them.
note() {
  local line=$*
  printf 'tpu: %s\n' "${line//[[:cntrl:]]/?}" >&2
}

# What has been done; a dry run has done nothing.
report() { [[ -n ${option[dry-run]} ]] || note "$@"; }

# What the user has to fix: one line, exit status 2.
mistake() {
  note "$*"
  exit 2
}

# What went wrong elsewhere, and may go well another time: one line, exit status 1.
failure() {
  note "$*"
  exit 1
}

# confirm NAME QUESTION: continue only if --yes was given or the name is typed.
confirm() {
  local name=$1 question=$2 answer=
  [[ -z ${option[dry-run]} && -z ${option[yes]} ]] || return 0
  [[ -t 0 ]] || mistake "$question There is no terminal to ask on: say --yes"
  read -r -p "tpu: $question Type its name to continue: " answer || true
  [[ $answer == "$name" ]] || mistake "nothing was done: '$answer' is not '$name'"
}
