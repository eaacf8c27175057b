# shellcheck shell=bash
# Flags, environment variables and a file become the table `option`; what cannot be right ends here, in one line.

value_flags=(name zone project accelerator slices capacity reservation runtime-version service-account out host-env
  node worker grace poll image)
declare -A option=([dry-run]='' [yes]='' [delete-when-finished]='')
declare -A default=([slices]=1 [capacity]=spot [node]=0 [worker]=0 [grace]=300 [poll]=60)
create_flags=() connect_flags=() train_arguments=()
location=()         # --zone and --project, as gcloud and xpk take them
cluster_location=() # a GKE cluster is in the zone's region

# A flag wins over the environment, the environment over the file, the file over the default.
read_options() {
  local -A given=() from_file=()
  read_flags "$@"
  [[ -z ${given[env]:-} ]] || read_file "${given[env]}"
  local flag variable
  for flag in "${value_flags[@]}"; do
    variable=$(variable_of "$flag")
    option[$flag]=${given[$flag]:-${!variable:-${from_file[$variable]:-${default[$flag]:-}}}}
  done
  [[ -z ${option[reservation]} ]] || option[capacity]=reserved
  check_options
  location=(--zone="${option[zone]}")
  cluster_location=(--region="${option[zone]%-*}")
  if [[ -n ${option[project]} ]]; then
    location+=(--project="${option[project]}")
    cluster_location+=(--project="${option[project]}")
  fi
}

variable_of() {
  local name=${1//-/_}
  printf 'LOOPLM_%s' "${name^^}"
}

read_flags() {
  while (($#)); do
    case $1 in
      --) train_arguments=("${@:2}") && return ;;
      --dry-run | --yes | --delete-when-finished) option[${1#--}]=yes && shift ;;
      --spot | --on-demand | --reserved) given[capacity]=${1#--} && shift ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && take_value "$@" && shift 2 ;;
      --*) take_value "$@" && shift 2 ;;
      *) mistake "'$1' is not a flag; arguments of looplm train go after --" ;;
    esac
  done
}

take_value() {
  local flag=${1#--}
  [[ " ${value_flags[*]} env create-flag connect-flag " == *" $flag "* && $flag != capacity ]] ||
    mistake "unknown flag '$1'; \`tpu --help\` lists them"
  [[ $# -ge 2 && -n $2 ]] || mistake "$1 needs a value"
  case $flag in
    create-flag) create_flags+=("$2") ;;
    connect-flag) connect_flags+=("$2") ;;
    *) given[$flag]=$2 ;;
  esac
}

# Lines LOOPLM_X=value, taken literally: nothing in the file is executed.
read_file() {
  local file=$1 line number=0 known=' '
  local flag
  for flag in "${value_flags[@]}"; do known+="$(variable_of "$flag") "; done
  [[ -r $file ]] || mistake "$file cannot be read; copy tpu_setup/example.env"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
    [[ $line == *=* && $known == *" ${line%%=*} "* ]] ||
      mistake "$file, line $number: '${line%%=*}' is not a setting; tpu_setup/example.env lists them"
    from_file[${line%%=*}]=$(unquoted "${line#*=}")
  done <"$file"
}

unquoted() {
  if [[ $1 =~ ^\"(.*)\"$ || $1 =~ ^\'(.*)\'$ ]]; then
    printf '%s' "${BASH_REMATCH[1]}"
  else
    printf '%s' "$1"
  fi
}

check_options() {
  local flag
  [[ -z ${option[name]} || ${option[name]} =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    mistake "--name '${option[name]}' must be at most 40 lower-case letters, digits and dashes, a letter first"
  [[ -z ${option[zone]} || ${option[zone]} =~ ^[a-z]+-[a-z]+[0-9]+-[a-z][a-z0-9]*$ ]] ||
    mistake "--zone '${option[zone]}' is not a zone such as us-east5-b"
  [[ ${option[capacity]} =~ ^(spot|on-demand|reserved)$ ]] ||
    mistake "LOOPLM_CAPACITY '${option[capacity]}' must be spot, on-demand or reserved"
  for flag in slices node worker grace poll; do
    [[ ${option[$flag]} =~ ^[0-9]{1,6}$ ]] || mistake "--$flag '${option[$flag]}' is not a number"
  done
  ((option[slices] >= 1)) || mistake "--slices must be at least 1"
  [[ -z ${option[out]} || ${option[out]} =~ ^gs://[^/]+/.+ ]] ||
    mistake "--out '${option[out]}' must be gs://BUCKET/RUN: the hosts share no disk"
  [[ -z ${option[host-env]} || -r ${option[host-env]} ]] || mistake "--host-env ${option[host-env]} cannot be read"
}

# The command cannot do without these flags.
need() {
  local flag
  for flag in "$@"; do
    [[ -n ${option[$flag]} ]] || mistake "say --$flag (or $(variable_of "$flag")); \`tpu --help\` says what it is"
  done
}

# The runtime that Google names for each generation: https://cloud.google.com/tpu/docs/runtimes
runtime_version() {
  if [[ -n ${option[runtime-version]} ]]; then
    printf '%s' "${option[runtime-version]}"
    return
  fi
  case ${option[accelerator]} in
    v5litepod-*) printf 'v2-alpha-tpuv5-lite' ;;
    v5p-*) printf 'v2-alpha-tpuv5' ;;
    v6e-*) printf 'v2-alpha-tpuv6e' ;;
    v4-*) printf 'tpu-ubuntu2204-base' ;;
  esac
}

check_accelerator() {
  [[ ${option[accelerator]} != tpu7x* ]] || mistake "TPU7x is offered on GKE only: \`tpu gke create\`"
  [[ ${option[accelerator]} =~ ^(v5litepod|v5p|v6e|v4)-[1-9][0-9]*$ || -n ${option[runtime-version]} ]] ||
    mistake "unknown accelerator '${option[accelerator]}': v5litepod-N, v6e-N, v5p-N, v4-N, or say --runtime-version"
}

# Chips of one slice; the number in a v4 or v5p type counts cores, two a chip.
chips() {
  local count=${option[accelerator]##*-}
  case ${option[accelerator]} in
    v4-* | v5p-*) printf '%d' $((count / 2)) ;;
    *) printf '%s' "$count" ;;
  esac
}
