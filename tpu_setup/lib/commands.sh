# shellcheck shell=bash
# Every outside command goes through `run` or `ask`: they quote it for a dry run, and otherwise run it.

# A folder that only its owner can look into, whatever the folder around it allows.
umask 077
scratch=$(mktemp -d "${TMPDIR:-/tmp}/looplm-tpu.XXXXXX" 2>/dev/null) ||
  mistake "no temporary folder can be made in ${TMPDIR:-/tmp}; set TMPDIR to a folder that you can write to"
trap 'rm -rf "$scratch"' EXIT

# The words as one line that any shell reads back as the same words.
quoted() {
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  printf '%s' "${line# }"
}

joined_by() {
  local IFS=$1
  printf '%s' "${*:2}"
}

# Run a command that shows its own output.
run() {
  if [[ -n ${option[dry-run]} ]]; then
    printf '%s\n' "$(quoted "$@")"
  else
    "$@"
  fi
}

# Run a command for its answer, in the variable `answer`; its errors are kept for `complaint`.
ask() {
  answer=
  if [[ -n ${option[dry-run]} ]]; then
    run "$@"
  else
    answer=$("$@" 2>"$scratch/complaint")
  fi
}

complains_of() { grep -qiE "$1" "$scratch/complaint"; }

# The error of the last `ask` in one line, with a fix if one is known.
complaint() {
  local line
  line=$(grep -E '^ERROR' "$scratch/complaint" | tail -n 1 || true)
  [[ -n $line ]] || line=$(grep -v '^[[:space:]]*$' "$scratch/complaint" | tail -n 1 || true)
  line=${line#ERROR: }
  printf '%s%s' "${line:-it did not say why}" "$(remedy)"
}

remedy() {
  if complains_of 'quota|RESOURCE_EXHAUSTED'; then
    printf '%s' '; ask for more quota (console: IAM & Admin > Quotas, service tpu.googleapis.com), or take another zone'
  elif complains_of 'SERVICE_DISABLED|has not been used in project'; then
    printf '%s' '; enable it: gcloud services enable tpu.googleapis.com'
  elif complains_of 'gcloud auth login|credentials|UNAUTHENTICATED'; then
    printf '%s' '; log in: gcloud auth login'
  elif complains_of 'PERMISSION_DENIED'; then
    printf '%s' '; your account needs the role roles/tpu.admin in this project'
  fi
}

require_tools() {
  local tool
  [[ -z ${option[dry-run]} ]] || return 0
  for tool in "$@"; do
    command -v "$tool" >/dev/null || mistake "$tool is not installed: $(how_to_install "$tool")"
  done
}

how_to_install() {
  case $1 in
    gcloud) printf '%s' 'https://cloud.google.com/sdk/docs/install says how' ;;
    kubectl) printf '%s' 'gcloud components install kubectl gke-gcloud-auth-plugin' ;;
    xpk) printf '%s' 'pip install xpk, in an environment of its own' ;;
    docker) printf '%s' 'https://docs.docker.com/engine/install says how' ;;
  esac
}
