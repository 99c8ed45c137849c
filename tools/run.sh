#!/usr/bin/env bash
# `make run`: dependencies, build, model, server. On a terminal a first answer is streamed and the
# addresses are shown as soon as the server is ready; elsewhere there is only the server.
#   MODEL=FILE.gguf LAW=CHECKPOINT PORT=3000 ARGS="more options of serve" tools/run.sh
set -euo pipefail
model=${MODEL:+$(realpath -m "$MODEL")} # relative to where the user stands
cd "$(dirname "${BASH_SOURCE[0]}")/.."
port=${PORT:-3000}
law=${LAW:-demo/laws/ginzburg-landau}
read -ra args <<<"${ARGS:-}"
server=build/inference-core
question="Write three tips for learning to cook."
beginning="Once upon a time"

if [[ -n $model && ! -f $model ]]; then
  echo "run: no such model file: $model" >&2
  exit 1
fi
tools/build.sh release inference-core
[[ -n $model ]] || model=$(tools/fetch-model.sh)

port_open() { (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; }

# Runs beside the server and ends with it.
greet() {
  until tools/ready.sh "$port"; do
    kill -0 $$ 2>/dev/null || return 0
    sleep 0.1
  done
  printf '\n> %s\n' "$question"
  if ! "$server" ask --port "$port" --max-tokens 96 "$question"; then
    # Stopped meanwhile; or a model that knows no chat, only text that goes on.
    kill -0 $$ 2>/dev/null || return 0
    printf '\n> %s\n' "$beginning"
    "$server" ask --port "$port" --max-tokens 96 --raw "$beginning" || true
  fi
  cat <<TEXT

Ready; Ctrl-C stops. Open or connect to:
  console    http://127.0.0.1:$port/
  WebSocket  ws://127.0.0.1:$port/
  OpenAI     http://127.0.0.1:$port/v1
  health     http://127.0.0.1:$port/health
  metrics    http://127.0.0.1:$port/metrics

TEXT
}

# The server takes this process's place ($$), so signals and its exit code need no passing on. The
# greeter is nobody's child here (the server would have to reap it). With the port taken already the
# greeter would talk to a stranger; the server alone then says what is wrong.
if [[ -t 1 ]] && ! port_open; then
  (greet &)
fi
exec "$server" serve --model "$model" --law "$law" --port "$port" "${args[@]}"
