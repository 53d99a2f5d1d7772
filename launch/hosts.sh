#!/usr/bin/env bash
# Training on the machines of a list, one name a line, which ssh reaches; process 0 runs on the first of them.
#
#     launch/hosts.sh HOSTS --processes 8 configs/powermoe_1b.py --mesh.data=-1
#
# This folder must be at the same path everywhere, and the folder of the run on a disk that all share. Ctrl-C saves and
# stops all of them; the same command again goes on from the last checkpoint.
# PORT: one that is free on the first machine. PYTHON: the one to run.
set -euo pipefail
mapfile -t hosts < <(grep . "$1")
shift
trap 'kill $(jobs -p)' INT TERM
for i in "${!hosts[@]}"; do
  join=(--hosts "${#hosts[@]}" --host "$i" --coordinator "${hosts[0]}:${PORT:-29400}")
  command=$(printf '%q ' "${PYTHON:-python}" -m stickjax.launch "${join[@]}" "$@")
  # With a terminal (-tt) a machine notices when this script is gone, and its processes save and stop.
  ssh -tt "${hosts[i]}" "cd $(printf '%q' "$PWD") && exec $command" </dev/null &
done
code=0
while [ -n "$(jobs -p -r)" ]; do wait -n || code=$?; done
exit "$code"
