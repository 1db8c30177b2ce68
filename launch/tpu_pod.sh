#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice that may be preempted: requests it as a queued resource, starts
# the run on all workers, and after a preemption requests it again and resumes the run.
#
#   export ZONE=us-west4-a TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite
#   ./launch/tpu_pod.sh NAME --workdir=gs://BUCKET/runs/NAME [arguments of ranktuner train]
#   ./launch/tpu_pod.sh --dry-run NAME ...   prints the commands only
#
# NAME is the name of the slice. Keep this script running (in tmux): it requests the slice again.
# SPOT=0 requests an on-demand slice. The project is taken from gcloud's configuration.
# Where libtpu is installed here (ranktuner-jax[train,tpu] in .venv), the run is planned first, and
# not started if it does not fit. PLAN=0 skips that.
# The slice is deleted when the run is finished; after an error it is kept, and keeps costing money.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=1
  shift
fi
if [[ $# -lt 2 || $1 == -* || " $* " != *" --workdir=gs://"* ]]; then
  echo "tpu_pod.sh: expected NAME --workdir=gs://BUCKET/FOLDER [arguments], got: $*" >&2
  exit 2
fi
name=$1
shift
: "${ZONE:?must be set, e.g. us-west4-a}" "${TYPE:?must be set, e.g. v5litepod-16}"
: "${RUNTIME:?must be set to the TPU software version, e.g. v2-alpha-tpuv5-lite}"

state() {
  if [[ -n ${DRY_RUN:-} ]]; then
    echo ACTIVE
    return
  fi
  gcloud compute tpus queued-resources describe "$name" --zone="$ZONE" \
    --format='value(state.state)' 2>/dev/null || echo ABSENT
}

delete() {
  run gcloud compute tpus queued-resources delete "$name" --zone="$ZONE" --force --quiet
}

request() {
  local spot=()
  [[ ${SPOT:-1} == 0 ]] || spot=(--spot)
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$ZONE" \
    --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${spot[@]}"
}

wait_until_active() {
  local now
  while now=$(state) && [[ $now != ACTIVE ]]; do
    case $now in
      ABSENT) request ;;
      SUSPENDED | FAILED) delete ;;
    esac
    echo "$(date +%T) $name is $now; waiting"
    sleep 30
  done
}

on_all_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" --zone="$ZONE" --worker=all --command="$1"
}

plan() {
  local flags=() status=0
  for flag in "$@"; do
    [[ $flag != --config* ]] || flags+=("$flag")
  done
  if [[ -z ${DRY_RUN:-} ]] && ! .venv/bin/python -c 'import libtpu, ranktuner_jax.train' 2>/dev/null; then
    echo "tpu_pod.sh: no plan: .venv lacks libtpu (ranktuner-jax[train,tpu])" >&2
    return
  fi
  run .venv/bin/ranktuner plan --topology="$TYPE" "${flags[@]}" || status=$?
  case $status in
    0) ;;
    3) exit 3 ;;
    *) echo "tpu_pod.sh: no plan could be made; going on without one" >&2 ;;
  esac
}

train() {
  run tar --create --gzip --file=/tmp/ranktuner.tar.gz \
    --exclude=.venv --exclude=.git --exclude=runs . &&
    run gcloud compute tpus tpu-vm scp /tmp/ranktuner.tar.gz "$name:/tmp/" \
      --zone="$ZONE" --worker=all &&
    on_all_workers "$install" && on_all_workers "$start"
}

# Commands for the workers. A process left by a lost connection saves on SIGTERM; wait for it.
install='set -e
mkdir -p ranktuner && cd ranktuner && tar --extract --gzip --file=/tmp/ranktuner.tar.gz
command -v python3.11 || { sudo apt-get update && sudo apt-get install -y python3.11-venv; }
source launch/venv.sh && PYTHON=python3.11 install_into_venv train,eval,gcs,tpu'
start='cd ranktuner && while pkill -x ranktuner; do sleep 5; done
exec .venv/bin/ranktuner train --distributed'
start+=$(printf ' %q' "$@")

[[ ${PLAN:-1} == 0 ]] || plan "$@"
if [[ -n ${DRY_RUN:-} ]]; then
  request
fi
while true; do
  wait_until_active
  # gcloud passes on the exit code of the first worker that failed; 255 is a lost connection.
  status=0
  train || status=$?
  case $status in
    0) break ;;
    2) echo "tpu_pod.sh: user error, nothing was trained; see the message above" >&2 ;;
    75 | 255)
      sleep 30
      continue
      ;;
  esac
  # A preempted worker makes the others fail, each with its own error.
  [[ $(state) == ACTIVE || $status == 2 ]] || continue
  echo "tpu_pod.sh: exit code $status, and the slice still exists. It is kept; to delete it:" >&2
  DRY_RUN=1 delete >&2
  exit "$status"
done
delete
