# shellcheck shell=bash
# A TPU as a queued resource: Google queues the request and fills it when there are chips.
# https://cloud.google.com/tpu/docs/queued-resources

tpu_create() {
  need name zone accelerator
  check_accelerator
  note "${option[name]}: ${option[slices]} x ${option[accelerator]} ($(chips) chips each), ${option[capacity]}," \
    "in ${option[zone]}; it costs from the moment it is ACTIVE until \`tpu delete\`"
  look
  case $state in
    ABSENT) request ;;
    FAILED | SUSPENDING | SUSPENDED)
      mistake "${option[name]} exists and is $state: \`tpu restart\` creates it again, \`tpu delete\` removes it"
      ;;
    *)
      [[ $accelerator == "${option[accelerator]}" ]] ||
        mistake "${option[name]} exists as $accelerator, not ${option[accelerator]}: delete it or take another --name"
      note "${option[name]} exists already and is $state; nothing was done"
      ;;
  esac
}

tpu_delete() {
  need name zone
  confirm "${option[name]}" "This deletes the TPU ${option[name]} in ${option[zone]} and whatever runs on it."
  look
  if [[ $state == ABSENT && -z ${option[dry-run]} ]]; then
    note "there is no ${option[name]} in ${option[zone]}; nothing was done"
    return
  fi
  delete_request
  report "${option[name]} is deleted and costs nothing more; what is in the bucket stays, and costs"
}

tpu_list() {
  need zone
  run gcloud compute tpus queued-resources list "${location[@]}"
}

# What Google says of the request: its `state` (ABSENT where there is none) and its `accelerator`.
look() {
  try_look || mistake "$(could_not_look)"
}

could_not_look() { printf '%s' "gcloud could not look at ${option[name]}: $(complaint)"; }

# The same, but false where gcloud could not tell.
try_look() {
  if ask gcloud compute tpus queued-resources describe "${option[name]}" "${location[@]}" \
    --format='value(state.state,tpu.nodeSpec[0].node.acceleratorType)'; then
    IFS=$'\t' read -r state accelerator <<<"${answer:-ABSENT}"
  else
    complains_of 'NOT_FOUND' || return 1
    state=ABSENT accelerator=
  fi
}

request() {
  local flags=(--accelerator-type="${option[accelerator]}" --runtime-version="$(runtime_version)")
  local release=() # a reservation by name is known to alpha only
  if ((option[slices] > 1)); then
    flags+=(--node-count="${option[slices]}" --node-prefix="${option[name]}")
  else
    flags+=(--node-id="${option[name]}")
  fi
  case ${option[capacity]} in
    spot) flags+=(--spot) ;;
    reserved) [[ -n ${option[reservation]} ]] || flags+=(--reserved) ;;
  esac
  if [[ -n ${option[reservation]} ]]; then
    release=(alpha)
    flags+=(--reservation="${option[reservation]}")
  fi
  [[ -z ${option[service-account]} ]] || flags+=(--service-account="${option[service-account]}")
  ask gcloud "${release[@]}" compute tpus queued-resources create "${option[name]}" "${location[@]}" "${flags[@]}" \
    "${create_flags[@]}" || refused
  report "${option[name]} is requested; next: tpu prepare"
}

# A refused request may leave an entry behind, which costs nothing but holds the name.
refused() {
  local why
  why=$(complaint)
  look
  [[ $state == ABSENT ]] || why+="; it left ${option[name]} behind as $state, which this deletes: $(delete_command)"
  mistake "${option[name]} was not created: $why"
}

delete_command() {
  quoted gcloud compute tpus queued-resources delete "${option[name]}" "${location[@]}" --force --quiet
}

# --force deletes the nodes with the request; --quiet because the user has been asked.
delete_request() {
  ask gcloud compute tpus queued-resources delete "${option[name]}" "${location[@]}" --force --quiet ||
    complains_of 'NOT_FOUND' ||
    failure "${option[name]} was not deleted and may still cost money: $(complaint); try again: $(delete_command)"
}

# Look again and again until the request is filled; false where it never will be.
wait_until_active() {
  local before=
  look
  while :; do
    [[ -z ${option[dry-run]} ]] || return 0
    case $state in
      ACTIVE) return 0 ;;
      ABSENT | FAILED | SUSPENDING | SUSPENDED | DELETING) return 1 ;;
    esac
    [[ $state == "$before" ]] || note "${option[name]} is $state; looking again every ${option[poll]} s"
    before=$state
    sleep "${option[poll]}"
    try_look || note "$(could_not_look); looking again"
  done
}

not_active() {
  case $state in
    ABSENT) mistake "there is no ${option[name]} in ${option[zone]}: tpu create" ;;
    *) mistake "${option[name]} is $state$(reason): \`tpu restart\` creates it again, \`tpu delete\` removes it" ;;
  esac
}

reason() {
  [[ $state == FAILED ]] || return 0
  ask gcloud compute tpus queued-resources describe "${option[name]}" "${location[@]}" \
    --format='value(state.failedData.error.message)' && [[ -n $answer ]] && printf ' (%s)' "$answer"
  return 0
}
