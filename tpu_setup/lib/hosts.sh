# shellcheck shell=bash
# Work on the hosts of every slice. What runs there is in tpu_setup/host and is copied with the source.

tpu_prepare() {
  need name zone
  wait_until_active || not_active
  prepare_hosts || failure "preparing failed on a host, see above; the same command tries again and keeps what is done"
  report "every host is prepared; next: tpu launch"
}

tpu_launch() {
  need_run
  launch_on_hosts || failure "launching failed on a host, see above; the same command starts what does not run yet"
  report "the run has started and writes to ${option[out]}; next: tpu follow (or tpu watch, on spot)"
}

tpu_follow() {
  need name zone
  local status=0
  trap 'note "the run continues; tpu stop ends it"; exit 130' INT
  run gcloud compute tpus tpu-vm ssh "$(node "${option[node]}")" "${location[@]}" --worker="${option[worker]}" \
    "${connect_flags[@]}" --command="bash $host_scripts/follow.sh" || status=$?
  ((status == 0)) || failure "the connection ended (status $status); the run continues: tpu status"
}

tpu_status() {
  need name zone
  look
  report "${option[name]} is $state"
  [[ $state == ACTIVE || -n ${option[dry-run]} ]] || return 0
  on_hosts "$status_command" || failure "a host did not answer, see above"
}

tpu_stop() {
  need name zone
  on_hosts "bash $host_scripts/stop.sh ${option[grace]}" ||
    failure "a host did not stop, see above; try again, or tpu delete"
  report "nothing is running; the TPU still costs money: tpu delete"
}

host_scripts=looplm/source/tpu_setup/host
# Where nothing was copied yet there is no script to ask.
status_command="if test -e $host_scripts/status.sh; then bash $host_scripts/status.sh; "
# shellcheck disable=SC2016  # the host expands it
status_command+='else echo "unprepared $(hostname)"; fi'

need_run() {
  need name zone out
  ((${#train_arguments[@]})) || mistake "say what to train after --, such as: tpu launch ... -- --recipe ouro-1.4b"
  local argument
  for argument in "${train_arguments[@]}"; do
    [[ $argument != --out && $argument != --out=* ]] || mistake "--out goes before --, where restarting needs it too"
  done
}

# Copy the source and install it. A host that holds this very source already says so.
prepare_hosts() {
  local archive digest
  digest=$(source_digest) || return 1
  archive=$scratch/looplm-source.tgz
  run tar --create --gzip --file "$archive" --directory "$source_folder" --exclude='__pycache__' "${source_files[@]}" ||
    return 1
  to_hosts "$archive" looplm-source.tgz || return 1
  run rm -f "$archive"
  on_hosts "$private_folder && rm -rf looplm/source.new && mkdir looplm/source.new && \
tar -xzf looplm-source.tgz -C looplm/source.new && bash looplm/source.new/tpu_setup/host/prepare.sh $digest"
}

# Only the owner can look into it, so that the environment of a run is private from the moment it is copied.
private_folder="mkdir -p looplm && chmod 700 looplm"

source_files=(looplm_jax tpu_setup setup.cfg pyproject.toml requirements.txt README.md LICENSE)

source_digest() {
  (
    cd "$source_folder" || exit
    find "${source_files[@]}" -type f ! -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z |
      xargs -0 cksum | cksum | cut -d ' ' -f 1
  )
}

launch_on_hosts() {
  local environment="rm -f looplm/host.env"
  if [[ -n ${option[host-env]} ]]; then
    to_hosts "${option[host-env]}" looplm/host.env || return 1
    environment="chmod 600 looplm/host.env"
  fi
  on_hosts "$environment && bash $host_scripts/launch.sh $(quoted train --distributed --out "${option[out]}" "${train_arguments[@]}")"
}

# The node of each slice, as Google names them.
node() {
  if ((option[slices] > 1)); then
    printf '%s-%s' "${option[name]}" "$1"
  else
    printf '%s' "${option[name]}"
  fi
}

# on_hosts COMMAND: on every worker of every slice, the slices side by side; false where one failed.
on_hosts() {
  each_slice ssh_to_slice "$1"
}

# to_hosts FILE NAME: a copy in the home folder of every worker of every slice.
to_hosts() {
  each_slice copy_to_slice "$1" "$2"
}

ssh_to_slice() {
  run gcloud compute tpus tpu-vm ssh "$1" "${location[@]}" --worker=all "${connect_flags[@]}" --command="$2"
}

copy_to_slice() {
  run gcloud compute tpus tpu-vm scp "$2" "$1:$3" "${location[@]}" --worker=all "${connect_flags[@]}"
}

each_slice() {
  local act=$1 index status failed=0
  local -a jobs=()
  shift
  for ((index = 0; index < option[slices]; index++)); do
    if [[ -n ${option[dry-run]} ]]; then
      "$act" "$(node "$index")" "$@"
    else
      "$act" "$(node "$index")" "$@" </dev/null &
      jobs+=($!)
    fi
  done
  for index in "${!jobs[@]}"; do
    status=0
    wait "${jobs[index]}" || status=$?
    ((status == 0)) || note "$(node "$index"): a worker failed (status $status)"
    ((status == 0)) || failed=1
  done
  return "$failed"
}
