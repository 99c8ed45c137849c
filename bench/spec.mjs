// Guessing ahead on and off, in turns, one server at a time: a text that is quoted back, free text, which may repeat itself, and
// wild text, which does not. Prints tokens a second (medians) and what share of the guesses was right.
//
//   node bench/spec.mjs        MODEL=FILE.gguf BUILD=build THREADS=2 TURNS=5 DRAFT=FILE.gguf (it guesses, not the text itself)
import { spawn } from 'node:child_process';
import os from 'node:os';

const env = process.env, threads = env.THREADS ?? os.cpus().length, turns = Number(env.TURNS ?? 5);
const model = env.MODEL ?? '.models/tinyllama-1.1b-chat-iq2_xxs.gguf';
const code = `def area(width, height):
    if width < 0 or height < 0:
        raise ValueError("a side is negative")
    return width * height

def volume(width, height, depth):
    if width < 0 or height < 0 or depth < 0:
        raise ValueError("a side is negative")
    return width * height * depth

`;
const texts = {
  'quoted back': { prompt: `# file one\n${code}# file one again\n${code}# file one again\n`, temperature: 0 },
  'free text': { prompt: 'The old lighthouse keeper opened the door and', temperature: 0.8, seed: 1 },
  'wild text': { prompt: 'The old lighthouse keeper opened the door and', temperature: 1.5, seed: 2 }, // never says a thing twice
};

async function serve(on) {
  const p = spawn(`${env.BUILD ?? 'build'}/inference-core`, ['serve', '--model', model, '--port', '0', '--threads', String(threads), '--ctx-size', '2048', '--kv-size', '2048', '--parallel', '8', ...(env.DRAFT && on === '1' ? ['--draft', env.DRAFT] : ['--speculate', on])], { stdio: ['ignore', 'ignore', 'pipe'] });
  const port = await new Promise((resolve, reject) => {
    let log = '';
    p.stderr.on('data', (d) => {
      log += d;
      const at = log.match(/ready on ws:\/\/[^"]*:(\d+)/);
      if (at) resolve(at[1]);
    });
    p.on('exit', () => reject(new Error(log)));
  });
  return { port, stop: () => new Promise((resolve) => (p.removeAllListeners('exit'), p.on('exit', resolve), p.kill())) };
}

// Tokens a second between the first and the last.
async function ask(port, params, whole) {
  const r = await fetch(`http://127.0.0.1:${port}/v1/completions`, { method: 'POST', body: JSON.stringify({ ...params, max_tokens: 128, stream: true, ignore_eos: true, stream_options: { include_usage: true } }) });
  let first, last, n = 0, rest = '';
  for await (const part of r.body.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + part).split('\n');
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith('data: {')) continue;
      const o = JSON.parse(line.slice(6));
      n = o.usage?.completion_tokens ?? n;
      if (o.choices?.[0]?.text) first ??= last = performance.now(), (last = performance.now());
    }
  }
  if (whole && n !== 128) throw new Error(`the text ended after ${n} tokens: its speed says little`);
  return ((n - 1) * 1000) / (last - first);
}

async function counted(port) {
  const m = await (await fetch(`http://127.0.0.1:${port}/metrics`)).text();
  return ['drafted', 'accepted'].map((what) => Number(m.match(new RegExp(`^ic_text_${what}_tokens_total (\\d+)`, 'm'))[1]));
}

const median = (v) => v.toSorted((a, b) => a - b)[Math.floor(v.length / 2)];
const speed = {}, ratio = {};
const guesses = {}; // of each text: made, right
for (let i = 0; i < turns; i++) {
  const now = {};
  for (const on of i % 2 ? ['1', '0'] : ['0', '1']) {
    const s = await serve(on);
    await ask(s.port, { prompt: 'warm', temperature: 0 });
    let before = await counted(s.port);
    for (const [name, params] of Object.entries(texts)) {
      now[name + on] = await ask(s.port, params, true);
      (speed[name + on] ??= []).push(now[name + on]);
      if (on === '1') {
        const after = await counted(s.port);
        guesses[name] = (guesses[name] ?? [0, 0]).map((n, i) => n + after[i] - before[i]);
        before = after;
      }
    }
    await s.stop();
  }
  for (const name of Object.keys(texts)) (ratio[name] ??= []).push(now[`${name}1`] / now[`${name}0`]);
}
console.log(`model ${model.split('/').at(-1)}, ${threads} threads, medians of ${turns} turns, load ${os.loadavg().map((x) => x.toFixed(2)).join(' ')}`);
for (const [name, bar] of [['quoted back', 1.5], ['free text', 0.97], ['wild text', 0.97]])
  console.log(`${name}: ${median(speed[`${name}1`]).toFixed(2)} tokens/s with guesses, ${median(speed[`${name}0`]).toFixed(2)} without: ${median(ratio[name]).toFixed(3)} (bar ${bar}) ${median(ratio[name]) >= bar ? 'met' : 'MISSED'}; ${guesses[name][1]} of ${guesses[name][0]} guesses were right`);
