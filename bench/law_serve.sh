#!/usr/bin/env bash
# 100 clients, each with a simulation of its own at grid 64 (UNET_UNITARY d4 b16), all running as fast as they are let:
# frames for all, p99 of the frame interval at most 1.5 times its mean; memory of a further simulation = its state.
#   bench/law_serve.sh BUILD_FOLDER [CLIENTS] [SECONDS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=${1:?usage: bench/law_serve.sh BUILD_FOLDER [CLIENTS] [SECONDS]}
clients=${2:-100} seconds=${3:-20}
log=$(mktemp)
"$build/inference-core" serve --law tests/golden/unet_unitary-d4-b16 --port 0 2>"$log" &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; rm -f "$log"' EXIT
port=
for _ in {1..200}; do
  port=$(sed -nE 's#.*ready on ws://[^:]*:([0-9]+).*#\1#p' "$log")
  [[ -z $port ]] || break
  kill -0 "$server" || { cat "$log" >&2; exit 1; }
  sleep 0.1
done
out=$("$build/bench/law-serve-bench" "$port" "$clients" 64 "$seconds")
echo "== Law M served: $clients clients, a simulation each, grid 64, d4 b16; $(nproc) cores, load $(cut -d' ' -f1 /proc/loadavg)"
echo "$out"
awk '
  { v[$1] = $2 }
  END {
    ok = v["p99_over_mean"] <= 1.5 && v["frames_least"] > 0
    printf "%-52s %8.3f  %-6s %s\n", "p99 frame interval over mean", v["p99_over_mean"], "<= 1.5", ok ? "PASS" : "below"
    printf "%-52s %8.0f\n", "frames of the client with the fewest", v["frames_least"]
    printf "%-52s %8.0f  of which state %.0f\n", "bytes per further simulation with its connection", v["rss_bytes_per_sim_and_connection"], v["state_bytes_per_sim"]
    exit !ok
  }' <<<"$out"
