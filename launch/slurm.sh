#!/usr/bin/env bash
# An mmprm command on the GPUs of several nodes, one process for each GPU:
#
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --time=12:00:00 launch/slurm.sh LOGS COMMAND...
#
# which is what `mmprm launch slurm` submits. LOGS is a folder that exists, COMMAND what is behind mmprm, with
# --distributed. The environment is that of the submission: activate the one that has mmprm before. Some time before the
# limit (--signal) the processes are told to stop, and the job goes back into the queue; a preempted job does so anyway.
#SBATCH --job-name=mmprm
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -uo pipefail

if [[ $# -lt 2 ]]; then
  echo "usage: sbatch [options] launch/slurm.sh LOGS COMMAND..." >&2
  exit 2
fi
logs=$1
shift

over=0
# srun itself must not get SIGTERM: it would kill the processes at once.
trap 'over=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
# srun does not take this one over from sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# All processes of a node see all of its GPUs, and take their own by SLURM_LOCALID.
srun --kill-on-bad-exit=1 --open-mode=append --output="$logs/%j.%t.log" mmprm "$@" &
step=$!
wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do # the signal has interrupted the first wait
  wait "$step"
  status=$?
done

if [[ $over == 1 ]]; then
  echo "mmprm launch: the time is over; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
elif [[ $status != 0 ]]; then
  echo "mmprm launch: exit status $status; the last line of each process's log:"
  for log in "$logs/$SLURM_JOB_ID".*.log; do
    echo "$log: $(tail -n 1 "$log")"
  done
fi
exit "$status"
