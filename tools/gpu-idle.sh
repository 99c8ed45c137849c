#!/bin/sh
# Idle and failing text models on a GPU: that memory and CUDA context go when the model is unloaded, that both come back with
# the same text, that a decode which hangs or finds no memory harms nobody else, and that a law on the same card takes its
# memory from what the model leaves, or computes on the CPU.
#
#   tools/gpu-idle.sh prepare    here: gathers the binary (BUILD, default build), its libraries, CUDA_XZ and LAW_CUDA in .gpu/idle
#   tools/gpu-idle.sh            on the machine with the GPU
#
# CUDA_XZ: ggml's CUDA back end for that GPU, packed with xz. LAW_CUDA: libic-law-cuda.so (tools/gpu-law.sh build); without it
# the part with the law is left out. Needs python3 and CUDA's cudart and cublas there.
set -eu
cd "$(dirname "$0")/.."
dir=$PWD/.gpu/idle model=$PWD/demo/models/stories260K-f32.gguf
if [ "${1-}" = prepare ]; then
    mkdir -p "$dir/lib"
    cp "${BUILD:-build}/inference-core" "$dir/"
    strip "$dir/inference-core"
    for so in llama.v0.5.0 ggml.v0.5.0 ggml-base ggml-cpu-x64 ggml-cpu-sapphirerapids; do cp -L ".deps/llama/lib/lib$so.so" "$dir/lib/"; done
    ldd "$dir/inference-core" | awk '/websockets|jansson|inih|libssl|libcrypto|libcap|libz\./ {print $3}' |
        while read -r so; do cp -L "$so" "$dir/lib/"; done
    cp "$CUDA_XZ" "$dir/libggml-cuda.so.xz"
    [ -z "${LAW_CUDA-}" ] || xz -1 -c "$LAW_CUDA" >"$dir/libic-law-cuda.so.xz"
    exit
fi
cd "$dir"
[ ! -e libic-law-cuda.so.xz ] || xz -dc libic-law-cuda.so.xz >libic-law-cuda.so
[ -e lib/libggml-cuda.so ] || xz -dc libggml-cuda*.xz >lib/libggml-cuda.so
ln -sf libggml-base.so lib/libggml-base.so.0
cuda=$(find / -name 'libcublas.so.13' -o -name 'libcudart.so.13' 2>/dev/null | sed 's|/[^/]*$||' | sort -u | tr '\n' ':')
export LD_LIBRARY_PATH="$PWD/lib:$cuda" MODEL="$model"
exec python3 - <<'PY'
import json, os, re, signal, subprocess, sys, threading, time, urllib.request

BIN = ['./inference-core', 'serve', '--port', '0', '--model', os.environ['MODEL'], '--backends', 'lib']
failed = []


def check(what, good, note=''):
    print(('ok    ' if good else 'FAIL  ') + what, note, flush=True)
    if not good:
        failed.append(what)


class Server:
    def __init__(self, *args, **env):
        self.p = subprocess.Popen(BIN + list(args), stderr=subprocess.PIPE, text=True, env=dict(os.environ, **env))
        self.log, self.port = [], None
        threading.Thread(target=self.read, daemon=True).start()
        for _ in range(600):
            if self.port or self.p.poll() is not None:
                break
            time.sleep(0.1)
        if not self.port:
            sys.exit('no server:\n' + '\n'.join(self.log))

    def read(self):
        for line in self.p.stderr:
            self.log.append(line.rstrip())
            at = re.search(r'ready on ws://.*:(\d+)', line)
            if at:
                self.port = int(at[1])

    def http(self, path, body=None):
        req = urllib.request.Request(f'http://127.0.0.1:{self.port}{path}', json.dumps(body).encode() if body else None)
        return urllib.request.urlopen(req, timeout=120).read().decode()

    def text(self, n=40):
        r = json.loads(self.http('/v1/completions', {'prompt': 'Once upon a time', 'max_tokens': n, 'temperature': 0}))
        return r['choices'][0]['text']

    def metric(self, name):
        return float(re.search(re.escape(name) + r' (\S+)', self.http('/metrics'))[1])

    def until(self, name, value, seconds=60):
        for _ in range(seconds * 10):
            if self.metric(name) == value:
                return True
            time.sleep(0.1)
        return False

    def stop(self):
        self.p.send_signal(signal.SIGTERM)
        return self.p.wait(60)


