#!/usr/bin/env bash
# Trains on several hosts that you reach by ssh: torchrun on each, one process for each GPU (or one, without GPUs).
#
#     HOSTS="node0 node1 node2 node3" ./ssh.sh --data cifar10 --model preact_resnet101 --workers 4 --out /shared/runs/a
#
# Every host has this package in the same directory, and sees /shared. The first host is where the others meet:
# all have to resolve its name. Ctrl-C once ends the round, saves, and ends everywhere.
set -euo pipefail

read -ra hosts <<< "${HOSTS:?name the hosts, as in HOSTS=\"node0 node1\"}"
port=${PORT:-29500}                       # free on the first host, and closed to everybody else
per_host=${PER_HOST:-1}                   # processes on each host: its GPUs
directory=${DIRECTORY:-$PWD}              # where the package lies on each host
interface=${INTERFACE:-}                  # what the hosts talk over, as in INTERFACE=wg0; default: that of the host's name

pids=()
end() { for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done; }
trap end INT TERM

for rank in "${!hosts[@]}"; do
    command=(torchrun --nnodes "${#hosts[@]}" --nproc-per-node "$per_host" --node-rank "$rank"
             --master-addr "${hosts[0]}" --master-port "$port" -m resist train "$@")
    names=()
    [ -z "$interface" ] || names=("GLOO_SOCKET_IFNAME=$interface" "NCCL_SOCKET_IFNAME=$interface")
    # -tt: when ssh ends here, what it runs there is told so too
    ssh -tt -o BatchMode=yes "${hosts[$rank]}" \
        "cd $(printf %q "$directory") && . .venv/bin/activate && exec env $(printf '%q ' "${names[@]}" "${command[@]}")" &
    pids+=($!)
done

status=0
for pid in "${pids[@]}"; do
    wait "$pid" || status=$?
done
exit "$status"
