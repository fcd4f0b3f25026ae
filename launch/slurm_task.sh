#!/usr/bin/env bash
# Runs a command as a task of slurm.sbatch, and ends with its exit code.
#
# When a task fails srun ends the others, and then reports the largest of all codes. One that was ended before it could
# save would be 143 and hide the cause; here it is 1, which hides nothing.
set -uo pipefail

if [[ ${1:---help} == --help ]]; then
  echo "Usage: slurm_task.sh COMMAND WORD ...    slurm.sbatch starts its tasks with it."
  exit 0
fi

"$@" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null' TERM INT
while true; do
  wait "$child"
  code=$?
  kill -0 "$child" 2>/dev/null || break
done
((code != 143)) || code=1
exit "$code"
