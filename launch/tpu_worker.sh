#!/usr/bin/env bash
# What `mmprm launch tpu` runs on every worker of a slice, over ssh.
#
#   tpu_worker.sh install            a virtual environment with this clone, JAX for TPUs and access to gs://
#   tpu_worker.sh run ID COMMAND...  runs COMMAND once for this ID, or follows it if it is running: prints its log from
#                                    the start, then a line with its exit status, and exits with that
#
# A command does not end when the connection does: gcloud connects again with the same line, and so may you.
set -euo pipefail
clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
lock=~/mmprm.lock # held while a command is running
runs=~/mmprm_runs
busy=75 # known to mmprm_jax/launch/tpu.py

install() {
  # The images of TPU VMs come with an older Python than 3.11.
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --clear --python 3.12 "$clone/.venv"
  python3 -m uv pip install --quiet --python "$clone/.venv/bin/python" --editable "${clone}[gcs]" 'jax[tpu]'
}

start() {
  mkdir -p "$run"
  printf '%q ' "$@" >"$runs/command"
  : >"$run/log"
  ln -sfn "$run" "$runs/current"
  cd "$clone"
  # A session of its own, in which only the lock's holder knows the end of the command.
  # shellcheck disable=SC2016 # the inner shell's variables
  PATH="$clone/.venv/bin:$PATH" setsid flock --close --timeout 60 "$lock" bash -c '
    run=$1
    shift
    "$@" >>"$run/log" 2>&1 </dev/null
    echo "$?" >"$run/status.part"
    mv "$run/status.part" "$run/status"
  ' bash "$run" "$@" </dev/null >/dev/null 2>&1 &
  until ! flock --nonblock "$lock" true || [[ -e $run/status ]]; do sleep 0.1; done
}

follow() {
  # Whoever gets the lock knows that the command has ended; then tail prints the rest and ends, too.
  flock "$lock" true &
  tail --lines=+1 --follow --sleep-interval=0.3 --pid=$! "$run/log"
  local status=137 # killed together with its shell, or the machine was restarted
  [[ ! -e $run/status ]] || status=$(<"$run/status")
  echo
  echo "mmprm launch: exit status $status"
  exit "$status"
}

case ${1-} in
install) install ;;
run)
  run=$runs/$2
  shift 2
  mkdir -p "$runs"
  if ! flock --nonblock "$lock" true; then
    if [[ $(<"$runs/command") != "$(printf '%q ' "$@")" ]]; then
      echo "another command is running here: $(<"$runs/command")"
      echo "mmprm launch: exit status $busy"
      exit "$busy"
    fi
    run=$(readlink "$runs/current") # started by an earlier launch
  elif [[ ! -e $run ]]; then
    start "$@"
  fi
  follow
  ;;
*)
  echo "usage: tpu_worker.sh install | run ID COMMAND..." >&2
  exit 2
  ;;
esac
