#!/usr/bin/env bash
# Train on several hosts that you reach by ssh: torchrun on each, one process for each GPU (or one, without GPUs).
#
#     HOSTS="node0 node1 node2 node3" ./ssh.sh --data cifar10 --model preact_resnet101 --workers 4 --out /shared/runs/a
#
# Every host needs this package in the same directory, and the file system /shared. The first host has the rendezvous:
# all hosts must resolve its name. Press Ctrl-C once: the round is finished and saved on all hosts.
set -euo pipefail

read -ra hosts <<< "${HOSTS:?name the hosts, as in HOSTS=\"node0 node1\"}"
port=${PORT:-29500}                       # free on the first host, and closed to the outside
per_host=${PER_HOST:-1}                   # processes on each host: its GPUs
directory=$(printf %q "${DIRECTORY:-$PWD}")  # the package's directory on each host
interface=${INTERFACE:-}                  # network interface, as in INTERFACE=wg0; default: that of the host's name

on() { ssh -o BatchMode=yes "$@"; }

end() {
    for rank in "${!hosts[@]}"; do
        on "${hosts[$rank]}" "kill -TERM \$(cat $directory/.resist-$rank.pid)" < /dev/null || true
    done
}
trap end INT TERM

pids=()
for rank in "${!hosts[@]}"; do
    command=(torchrun --nnodes "${#hosts[@]}" --nproc-per-node "$per_host" --node-rank "$rank"
             --master-addr "${hosts[0]}" --master-port "$port" -m resist train "$@")
    [ -z "$interface" ] || command=(env "GLOO_SOCKET_IFNAME=$interface" "NCCL_SOCKET_IFNAME=$interface" "${command[@]}")
    on "${hosts[$rank]}" "cd $directory && . .venv/bin/activate && echo \$\$ > .resist-$rank.pid && exec $(printf '%q ' "${command[@]}")" \
        < /dev/null &
    pids+=($!)
done

status=0
for pid in "${pids[@]}"; do
    one=0
    wait "$pid" || one=$?
    while kill -0 "$pid" 2> /dev/null; do  # a signal interrupted the wait, and the process has not ended yet
        one=0
        wait "$pid" || one=$?
    done
    [ "$one" -eq 0 ] || status=$one
done
exit "$status"
