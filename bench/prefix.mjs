// The client of bench/prefix.sh: asks a server through /v1/completions (SSE), which ours and llama-server both speak, and
// prints figures, "name value" a line.
//
//   node bench/prefix.mjs PORT together|again|beside|fair [KEY_MANY KEY_ONE]     SCALE=1: of all lengths
import http from 'node:http';

const [port, scenario, keyMany, keyOne] = process.argv.slice(2);
const scale = Number(process.env.SCALE ?? 1);
const agent = new http.Agent({ keepAlive: false, maxSockets: Infinity });
// Common words, a token each in the usual vocabularies.
const words = 'the dog house tree water man woman day night road car book hand eye city door king queen ship bird fish stone fire wind rain snow sun moon star field river hill game song word name friend child mother father'.split(' ');

// n tokens or so, the same for the same seed.
function text(n, seed) {
  let s = seed * 2654435761 + 1, out = '';
  for (let i = 0; i < Math.round(n * scale); i++) {
    s = (s * 1103515245 + 12345) % 2147483648;
    out += ` ${words[Math.floor(s / 65536) % words.length]}`;
  }
  return out;
}

// {sent, at: [times of chunks with text], usage, done, hangUp()}; times in ms.
function ask(prompt, maxTokens, key, onFirst) {
  const r = { sent: performance.now(), at: [], usage: null };
  r.done = new Promise((resolve, reject) => {
    const body = JSON.stringify({ prompt, max_tokens: Math.max(2, Math.round(maxTokens)), temperature: 0, stream: true, stream_options: { include_usage: true }, ignore_eos: true });
    const req = http.request({ port, agent, path: '/v1/completions', method: 'POST', headers: { 'Content-Type': 'application/json', ...(key ? { Authorization: `Bearer ${key}` } : {}) } }, (res) => {
      let rest = '';
      res.setEncoding('utf8');
      res.on('data', (chunk) => {
        const lines = (rest + chunk).split('\n');
        rest = lines.pop();
        for (const line of lines) {
          if (!line.startsWith('data: {')) continue;
          const o = JSON.parse(line.slice(6));
          if (o.error) reject(new Error(JSON.stringify(o.error)));
          if (o.choices?.[0]?.text) {
            r.at.push(performance.now());
            if (r.at.length === 1) onFirst?.();
          }
          r.usage = o.usage ?? r.usage;
        }
      });
      res.on('end', () => (res.statusCode === 200 ? resolve(r) : reject(new Error(`HTTP ${res.statusCode}: ${rest}`))));
      res.on('error', () => resolve(r));
    });
    req.on('error', () => resolve(r)); // hung up, by us
    req.end(body);
    r.hangUp = () => req.destroy();
  });
  return r;
}

const gaps = (r) => r.at.slice(1).map((t, i) => t - r.at[i]);
const quantile = (v, q) => [...v].sort((a, b) => a - b)[Math.min(v.length - 1, Math.floor(q * v.length))];
const print = (name, v) => console.log(`${name} ${Number(v).toFixed(3)}`);

async function cells() { // that ours holds, in the cache or set aside in host memory; nothing where there is no such figure
  const t = await fetch(`http://127.0.0.1:${port}/metrics`, { headers: keyMany ? { Authorization: `Bearer ${keyMany}` } : {} }).then((r) => r.text(), () => '');
  const [used, away, back] = ['kv_tokens_used', 'kv_spilled_tokens_total', 'kv_restored_tokens_total'].map((name) =>
    Number(t.match(new RegExp(`^ic_text_${name} (\\d+)`, 'm'))?.[1] ?? NaN));
  return used + away - back;
}

const scenarios = {
  // 16 clients at once with a common prefix of 540 tokens and questions of 45; 48 tokens out
  async together() {
    const prefix = text(540, 1), t0 = performance.now();
    const all = await Promise.all(Array.from({ length: 16 }, (_, i) => ask(prefix + text(45, 100 + i), 48).done));
    const end = Math.max(...all.map((r) => r.at.at(-1))), ttft = all.map((r) => r.at[0] - r.sent);
    print('prompt_tokens', all[0].usage?.prompt_tokens ?? NaN);
    print('cached_tokens', all.reduce((n, r) => n + (r.usage?.prompt_tokens_details?.cached_tokens ?? 0), 0));
    print('tps', (all.reduce((n, r) => n + (r.usage?.completion_tokens ?? r.at.length), 0) * 1000) / (end - t0));
    print('ttft_p50', quantile(ttft, 0.5));
    print('ttft_p95', quantile(ttft, 0.95));
    print('gap_max', Math.max(...all.flatMap(gaps)));
  },
  // sessions that begin with the same 1,000 tokens, one after the other
  async again() {
    const prefix = text(1000, 2), used = [];
    let first, last;
    for (let i = 0; i < 5; i++) {
      const r = await ask(prefix + text(20, 200 + i), 8).done;
      first ??= r.at[0] - r.sent;
      last = r.at[0] - r.sent;
      if (i === 1) print('ttft_second', last);
      used.push(await cells());
    }
    print('ttft_first', first);
    print('ttft_fifth', last);
    print('cells_first', used[0]);
    print('cells_more_each', (used[4] - used[0]) / 4);
  },
  // one stream; then a prompt of 1,500 tokens arrives
  async beside() {
    const alone = await ask(text(20, 3), 60).done;
    let late;
    const stream = ask(text(20, 4), 400, undefined, () => setTimeout(() => (late = ask(text(1500, 5), 2)), 1000 * scale));
    await new Promise((r) => setTimeout(r, 500));
    while (!late) await new Promise((r) => setTimeout(r, 20));
    await late.done;
    stream.hangUp();
    await stream.done;
    const from = stream.at.findLastIndex((t) => t < late.sent), until = stream.at.findIndex((t) => t > late.at[0]);
    const during = stream.at.slice(Math.max(from, 0), until < 0 ? undefined : until + 1);
    print('gap_alone', quantile(gaps(alone), 0.5));
    print('gap_max_beside', Math.max(...gaps({ at: during })));
    print('gaps_beside', during.length - 1);
    print('ttft_long', late.at[0] - late.sent);
  },
  // a client with 100 requests, then one with a single
  async fair() {
    let begun = 0, before;
    const many = Array.from({ length: 100 }, (_, i) => ask(text(30, 300 + i), 16, keyMany, () => begun++));
    while (begun < 4) await new Promise((r) => setTimeout(r, 5));
    before = begun;
    const single = ask(text(30, 999), 16, keyOne, () => (before = begun - before));
    await single.done;
    print('others_begun_before_it', before);
    print('ttft_single', single.at[0] - single.sent);
    many.forEach((r) => r.hangUp());
    await Promise.all(many.map((r) => r.done));
  },
};
await scenarios[scenario]();
