#!/usr/bin/env bash
# Train on several machines over ssh. HOSTS is a file with one machine name per line. Process 0 runs on the first one.
#
#     launch/hosts.sh HOSTS --processes 8 configs/powermoe_1b.py --mesh.data=-1
#
# The current folder must have the same path on every machine, and the run folder must be on a disk that all machines
# share. Ctrl-C saves a checkpoint and stops all processes. The same command, run again, continues from the last
# checkpoint. Environment variables: PORT is a free port on the first machine (default 29400), PYTHON is the Python to
# run (default python).
set -euo pipefail
mapfile -t hosts < <(grep . "$1")
shift
trap 'kill $(jobs -p)' INT TERM
for i in "${!hosts[@]}"; do
  join=(--hosts "${#hosts[@]}" --host "$i" --coordinator "${hosts[0]}:${PORT:-29400}")
  command=$(printf '%q ' "${PYTHON:-python}" -m stickjax.launch "${join[@]}" "$@")
  # With a terminal (-tt), a machine notices when this script has ended. Its processes then save and stop.
  ssh -tt "${hosts[i]}" "cd $(printf '%q' "$PWD") && exec $command" </dev/null &
done
code=0
while [ -n "$(jobs -p -r)" ]; do wait -n || code=$?; done
exit "$code"
