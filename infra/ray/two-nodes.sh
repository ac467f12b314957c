#!/usr/bin/env bash
# Two Ray nodes on this machine, to try a cluster without one: infra/ray/two-nodes.sh COMMAND [ARG ...]
# Runs COMMAND with RAY_ADDRESS set, then stops the two nodes it started, and no others.
set -euo pipefail

[ $# -gt 0 ] || { echo "usage: $0 COMMAND [ARG ...]" >&2; exit 2; }
port=${RAY_PORT:-6399}
cpus=${CPUS_PER_NODE:-1}
export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token
ray get-auth-token --generate > /dev/null

nodes=()
stop() {
    for node in "${nodes[@]}"; do kill "$node" 2> /dev/null || true; done
    wait 2> /dev/null || true
}
trap stop EXIT

ray start --head --node-ip-address=127.0.0.1 --port="$port" --num-cpus="$cpus" --include-dashboard=false \
    --block > /dev/null &
nodes+=($!)
for _ in $(seq 60); do
    if ray health-check --address "127.0.0.1:$port" > /dev/null 2>&1; then break; fi
    sleep 1
done
ray start --address="127.0.0.1:$port" --num-cpus="$cpus" --block > /dev/null &
nodes+=($!)

RAY_ADDRESS="127.0.0.1:$port" "$@"
