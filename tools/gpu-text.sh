#!/bin/sh
# Text on a GPU: a model of a billion parameters (random weights: for speed only) beside llama-server, and layers split between
# GPU and CPU under a cap of memory.
#
#   tools/gpu-text.sh prepare    here: what gpu-idle.sh gathers (BUILD, CUDA_XZ), llama-server (PEERS) and text-bench, in .gpu/idle
#   tools/gpu-text.sh            on the machine with the GPU; TURNS (default 3), CLIENTS (default "1 8 32 64")
#
# One server at a time, started anew for each measurement, in turns; the same client program, flags and prompts: a common
# beginning of about 540 tokens, a question of about 45, 128 tokens out, greedy. Medians over the turns.
set -eu
cd "$(dirname "$0")/.."
dir=$PWD/.gpu/idle
if [ "${1-}" = prepare ]; then
    LAW_CUDA='' tools/gpu-idle.sh prepare
    rm -f "$dir/libic-law-cuda.so.xz"
    xz -6 -c "${PEERS:-.bench/llama/bin}/llama-server" >"$dir/llama-server.xz"
    cp "${BUILD:-build}/bench/text-bench" "$dir/"
    strip "$dir/text-bench"
    exit
fi
SMALL=$PWD/demo/models/stories260K-f32.gguf MAKE=$PWD/tools/random-model.py
export SMALL MAKE
cd "$dir"
[ -e lib/libggml-cuda.so ] || xz -dc libggml-cuda*.xz >lib/libggml-cuda.so
[ -e lib/llama-server ] || xz -dc llama-server.xz >lib/llama-server
chmod +x lib/llama-server
ln -sf libggml-base.so lib/libggml-base.so.0
cuda=$(find / -name 'libcublas.so.13' -o -name 'libcudart.so.13' 2>/dev/null | sed 's|/[^/]*$||' | sort -u | tr '\n' ':')
export LD_LIBRARY_PATH="$PWD/lib:$cuda"
exec python3 - <<'PY'
import json, os, re, statistics, subprocess, sys, time, urllib.request

PORT, MODEL, SMALL = 3101, 'random-1b.gguf', os.environ['SMALL']
TURNS, CLIENTS = int(os.environ.get('TURNS', 3)), [int(n) for n in os.environ.get('CLIENTS', '1 8 32 64').split()]
OURS = ['./inference-core', 'serve', '--port', str(PORT), '--backends', 'lib']
failed = []


def check(what, good, note=''):
    print(('ok    ' if good else 'FAIL  ') + what, note, flush=True)
    if not good:
        failed.append(what)


class Server:
    def __init__(self, name, command):
        self.log = open(name + '.log', 'w+')
        self.p = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        for _ in range(600):
            try:
                urllib.request.urlopen(f'http://127.0.0.1:{PORT}/{"health" if "llama-server" in command[0] else "ready"}', timeout=5)
                return
            except OSError:
                if self.p.poll() is not None:
                    break
                time.sleep(0.1)
        sys.exit('no server:\n' + self.said()[-3000:])

    def said(self):
        self.log.seek(0)
        return self.log.read()

    def text(self, n=40):
        body = json.dumps({'prompt': 'Once upon a time', 'max_tokens': n, 'temperature': 0}).encode()
        return json.loads(urllib.request.urlopen(f'http://127.0.0.1:{PORT}/v1/completions', body, timeout=120).read())['choices'][0]['text']

    def stop(self):
        self.p.terminate()
        return self.p.wait(60)


def used():
    return float(subprocess.run(['nvidia-smi', '--query-gpu=memory.used', '--format=csv,noheader,nounits'], capture_output=True, text=True).stdout.split()[0])


def layers(log):
    return [int(x) for x in re.search(r'decided: (\d+) of (\d+) layers', log).groups()]


def measure(flags, clients):
    r = subprocess.run(['./text-bench', 'stream', '--port', str(PORT), '--tokens', '4', *flags], capture_output=True, text=True, timeout=60)
    r = subprocess.run(['./text-bench', 'stream', '--port', str(PORT), '--streams', str(clients), '--tokens', '128', '--prefix', '135', '--question', '11', *flags],
                       capture_output=True, text=True, timeout=120)
    if r.returncode:
        return None
    return {k: float(v) for k, v in (line.split() for line in r.stdout.splitlines())}


print(subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True).stdout.strip())
subprocess.run(['python3', os.environ['MAKE'], SMALL, MODEL], check=True)
print(f'model: {os.path.getsize(MODEL) / 1e6:.0f} MB of f16')

s = Server('cpu', OURS + ['--model', SMALL, '--gpu-layers', '0'])
want = s.text()
s.stop()
s = Server('split', OURS + ['--model', SMALL, '--vram', '235MiB', '--vram-margin', '0'])
on, of = layers(s.said())
check(f'a cap of 235 MiB: {on} of {of} layers on the GPU, the text is the CPU\'s', 0 < on < of and s.text() == want)
check('ends with 0', s.stop() == 0)
before = used()
s = Server('capped', OURS + ['--model', MODEL, '--vram', '1500MiB', '--parallel', '8'])
on, of = layers(s.said())
s.text(8)
check(f'a cap of 1500 MiB, the margin in it: {on} of {of} layers of the large one', 0 < on < of)
check(f'the card: {used() - before:.0f} MiB in use', used() - before <= 1500)
check('ends with 0', s.stop() == 0)

peers = {'ours': OURS + ['--model', MODEL, '--ctx-size', '2048', '--kv-size', '65536', '--parallel', '64', '--gpu-layers', '-1'],
         'llama-server': ['lib/llama-server', '-m', MODEL, '--port', str(PORT), '-ngl', '99', '-c', '65536', '-np', '64', '-kvu']}
got = {}
for turn in range(TURNS):
    for clients in CLIENTS:
        for who in sorted(peers, reverse=bool(turn % 2)):
            s = Server(who, peers[who])
            m = measure([] if who == 'ours' else ['--sse'], clients)
            s.stop()
            if m:
                got.setdefault((who, clients), []).append(m)
            else:
                check(f'{who} with {clients} clients', False, s.said()[-600:])
print(f'\n{"clients":>7} {"":12} {"tokens/s":>9} {"of peer":>8} {"TTFT p50":>9} {"p99":>8} {"gap p50":>8} {"p99":>8} {"largest":>8} ms; medians of {TURNS}')
for clients in CLIENTS:
    row = {who: {k: statistics.median(m[k] for m in got[who, clients]) for k in got[who, clients][0]} for who in peers if (who, clients) in got}
    for who, m in row.items():
        ratio = f'{m["all_tps"] / row["llama-server"]["all_tps"]:.2f}' if who == 'ours' and len(row) == 2 else ''
        print(f'{clients:7} {who:12} {m["all_tps"]:9.0f} {ratio:>8} {m["ttft_ms_p50"]:9.1f} {m["ttft_ms_p99"]:8.1f} {m["gap_ms_p50"]:8.2f} {m["gap_ms_p99"]:8.2f} {m["gap_ms_max"]:8.1f}')
    if len(row) == 2:
        check(f'{clients} clients: {"ahead of" if clients > 1 else "not behind"} llama-server', row['ours']['all_tps'] > row['llama-server']['all_tps'] * (1 if clients > 1 else 0.97))
print('failed: ' + ', '.join(failed) if failed else 'all well')
sys.exit(bool(failed))
PY