def context():
    """MiB in use on the card."""
    used = subprocess.run(['nvidia-smi', '--query-gpu=memory.used', '--format=csv,noheader,nounits'], capture_output=True, text=True)
    return float(used.stdout.split()[0])


print(subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True).stdout.strip())
before = context()
want = Server('--gpu-layers', '0')
cpu = want.text()
want.stop()

s = Server('--idle-unload', '3')
print('\n'.join(x for x in s.log if '"memory"' in x or 'layers on the GPU' in x))
first = s.text()
check('same text as on the CPU', first == cpu)
with_model = context()
for i in range(3):
    check(f'unloaded, round {i + 1}', s.until('ic_engine_unloaded{engine="text"}', 1))
    time.sleep(1)
    away = context()
    print(f'      card: {before:.0f} MiB before, {with_model:.0f} with the model, {away:.0f} while it is away')
    check('the context is gone', away <= before + 20)
    t = time.time()
    again = s.text()
    print(f'      answer after {time.time() - t:.2f} s, {s.metric("ic_engine_wake_seconds{engine=" + chr(34) + "text" + chr(34) + "}"):.2f} of them to load')
    check('same text', again == first)
check('ends with 0', s.stop() == 0)

s = Server('--stall-seconds', '1', IC_FAULT='text-hang:20')
try:
    s.text()
    check('who was in the decode that hung fails', False)
except urllib.error.HTTPError as e:
    check('who was in the decode that hung fails', e.code == 500, e.read().decode()[:80])
check('the engine built anew answers', s.text() == first)
check('once', s.metric('ic_engine_rebuilt_total{engine="text"}') == 1)
check('ends with 0', s.stop() == 0)

s = Server(IC_FAULT='text-oom:20')
try:
    s.text()
    check('who found no memory fails', False)
except urllib.error.HTTPError as e:
    check('who found no memory fails', e.code >= 500, e.read().decode()[:80])
check('the next is served', s.text() == first)
check('ends with 0', s.stop() == 0)
# ---- both engines on one card -----------------------------------------------------------------------------------
if os.path.exists('libic-law-cuda.so'):
    import array, math
    law = os.path.join(os.path.dirname(os.environ['MODEL']), '../laws/ginzburg-landau')
    psi = array.array('f', (math.sin(i * 1.7) * 0.6 for i in range(64 * 64 * 4))).tobytes()

    def steps(server, n):
        state = psi
        for _ in range(n):
            req = urllib.request.Request(f'http://127.0.0.1:{server.port}/predict?grid=64', state, {'content-type': 'application/octet-stream'})
            state = urllib.request.urlopen(req, timeout=120).read()
        return array.array('f', state)

    def off(a, b):
        return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b)) / sum(y * y for y in b))

    s = Server('--law', law)
    want = steps(s, 3)
    s.stop()
    env = {'IC_LAW_PLUGIN': os.path.abspath('libic-law-cuda.so')}
    s = Server('--law', law, '--law-backend', 'cuda-fp16', **env)
    print('\n'.join(x for x in s.log if '"law"' in x or 'other engines' in x))
    got = steps(s, 3)
    print(f'      three steps in fp16 off the CPU\'s by {off(got, want):.2e}')
    check('a law on the GPU beside a model on it', off(got, want) < 0.02 and s.text() == first)
    check('ends with 0', s.stop() == 0)
    s = Server('--law', law, '--law-backend', 'cuda-fp16', '--vram-margin', '200GiB', **env)
    got = steps(s, 3)
    check('no room in the ledger: on the CPU, the very same', list(got) == list(want) and s.text() == cpu)
    print('\n'.join(x for x in s.log if 'runs on the CPU' in x or 'decided' in x))
    check('ends with 0', s.stop() == 0)
    s = Server('--law', law, '--law-backend', 'cuda-fp16', IC_LAW_CUDA_FAULT='lost@1', **env)
    got = steps(s, 3)
    check('a device that is lost: on the CPU from there', off(got, want) < 0.02, f'{off(got, want):.2e}')
    print('\n'.join(x for x in s.log if 'move to the CPU' in x))
    check('ends with 0', s.stop() == 0)
print('failed: ' + ', '.join(failed) if failed else 'all well')
sys.exit(bool(failed))
PY
