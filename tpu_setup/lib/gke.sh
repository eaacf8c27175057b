# shellcheck shell=bash
# The same on GKE: xpk makes a cluster and submits the run to it as a JobSet, which restarts it after a preemption.
# https://github.com/AI-Hypercomputer/xpk

gke_create() {
  need name zone accelerator
  local flags=(--cluster="${option[name]}" --tpu-type="${option[accelerator]}" --num-slices="${option[slices]}")
  case ${option[capacity]}:${option[reservation]} in
    spot:) flags+=(--spot) ;;
    on-demand:) flags+=(--on-demand) ;;
    reserved:) mistake "on GKE a reservation has a name: --reservation NAME" ;;
    *) flags+=(--reservation="${option[reservation]}") ;;
  esac
  require_tools gcloud kubectl xpk
  run xpk cluster create "${flags[@]}" "${location[@]}" "${create_flags[@]}" ||
    mistake "the cluster was not created, see above; the same command resumes there," \
      "and this deletes what there is: $(delete_cluster)"
  report "the cluster ${option[name]} costs from now until \`tpu gke delete\`; next: tpu gke prepare"
}

gke_prepare() {
  need image
  require_tools docker
  run docker build --tag "${option[image]}" --file "$setup_folder/Dockerfile" "$source_folder" ||
    failure "the image was not built, see above"
  run docker push "${option[image]}" ||
    failure "the image was not pushed, see above; docker may not be logged in: gcloud auth configure-docker"
  report "${option[image]} is pushed; next: tpu gke launch"
}

# All exit statuses but 0 and 2, an error that no restart fixes, start the run again; a save may take the grace period.
gke_launch() {
  need_run
  need accelerator image
  local command environment=()
  command="exec $(quoted looplm train --distributed --out "${option[out]}" "${train_arguments[@]}")"
  [[ $command != *$'\n'* ]] || mistake "an argument of looplm train holds a line break, which xpk cannot pass on"
  [[ -z ${option[host-env]} ]] || environment=(--env-file="${option[host-env]}")
  connect
  if [[ -z ${option[dry-run]} ]] && workload_exists; then
    note "${option[name]} is submitted already; nothing was done"
    return
  fi
  run xpk workload create --workload="${option[name]}" --cluster="${option[name]}" --tpu-type="${option[accelerator]}" \
    --num-slices="${option[slices]}" --docker-image="${option[image]}" --max-restarts=1000 \
    --restart-on-exit-codes=1-1,3-126 --termination-grace-period-seconds="${option[grace]}" "${environment[@]}" \
    "${location[@]}" --command="$command" || failure "the run was not submitted, see above"
  report "the run is submitted and writes to ${option[out]}; next: tpu gke follow"
}

gke_follow() {
  connect
  local status=0
  trap 'note "the run continues; tpu gke stop ends it"; exit 130' INT
  local labels=(xpk.google.com/workload="${option[name]}" jobset.sigs.k8s.io/job-index="${option[node]}"
    batch.kubernetes.io/job-completion-index="${option[worker]}")
  run kubectl logs --follow --tail=100 --selector="$(joined_by , "${labels[@]}")" || status=$?
  ((status == 0)) || failure "the log ended (status $status); the run continues if it was active: tpu gke status"
}

gke_status() {
  connect
  run xpk workload list --cluster="${option[name]}" "${location[@]}" --filter-by-job="${option[name]}"
}

# The pods get SIGTERM and the grace period of `gke_launch` to save.
gke_stop() {
  connect
  if [[ -z ${option[dry-run]} ]] && ! workload_exists; then
    note "nothing runs as ${option[name]}; nothing was done"
    return
  fi
  run xpk workload delete --workload="${option[name]}" --cluster="${option[name]}" "${location[@]}" ||
    failure "the run was not stopped, see above"
  report "nothing is running; the cluster still costs money: tpu gke delete"
}

gke_delete() {
  need name zone
  require_tools gcloud kubectl xpk
  confirm "${option[name]}" "This deletes the GKE cluster ${option[name]} and whatever runs on it."
  if ! ask gcloud container clusters describe "${option[name]}" "${cluster_location[@]}" --format='value(status)'; then
    complains_of 'NOT_FOUND|code=404|not found' || mistake "gcloud could not look at ${option[name]}: $(complaint)"
    note "there is no cluster ${option[name]}; nothing was done"
    return
  fi
  run xpk cluster delete --cluster="${option[name]}" "${location[@]}" --force ||
    failure "the cluster was not deleted and may still cost money, see above; try again: $(delete_cluster)"
  report "the cluster ${option[name]} is deleted and costs nothing more; what is in the bucket stays, and costs"
}

delete_cluster() { quoted xpk cluster delete --cluster="${option[name]}" "${location[@]}" --force; }

# Points kubectl to this cluster. xpk makes regional clusters.
connect() {
  need name zone
  require_tools gcloud kubectl xpk
  ask gcloud container clusters get-credentials "${option[name]}" "${cluster_location[@]}" ||
    mistake "gcloud could not reach the cluster ${option[name]}: $(complaint)"
}

workload_exists() {
  ask kubectl get jobset "${option[name]}" --ignore-not-found --output name ||
    mistake "kubectl could not look for ${option[name]}: $(complaint)"
  [[ -n $answer ]]
}
