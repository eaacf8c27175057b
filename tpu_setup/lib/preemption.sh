# shellcheck shell=bash
# Spot TPUs are taken away: the request is then SUSPENDED for good, and has to be deleted and made again.

tpu_restart() {
  need_run
  need accelerator
  check_accelerator
  look
  if [[ $state == FAILED || $state == SUSPENDED ]]; then
    confirm "${option[name]}" "${option[name]} is $state: this deletes what is left of it and creates it again."
    delete_request
    state=ABSENT
  fi
  [[ $state != ABSENT ]] || request
  tpu_prepare
  tpu_launch
}

# Until the run has finished, was stopped, or failed for a reason that no restart fixes.
tpu_watch() {
  need_run
  need accelerator
  check_accelerator
  local also=
  [[ -z ${option[delete-when-finished]} ]] || also=" It deletes it once the run has finished, too."
  confirm "${option[name]}" "Whenever ${option[name]} is preempted, this deletes what is left and recreates it.$also"
  if [[ -n ${option[dry-run]} ]]; then
    tpu_restart
    return
  fi
  fruitless=0
  local faults=0
  while :; do
    if look_after_tpu; then
      faults=0
    else
      faults=$((faults + 1))
      note "that did not go well ($faults of 5 in a row)"
      ((faults < 5)) || failure "giving up; what is left of ${option[name]} still costs money: tpu status, tpu delete"
    fi
    sleep "${option[poll]}"
  done
}

# One look, and what follows from it; false on a fault that may pass. A subshell keeps one that is fatal elsewhere.
look_after_tpu() {
  try_look || { note "$(could_not_look)" && return 1; }
  case $state in
    ABSENT) (request) ;;
    FAILED | SUSPENDED) recreate ;;
    ACTIVE) look_after_run ;;
    *) note "${option[name]} is $state" ;;
  esac
}

recreate() {
  fruitless=$((fruitless + 1))
  ((fruitless <= 3)) ||
    mistake "${option[name]} was created 3 times and never ran$(reason); is there capacity in ${option[zone]}?"
  note "${option[name]} is $state$(reason); deleting what is left, creating it again"
  (delete_request) && (request)
}

# Ask every host, and bring up what does not run. Each answers with a line "STATE HOST DETAIL".
look_after_run() {
  local answers states
  answers=$(on_hosts "$status_command") || return 1
  states=$(cut -d ' ' -f 1 <<<"$answers" | sort -u | tr '\n' ' ')
  case " $states" in
    *" failed "*) failure "$(grep -m 1 '^failed' <<<"$answers"); tpu follow says why, and the TPU still costs money" ;;
    *" stopped "*) ended "the run was stopped" ;;
    " finished ") finished ;;
    *" unprepared "*) prepare_hosts && launch_on_hosts ;;
    *" dead "* | *" absent "*) launch_on_hosts ;;
    *) fruitless=0 ;;
  esac
}

finished() {
  [[ -n ${option[delete-when-finished]} ]] || ended "the run has finished"
  delete_request
  note "the run has finished; ${option[name]} is deleted and costs nothing more"
  exit 0
}

ended() {
  note "$1; the TPU still costs money: tpu delete"
  exit 0
}
