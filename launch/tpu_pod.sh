#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice that may be taken away at any time: books it as a queued resource,
# starts the run on all of its workers, and after a preemption books it again and goes on.
#
#   export ZONE=us-west4-a TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite
#   ./launch/tpu_pod.sh NAME --workdir=gs://BUCKET/runs/NAME [arguments of ranktuner train]
#   ./launch/tpu_pod.sh --dry-run NAME ...   only prints the commands
#
# NAME is the name of the slice. Leave this script running (tmux): it is what books the slice again.
# SPOT=0 books a slice that is not preemptible. The project is gcloud's own setting.
# When the run is finished the slice is deleted; after a mistake it is left, and paid for.
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
: "${ZONE:?such as us-west4-a}" "${TYPE:?such as v5litepod-16}"
: "${RUNTIME:?the software of that TPU, such as v2-alpha-tpuv5-lite}"

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

book() {
  local spot=()
  [[ ${SPOT:-1} == 0 ]] || spot=(--spot)
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$ZONE" \
    --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${spot[@]}"
}

wait_until_active() {
  local now
  while now=$(state) && [[ $now != ACTIVE ]]; do
    case $now in
      ABSENT) book ;;
      SUSPENDED | FAILED) delete ;;
    esac
    echo "$(date +%T) $name is $now; waiting"
    sleep 30
  done
}

on_all_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" --zone="$ZONE" --worker=all --command="$1"
}

train() {
  run tar --create --gzip --file=/tmp/ranktuner.tar.gz \
    --exclude=.venv --exclude=.git --exclude=runs . &&
    run gcloud compute tpus tpu-vm scp /tmp/ranktuner.tar.gz "$name:/tmp/" \
      --zone="$ZONE" --worker=all &&
    on_all_workers "$install" && on_all_workers "$start"
}

# What the workers do. A process that a lost connection left behind is told to save, and waited for.
install='set -e
mkdir -p ranktuner && cd ranktuner && tar --extract --gzip --file=/tmp/ranktuner.tar.gz
command -v python3.11 || { sudo apt-get update && sudo apt-get install -y python3.11-venv; }
source launch/venv.sh && PYTHON=python3.11 install_into_venv train,eval,gcs,tpu'
start='cd ranktuner && while pkill -x ranktuner; do sleep 5; done
exec .venv/bin/ranktuner train --distributed'
start+=$(printf ' %q' "$@")

if [[ -n ${DRY_RUN:-} ]]; then
  book
fi
while true; do
  wait_until_active
  # gcloud passes on the exit code of the first worker that failed; 255 is a lost connection.
  status=0
  train || status=$?
  case $status in
    0) break ;;
    2) echo "tpu_pod.sh: a mistake in what was asked; nothing was trained" >&2 ;;
    75 | 255)
      sleep 30
      continue
      ;;
  esac
  # One worker that went away ends the others too, each with an error of its own.
  [[ $(state) == ACTIVE || $status == 2 ]] || continue
  echo "tpu_pod.sh: exit code $status on a slice that is there. It is left as it is; to delete it:" >&2
  DRY_RUN=1 delete >&2
  exit "$status"
done
delete
