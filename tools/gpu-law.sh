#!/bin/sh
# The CUDA back end of Law M on a machine with a GPU: builds it, checks it, times it beside PyTorch.
#
#   tools/gpu-law.sh [build] [check] [sanitize] [serve] [server] [time] [torch]     (no word: all of them)
#
# GPU_LAW_DIR (default .gpu): where law-gpu, libic-law-cuda.so and shared libraries lie or go. With what another
# machine of the same processor built there, leave `build` out: only a driver is needed then.
# check: golden vectors and random laws, every precision, memory poisoned with NaN. sanitize: compute-sanitizer's
# memcheck and racecheck on a small law. serve: steps and frames as a server makes them. server: a hundred clients of a real
# one; then its device is lost under them, and they go on. time: graphs on and off. Exits with 1 where a check fails.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
dir=${GPU_LAW_DIR:-$root/.gpu}
cases64=${CASES:-"--case 64,1 --case 64,16 --case 64,64 --case 128,1 --case 128,16 --case 256,1 --case 256,16"}
[ $# -gt 0 ] || set -- build check sanitize serve server time torch
mkdir -p "$dir"
export LD_LIBRARY_PATH="$dir${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" IC_LAW_PLUGIN="$dir/libic-law-cuda.so"
status=0
for word in "$@"; do
    case $word in
    build)
        cmake -S "$root" -B "$dir/build" -G Ninja -DIC_CUDA=ON -DIC_CUDA_ARCHS="${ARCHS:-90}" -DBUILD_TESTING=OFF >"$dir/cmake.log"
        nice -n 5 ninja -C "$dir/build" -j "${JOBS:-2}" law-gpu ic_law_cuda inference-core law-serve-bench >"$dir/ninja.log"
        cp "$dir/build/law-gpu" "$dir/build/libic-law-cuda.so" "$dir/build/inference-core" "$dir/build/bench/law-serve-bench" "$dir/"
        strip "$dir/libic-law-cuda.so"
        # what they link and a bare machine may lack
        ldd "$dir/inference-core" | awk '/jansson|llama|ggml|websockets|inih|libssl|libcrypto|libcap|libz\./ {print $3}' |
            while read -r so; do cp -L "$so" "$dir/"; done
        ;;
    check) # and with what only large batches run, and with what only small ones do
        IC_LAW_CUDA_POISON=1 "$dir/law-gpu" check "$root" || status=1
        for fold in 1 2; do
            IC_LAW_CUDA_POISON=1 IC_LAW_CUDA_FOLD=$fold "$dir/law-gpu" check "$root" || status=1
        done
        for how in SHARE=0 SHARE=1 CUT=1 CUT=3 CUT=5; do
            env IC_LAW_CUDA_POISON=1 IC_LAW_CUDA_TALL=1 IC_LAW_CUDA_FOLD=1 IC_LAW_CUDA_$how "$dir/law-gpu" tall || status=1
        done
        ;;
    sanitize)
        if command -v compute-sanitizer >/dev/null; then
            for tool in memcheck racecheck; do
                compute-sanitizer --tool $tool --error-exitcode 9 "$dir/law-gpu" small || status=1
            done
        else
            echo "skipped: no compute-sanitizer"
        fi
        ;;
    serve) "$dir/law-gpu" serve 64,64 && "$dir/law-gpu" serve 64,1 || status=1 ;;
    server)
        for fault in none lost@300; do
            IC_LAW_CUDA_FAULT=$fault "$dir/inference-core" serve --law "$root/demo/laws/ginzburg-landau" --law-backend cuda \
                --law-max-batch 64 --law-threads 4 --precision fp16 --port 0 2>"$dir/server.log" &
            server=$!
            for _ in $(seq 100); do
                port=$(sed -nE 's#.*ready on ws://[^:]*:([0-9]+).*#\1#p' "$dir/server.log")
                [ -z "$port" ] || break
                sleep 0.1
            done
            echo "== 100 clients of a server, grid 64, fault: $fault"
            "$dir/law-serve-bench" "$port" 100 64 "${SERVER_S:-5}" || status=1
            kill "$server" && wait "$server" || status=1
            grep '"module":"law"' "$dir/server.log" | sed 's/.*"msg"://' | sort | uniq -c
            [ $fault = none ] || grep -q 'the simulations move to the CPU' "$dir/server.log" || status=1
        done
        ;;
    time)
        # shellcheck disable=SC2086
        "$dir/law-gpu" time $cases64
        # shellcheck disable=SC2086
        "$dir/law-gpu" time --precision nf4 $cases64
        "$dir/law-gpu" time --d 16 --b 64 --case 256,1 --case 256,16
        "$dir/law-gpu" time --backend cuda-bf16 --case 64,1 --case 64,64
        ;;
    torch)
        # shellcheck disable=SC2086
        python3 "$root/bench/law_gpu_torch.py" $cases64
        python3 "$root/bench/law_gpu_torch.py" --d 16 --b 64 --case 256,1 --case 256,16
        python3 "$root/bench/law_gpu_torch.py" --eager --case 64,1 --case 64,16
        ;;
    *) echo "what is $word? see the top of $0" >&2 && exit 2 ;;
    esac
done
exit $status
