#!/usr/bin/env bash
# Shared prefixes, bounded gaps and fair queues beside llama-server: same model, same threads, same client program
# (prefix.mjs), one run, one server at a time. Ends with a table that holds each figure against its bar; exit code 1 when
# one is missed.
#
#   bench/prefix.sh        MODEL=FILE.gguf PEERS=.bench/llama/bin BUILD=build THREADS=2 SCALE=1
#
# SCALE shortens all prompts, for a quick look. About six minutes on two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=${MODEL:-.models/tinyllama-1.1b-chat-iq2_xxs.gguf}
peers=${PEERS:-.bench/llama/bin}
build=${BUILD:-build}
threads=${THREADS:-$(nproc)}
export SCALE=${SCALE:-1}
for need in "$model" "$peers/llama-server" "$build/inference-core"; do
  [[ -e $need ]] || {
    echo "bench: $need is missing: run 'make peers' and 'make' first" >&2
    exit 2
  }
done

tmp=$(mktemp -d)
pid=
stop() {
  [[ -z $pid ]] || kill "$pid" 2>/dev/null || true
  wait 2>/dev/null || true
  pid=
}
trap 'stop; rm -rf "$tmp"' EXIT
many=many-key-0123456789 one=one-key-01234567890
printf '[many]\nkey = %s\n[one]\nkey = %s\n' "$many" "$one" >"$tmp/keys.ini"

ours() { # SLOTS [FLAGS]: starts it; port in $port
  "$build/inference-core" serve --model "$model" --port 0 --threads "$threads" --parallel "$1" --ctx-size 2048 \
    --kv-size 16384 "${@:2}" >"$tmp/ours.log" 2>&1 &
  pid=$!
  until port=$(sed -n 's/.*ready on ws:[^ ]*:\([0-9]*\).*/\1/p' "$tmp/ours.log") && [[ -n $port ]]; do
    kill -0 "$pid" 2>/dev/null || {
      cat "$tmp/ours.log" >&2
      exit 2
    }
    sleep 0.1
  done
}

theirs() { # SLOTS
  port=$((20000 + RANDOM % 20000))
  "$peers/llama-server" -m "$model" --port "$port" -t "$threads" -np "$1" -c 16384 --kv-unified >"$tmp/theirs.log" 2>&1 &
  pid=$!
  until curl -fs "http://127.0.0.1:$port/health" >/dev/null 2>&1; do
    kill -0 "$pid" 2>/dev/null || {
      tail -n 20 "$tmp/theirs.log" >&2
      exit 2
    }
    sleep 0.2
  done
}

ask() { # WHO SCENARIO [KEYS]: figures into $tmp/WHO.SCENARIO
  echo "bench: $2: $1" >&2
  timeout 400 node bench/prefix.mjs "$port" "$2" "${@:3}" >"$tmp/$1.$2" || echo "bench: $2: $1 failed" >&2
}

load=$(cut -d' ' -f1-3 /proc/loadavg)
for who in ours theirs; do
  $who 16
  for scenario in together again beside; do ask "$who" "$scenario"; done
  stop
done
ours 2 --keys "$tmp/keys.ini" --requests 200
ask ours fair "$many" "$one"
stop
theirs 2
ask theirs fair
stop

get() { awk -v k="$2" '$1 == k { print $2 }' "$tmp/$1" 2>/dev/null || true; }
failed=0
row() { # WHAT OURS THEIRS FIGURE BAR ("<= x" or ">= x"; "-": none)
  local verdict=
  if [[ $5 != - ]]; then
    verdict=$(awk -v f="$4" -v op="${5%% *}" -v b="${5##* }" 'BEGIN { ok = f != "" && f == f + 0 && (op == "<=" ? f <= b : f >= b); print ok ? "met" : "MISSED" }')
    [[ $verdict == met ]] || failed=1
  fi
  printf '%-52s %12s %12s %10s %8s %s\n' "$1" "${2:--}" "${3:--}" "${4:--}" "$5" "$verdict"
}
ratio() { awk -v a="${1:-x}" -v b="${2:-x}" 'BEGIN { if (a + 0 > 0 && b + 0 > 0) printf "%.3f", a / b }'; }
both() { row "$1" "$(get "ours.$2" "$3")" "$(get "theirs.$2" "$3")" "$(ratio "$(get "ours.$2" "$3")" "$(get "theirs.$2" "$3")")" "$4"; }

echo "model $(basename "$model"), $threads threads, load before $load, now $(cut -d' ' -f1-3 /proc/loadavg), lengths times $SCALE"
printf '%-52s %12s %12s %10s %8s\n' '' ours llama-server figure bar
both '16 at once, common prefix: tokens/s (ours/theirs)' together tps '>= 2.5'
both '  first token, p50, ms' together ttft_p50 -
both '  first token, p95, ms' together ttft_p95 '<= 0.25'
both '  largest gap, ms' together gap_max '<= 0.1'
row '  prompt tokens that were there (of 16 prompts)' "$(get ours.together cached_tokens)" "$(get theirs.together cached_tokens)" '' -
f=$(get ours.again ttft_first) s=$(get ours.again ttft_second) pf=$(get theirs.again ttft_first) ps=$(get theirs.again ttft_second)
row 'same 1,000 tokens again: first token, ms' "$s" "$ps" '' -
row '  over the first time (ours)' "$(ratio "$s" "$f")" "$(ratio "$ps" "$pf")" "$(ratio "$s" "$f")" '<= 0.05'
row '  KV cells: of the first / of each more' "$(get ours.again cells_first)" "$(get ours.again cells_more_each)" "$(get ours.again cells_more_each)" "<= 60"
a=$(get ours.beside gap_alone) b=$(get ours.beside gap_max_beside) pa=$(get theirs.beside gap_alone) pb=$(get theirs.beside gap_max_beside)
row 'a stream and a prompt of 1,500: largest gap, ms' "$b" "$pb" '' -
row '  over its usual gap (ours)' "$(ratio "$b" "$a")" "$(ratio "$pb" "$pa")" "$(ratio "$b" "$a")" '<= 3'
row '  first token of the long one, ms' "$(get ours.beside ttft_long)" "$(get theirs.beside ttft_long)" '' -
row '100 queued and one: of the 100 begun before it' "$(get ours.fair others_begun_before_it)" "$(get theirs.fair others_begun_before_it)" "$(get ours.fair others_begun_before_it)" '<= 1'
exit "$failed"
