#!/usr/bin/env bash
# Two Ray nodes on this machine, to try a cluster without one: infra/ray/two-nodes.sh COMMAND [ARG ...]
# Runs COMMAND, stops the two nodes it started and no others, and ends with COMMAND's status. COMMAND may be a driver
# (RAY_ADDRESS is set) or `ray job submit` (RAY_API_SERVER_ADDRESS is set).
# RAY_PORT (6399) is the head's port, DASHBOARD_PORT (8265) that of its dashboard, CPUS_PER_NODE (1) the CPUs that each
# node offers.
set -euo pipefail

[ $# -gt 0 ] || { echo "usage: $0 COMMAND [ARG ...]" >&2; exit 2; }
port=${RAY_PORT:-6399}
cpus=${CPUS_PER_NODE:-1}
dashboard=${DASHBOARD_PORT:-8265}
address="127.0.0.1:$port"
listens() { (: < "/dev/tcp/127.0.0.1/$1") 2> /dev/null; }
for name in RAY_PORT="$port" DASHBOARD_PORT="$dashboard"; do
    if listens "${name#*=}"; then
        echo "$0: port ${name#*=} is taken; name another: ${name%=*}=... $0 ..." >&2
        exit 1
    fi
done

# Everything of this cluster lies in a folder of its own. The path is short, as those of Unix sockets must be.
folder=$(mktemp -d /tmp/diffprune-ray-XXXXXX)
# Recent Ray wants a token from whoever connects. This one lives as long as the cluster, and in no file.
RAY_AUTH_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
unset RAY_ADDRESS RAY_API_SERVER_ADDRESS

nodes=()
stop() {
    trap - EXIT INT TERM
    # `ray start --block` ends its node's processes on SIGTERM. `ray stop` would end those of every cluster here.
    for ((i = ${#nodes[@]} - 1; i >= 0; i--)); do
        kill "${nodes[i]}" 2> /dev/null || true
        wait "${nodes[i]}" 2> /dev/null || true
    done
    rm -rf "$folder"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Worker ports are left to the system: two nodes on one machine would fight over Ray's usual range.
start() {
    ray start "$@" --num-cpus="$cpus" --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 \
        --block > "$folder/node-${#nodes[@]}.log" 2>&1 &
    nodes+=($!)
}

# Wait for a condition while node number $1 lives; a node that dies ends the script at once, with its last words.
wait_for() {
    local node=$1
    shift
    until "$@"; do
        if ! kill -0 "${nodes[node]}" 2> /dev/null; then
            echo "$0: node $node did not start:" >&2
            tail -n 20 "$folder/node-$node.log" >&2
            exit 1
        fi
        sleep 0.3
    done
}
joined() { grep -q "Ray runtime started" "$folder/node-1.log"; }

start --head --node-ip-address=127.0.0.1 --port="$port" --temp-dir="$folder/ray" \
    --dashboard-host=127.0.0.1 --dashboard-port="$dashboard"
wait_for 0 listens "$port"
start --address="$address" --node-ip-address=127.0.0.1
wait_for 1 joined
wait_for 0 listens "$dashboard"

RAY_ADDRESS=$address RAY_API_SERVER_ADDRESS="http://127.0.0.1:$dashboard" "$@"
