#!/usr/bin/env node
// Mixed clients of both engines against a server of its own, for minutes or days; every answer is checked, the server's
// memory, files, threads and token gaps are watched, and a verdict is given. See docs/operations.md, "The soak".
import { spawn } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { Worker } from 'node:worker_threads';
import { PROMPTS, references, scenarios } from './clients.mjs';
import { mean, quantile, slope, svg } from './stats.mjs';
import { Peer, ROOT, fetchText, sleep } from './wire.mjs';

const USAGE = `usage: tools/soak/soak.mjs [--minutes N] [--out DIR] [--load X] [--only KIND,...] [--seed N]
                           [--idle-seconds N] [--bin FILE] [--settle-seconds N]
                           [--fault answer|fds|memory|death] [-- OPTIONS OF THE SERVER]
  --minutes N        of load (default 30, at most a week)
  --out DIR          for samples.csv, soak.svg and the server's log (default: a new folder in the temporary one)
  --load X           1 (default): what keeps two cores about half busy
  --only KIND,...    these visits alone, to find who it is; the verdict lists all kinds
  --idle-seconds N   watched before the load begins (default 10)
  --settle-seconds N that the server has in the end to close what its clients have left (default 30)
  --fault WHAT       shows that the check can fail: a reference answer is changed, a client keeps ten connections
                     open, simulations are left behind, or the server is killed`;

// ---- the bounds of the verdict ----
const SLOPE_LIMIT = 1; // MiB/h of anonymous memory after the warm-up
const SHORT_GROWTH_LIMIT = 8; // MiB, from the first to the last quarter after the warm-up: all that a short run can tell
const GAP_LIMIT = 0.25; // by which p99 of the last five minutes may lie above or below that of the second five
const LONG_RUN_S = 15 * 60; // from which on slope and gaps are judged
const CLIENTS = 20, PAUSE_MS = 150; // at load 1; between two visits of one client, on average
const END_SEEN_MS = 500; // within which node tells of a process that has ended
const GAPS_KEPT_S = 400, NO_GAPS = new Float32Array();
const CACHE_RAM = '8M'; // full within the warm-up: what fills up to its bound later is no leak, but looks like one
const MAX_MINUTES = 7 * 24 * 60; // what one run's samples may take of this process's memory
const PACER = { prompt: PROMPTS[0], tokens: 16, everyMs: 250 };

let opt;
try {
  opt = parseArgs({
    allowPositionals: true,
    options: {
      minutes: { type: 'string', default: '30' }, out: { type: 'string' }, only: { type: 'string' }, load: { type: 'string', default: '1' },
      seed: { type: 'string', default: '1' }, 'idle-seconds': { type: 'string', default: '10' },
      'settle-seconds': { type: 'string', default: '30' },
      bin: { type: 'string', default: process.env.IC_BIN ?? path.join(ROOT, 'build/inference-core') },
      fault: { type: 'string', default: '' }, help: { type: 'boolean' },
    },
  });
  for (const k of ['minutes', 'load', 'seed', 'idle-seconds', 'settle-seconds']) {
    opt.values[k] = Number(opt.values[k]);
    if (!(opt.values[k] >= 0)) throw new Error(`--${k} takes a number`);
  }
  if (opt.values.minutes > MAX_MINUTES) throw new Error(`--minutes takes at most ${MAX_MINUTES}`);
  if (!['', 'answer', 'fds', 'memory', 'death'].includes(opt.values.fault)) throw new Error(`no such fault: ${opt.values.fault}`);
} catch (e) {
  console.error(`${e.message}\n${USAGE}`);
  process.exit(2);
}
const o = opt.values;
if (o.help) {
  console.log(USAGE);
  process.exit(0);
}
const total = o.minutes * 60;
const warm = Math.min(300, total / 4);
const out = o.out ?? fs.mkdtempSync(path.join(os.tmpdir(), 'ic-soak-'));
fs.mkdirSync(out, { recursive: true });

// ---- the server ----
async function start() {
  const log = path.join(out, 'server.log');
  fs.rmSync(log, { force: true });
  const file = fs.openSync(path.join(out, 'server.err'), 'w');
  const env = Object.fromEntries(Object.entries(process.env).filter(([k]) => !k.startsWith('IC_')));
  const args = ['serve', '--port', '0', '--log-file', log, '--model', path.join(ROOT, 'demo/models/stories260K-f32.gguf'),
    '--law', path.join(ROOT, 'demo/laws/ginzburg-landau'), '--chat-template', 'chatml', '--ctx-size', '2048', '--kv-size', '32768',
    '--parallel', '8', '--outbox', '262144', '--cache-ram', CACHE_RAM, ...opt.positionals];
  const setpriv = ['/usr/bin/setpriv', '/bin/setpriv'].find((f) => fs.existsSync(f)); // the server goes also when this is killed
  const server = spawn(setpriv ?? o.bin, setpriv ? ['--pdeathsig', 'KILL', '--', o.bin, ...args] : args, { env, stdio: ['ignore', file, file] });
  fs.closeSync(file);
  server.ended = new Promise((r) => server.on('close', (code, signal) => r((server.end = { code, signal }))));
  server.on('error', (e) => (server.end = { error: e.message }));
  process.on('exit', () => server.kill('SIGKILL'));
  for (const s of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(s, () => process.exit(1));
  for (let i = 0; ; i++) {
    const at = /ready on ws:\/\/.*:(\d+)"/.exec(fs.existsSync(log) ? fs.readFileSync(log, 'utf8') : '');
    if (at) return Object.assign(server, { port: Number(at[1]) });
    if (server.end || i > 1200) throw new Error(`the server did not start: ${JSON.stringify(server.end)}, see ${out}`);
    await sleep(100);
  }
}

const goneBy = (e) => e.code === 'ENOENT' || e.code === 'ESRCH';

/** What the kernel tells of the process; null once it has ended, which may be seen here before node tells it. */
function look(pid) {
  try {
    return read(pid);
  } catch (e) {
    if (goneBy(e)) return null;
    throw e;
  }
}

function read(pid) {
  const dir = `/proc/${pid}`;
  const kib = (text, name) => Number(new RegExp(`^${name}:\\s+(\\d+)`, 'm').exec(text)?.[1] ?? NaN) / 1024;
  const status = fs.readFileSync(`${dir}/status`, 'utf8');
  const now = { rss: kib(status, 'VmRSS'), anon: kib(status, 'RssAnon'), fds: fs.readdirSync(`${dir}/fd`).length, threads: 0, wakeups: 0, preempted: 0, cpu: 0, by: {} };
  for (const t of fs.readdirSync(`${dir}/task`)) {
    try {
      const s = fs.readFileSync(`${dir}/task/${t}/status`, 'utf8');
      const n = (name) => Number(new RegExp(`^${name}:\\s+(\\d+)`, 'm').exec(s)[1]);
      const name = /^Name:\s+(.*)/.exec(s)[1];
      now.threads++;
      now.wakeups += n('voluntary_ctxt_switches');
      now.preempted += n('nonvoluntary_ctxt_switches');
      now.by[name] = (now.by[name] ?? 0) + n('voluntary_ctxt_switches');
    } catch (e) {
      if (!goneBy(e)) throw e; // it has just ended
    }
  }
  const stat = fs.readFileSync(`${dir}/stat`, 'utf8').split(') ')[1].split(' ');
  now.cpu = (Number(stat[11]) + Number(stat[12])) / 100; // seconds; USER_HZ is 100
  return now;
}

/** Seconds that all cores together were busy with anybody else than the server and this process. */
function others(serverCpu) {
  const [user, nice, system, , , irq, softirq, steal] = /^cpu +(.*)/.exec(fs.readFileSync('/proc/stat', 'utf8'))[1].split(' ').map(Number);
  const own = process.cpuUsage();
  return (user + nice + system + irq + softirq + steal) / 100 - serverCpu - (own.user + own.system) / 1e6;
}

// ---- the run ----
const server = await start();
const { pid, port } = server;
console.log(`soak: server ${pid} on port ${port}, ${o.minutes} min at load ${o.load}, seed ${o.seed}, ${os.cpus().length} cores, load average ${os.loadavg()[0].toFixed(1)}; ${out}`);
const ref = await references(port);
await sleep(2000);
const rest = look(pid);
await sleep(o['idle-seconds'] * 1000);
const rested = look(pid);
const idleS = o['idle-seconds'] || 1;
const woken = Object.entries(rested.by).map(([k, v]) => [k, (v - (rest.by[k] ?? 0)) / idleS]).filter(([, v]) => v > 0);
console.log(`idle: ${((rested.wakeups - rest.wakeups) / idleS).toFixed(2)} wake-ups a second (${woken.map(([k, v]) => `${k} ${v.toFixed(2)}`).join(', ') || 'none'}), ` +
  `CPU ${((100 * (rested.cpu - rest.cpu)) / idleS).toFixed(2)} %, ${rested.threads} threads, ${rested.fds} fds, RSS ${rested.rss.toFixed(1)} MiB, of it anonymous ${rested.anon.toFixed(1)}`);

if (o.fault === 'answer') ref.texts[`${PROMPTS[1]}/16`].tokens[2][0] += '!';

let seed = (o.seed * 2654435761 + 1) >>> 0;
const rnd = (n) => {
  seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
  return Math.floor((seed / 2 ** 32) * n);
};
const all = scenarios(port, ref, rnd);
const weights = Object.entries(all).map(([name, [weight]]) => [name, weight]).filter(([name]) => !o.only || o.only.split(',').includes(name));
if (!weights.length) throw new Error(`--only: there are ${Object.keys(all).join(', ')}`);
const sum = weights.reduce((a, [, w]) => a + w, 0);
const tally = Object.fromEntries(weights.map(([name]) => [name, { ok: 0, wrong: 0 }]));
tally.paced = { ok: 0, wrong: 0 };
const wrongs = [];
function wrong(name, why) {
  tally[name].wrong++;
  if (wrongs.length < 20) wrongs.push(`${((performance.now() - begin) / 1000).toFixed(1)} s, ${name}: ${why}`);
}
function pick() {
  let at = (rnd(1 << 20) / (1 << 20)) * sum;
  return weights.find(([, w]) => (at -= w) < 0)?.[0] ?? 'short';
}

const begin = performance.now();
const over = () => performance.now() - begin > total * 1000 || server.end;
let visitors = 0;
async function client() {
  while (!over()) {
    const name = pick();
    visitors++;
    try {
      await all[name][1]();
      tally[name].ok++;
    } catch (e) {
      await Promise.race([server.ended, sleep(END_SEEN_MS)]); // a connection may be seen to close before its server has
      if (server.end) break; // judged by itself
      wrong(name, e.message ?? String(e));
    }
    visitors--;
    await sleep(-Math.log(1 - rnd(1000) / 1000) * PAUSE_MS);
  }
}

const samples = []; // one a second, as look() gives it, and t (s), visitors, gaps (ms)
const tens = []; // [t, p50, p99] of each ten seconds' gaps
let gaps = [], gapCount = 0;
const pacer = new Worker(new URL('./pacer.mjs', import.meta.url), { workerData: { port, ...PACER, want: ref.texts[`${PACER.prompt}/${PACER.tokens}`] } });
const pacerOver = new Promise((r) => pacer.on('exit', r));
pacer.on('message', (m) => {
  gaps.push(...m.gaps);
  tally.paced.ok += m.answers;
  if (m.wrong) wrong('paced', m.wrong);
});
pacer.on('error', (e) => wrong('paced', e.message));

const csv = fs.openSync(path.join(out, 'samples.csv'), 'w');
fs.writeSync(csv, 'seconds,rss_mib,rss_anon_mib,fds,threads,visitors,cpu_seconds,others_cpu_seconds,wakeups,preempted,gaps,gap_p50_ms,gap_p99_ms\n');
let ownCpu = process.cpuUsage();
function sample() {
  const now = look(pid);
  if (server.end || !now) return;
  const { by, ...s } = now;
  Object.assign(s, { t: (performance.now() - begin) / 1000, visitors, others: others(s.cpu), gaps: Float32Array.from(gaps) });
  gapCount += gaps.length;
  gaps = [];
  samples.push(s);
  if (samples.length % 10 === 0) {
    const g = samples.slice(-10).flatMap((x) => [...x.gaps]);
    tens.push([s.t, quantile(g, 0.5), quantile(g, 0.99)]);
  }
  const old = samples.at(-GAPS_KEPT_S);
  if (old && old.t > 600) old.gaps = NO_GAPS; // the verdict needs the first ten minutes and the last five
  const f = (x) => (Number.isFinite(x) ? x.toFixed(3) : '');
  fs.writeSync(csv, [f(s.t), f(s.rss), f(s.anon), s.fds, s.threads, visitors, f(s.cpu), f(s.others), s.wakeups, s.preempted, s.gaps.length, f(quantile(s.gaps, 0.5)), f(quantile(s.gaps, 0.99))].join() + '\n');
}
const sampler = setInterval(sample, 1000);
const reporter = setInterval(() => {
  const s = samples.at(-1);
  if (!s) return;
  const g = samples.slice(-60).flatMap((x) => [...x.gaps]);
  const old = samples.at(-61) ?? samples[0];
  console.log(`${(s.t / 60).toFixed(1).padStart(6)} min: RSS ${s.rss.toFixed(1)} MiB, anonymous ${s.anon.toFixed(1)}, ${s.fds} fds, ${s.threads} threads, CPU ${((100 * (s.cpu - old.cpu)) / (s.t - old.t)).toFixed(0)} %, ` +
    `gap p50 ${quantile(g, 0.5).toFixed(2)} ms, p99 ${quantile(g, 0.99).toFixed(2)} ms; ${Object.values(tally).reduce((a, v) => a + v.ok, 0)} visits right, ${Object.values(tally).reduce((a, v) => a + v.wrong, 0)} wrong`);
}, 60_000);

const kept = []; // what --fault leaves behind
if (o.fault === 'fds') for (let i = 0; i < 10; i++) kept.push(await Peer.open(port));
if (o.fault === 'death') setTimeout(() => server.kill('SIGKILL'), total * 500);
const leak = o.fault === 'memory' && setInterval(async () => {
  const p = await Peer.open(port).catch(() => null);
  p?.send({ op: 'sim_create', grid: 256, frames: false });
  kept.push(p);
}, 1000);

await Promise.all(Array.from({ length: Math.max(1, Math.round(CLIENTS * o.load)) }, client));
clearInterval(leak);
pacer.postMessage('stop');
await Promise.race([pacerOver, sleep(5000), server.ended]);
clearInterval(sampler);
clearInterval(reporter);
sample();
fs.closeSync(csv);
const elapsed = (performance.now() - begin) / 1000;
ownCpu = process.cpuUsage(ownCpu);

// ---- after the clients have gone ----
let after = null;
for (const give_up = performance.now() + o['settle-seconds'] * 1000; !server.end; await sleep(500)) {
  after = look(pid);
  if (!after || (after.fds <= rested.fds && after.threads <= rested.threads) || performance.now() > give_up) break;
}
const metrics = server.end ? '' : await fetchText(port, '/metrics').then((r) => r.body, () => '');
const count = (name) => Number(new RegExp(`^${name} (.*)$`, 'm').exec(metrics)?.[1] ?? NaN);
const held = ['ic_ws_connections', 'ic_text_requests_running', 'ic_text_requests_waiting', 'ic_text_sessions', 'ic_law_simulations', 'ic_law_state_bytes'].map((n) => [n, count(n)]);
const keptCells = ['ic_text_kv_tokens_used', 'ic_text_kv_spill_bytes'].map((n) => `${n} ${count(n)}`).join(', '); // prefixes, for whoever comes next
const survived = !server.end;
server.kill('SIGTERM');
await Promise.race([server.ended, sleep(20_000)]);

// ---- the verdict ----
const steady = samples.filter((s) => s.t >= warm);
const line = slope(steady.map((s) => [s.t / 3600, s.anon]));
const lineRss = slope(steady.map((s) => [s.t / 3600, s.rss]));
const quarter = Math.ceil(steady.length / 4);
const growth = mean(steady.slice(-quarter).map((s) => s.anon)) - mean(steady.slice(0, quarter).map((s) => s.anon));
const p99 = (from, to) => quantile(samples.filter((s) => s.t >= from && s.t < to).flatMap((s) => [...s.gaps]), 0.99);
const long = elapsed >= LONG_RUN_S;
const wrongCount = Object.values(tally).reduce((a, v) => a + v.wrong, 0), right = Object.values(tally).reduce((a, v) => a + v.ok, 0);
const f = (x, n = 2) => (Number.isFinite(x) ? x.toFixed(n) : 'unknown');
const slopeText = (l) => `${f(l.slope)} MiB/h, 95 % between ${f(l.low)} and ${f(l.high)}`;
const most = (of) => samples.reduce((a, s) => Math.max(a, of(s)), 0);
const verdicts = []; // [name, 'pass' | 'FAIL' | 'told', text]
const judge = (name, ok, text) => verdicts.push([name, ok ? 'pass' : 'FAIL', text]);
const tell = (name, text) => verdicts.push([name, 'told', text]);

judge('server', survived && server.end?.code === 0, survived ? `lived, and ended in order: ${JSON.stringify(server.end ?? 'not within 20 s')}` : `ended before its time: ${JSON.stringify(server.end)}`);
judge('answers', wrongCount === 0 && right > 0 && Object.values(tally).every((v) => total < 90 || v.ok > 0), `${wrongCount} wrong, ${right} visits right; of each kind: ${Object.entries(tally).map(([k, v]) => `${k} ${v.ok}`).join(', ')}`);
if (long) {
  judge('memory slope', line.low <= SLOPE_LIMIT, `anonymous ${slopeText(line)} (limit ${SLOPE_LIMIT}); ` +
    (line.high <= SLOPE_LIMIT ? 'it is below' : line.low <= SLOPE_LIMIT ? 'TOO SHORT A RUN TO TELL' : 'it is above') + `; a year of it: ${f((line.slope * 8766) / 1024, 1)} GiB`);
} else {
  tell('memory slope', `anonymous ${slopeText(line)}: judged from ${LONG_RUN_S / 60} min on`);
}
tell('RSS slope', slopeText(lineRss));
judge('memory growth', !long && growth > SHORT_GROWTH_LIMIT ? false : steady.length > 0, `${f(growth)} MiB from the first to the last quarter after ${f(warm, 0)} s of warm-up (limit of short runs ${SHORT_GROWTH_LIMIT}); ` +
  `at rest ${f(rested.anon, 1)}, at most ${f(most((s) => s.anon), 1)}, in the end ${f(after?.anon, 1)} MiB`);
judge('fds', after && after.fds <= rested.fds, `${rested.fds} before, at most ${most((s) => s.fds)}, ${after?.fds} after the clients had gone`);
judge('threads', after && after.threads <= rested.threads, `${rested.threads} before, at most ${most((s) => s.threads)}, ${after?.threads} after`);
judge('nothing held', held.every(([, v]) => v === 0), held.map(([n, v]) => `${n} ${v}`).join(', '));
const busy = (from, to) => { // by others, in % of a core
  const part = samples.filter((s) => s.t >= from && s.t < to);
  return (100 * (part.at(-1)?.others - part[0]?.others)) / (part.at(-1)?.t - part[0]?.t);
};
const [middle, start2, start3] = long ? [600, 300, elapsed - 300] : [(warm + elapsed) / 2, warm, (warm + elapsed) / 2];
const [second, last] = [p99(start2, middle), p99(start3, Infinity)];
tell('prefixes kept', keptCells);
const gapText = `p99 ${f(second)} ms, then ${f(last)} ms: ${f(100 * (last / second - 1), 0)} %, while others took ${f(busy(start2, middle), 0)} and ${f(busy(start3, Infinity), 0)} % of a core; ${gapCount} gaps in all`;
if (long) judge('token gaps', Math.abs(last / second - 1) <= GAP_LIMIT, `${gapText} (second and last five minutes; limit ${100 * GAP_LIMIT} %)`);
else tell('token gaps', `${gapText} (halves after the warm-up)`);
const cpu = (samples.at(-1)?.cpu ?? NaN) - samples[0]?.cpu;
tell('load', `${f((100 * cpu) / elapsed, 0)} % of a core by the server, ${f((ownCpu.user + ownCpu.system) / 1e4 / elapsed, 0)} % by the clients, of ${os.cpus().length} cores; load average ${os.loadavg()[0].toFixed(1)}`);

const thin = (points) => points.filter((_, i) => i % Math.ceil(points.length / 2000) === 0);
const plot = (name, of) => ({ name, points: thin(samples).map((s) => [s.t, of(s)]) });
fs.writeFileSync(path.join(out, 'soak.svg'), svg([
  { title: 'Memory', unit: 'MiB', lines: [plot('resident', (s) => s.rss), plot('anonymous', (s) => s.anon)] },
  { title: 'Open files and threads', unit: 'number', lines: [plot('fds', (s) => s.fds), plot('threads', (s) => s.threads)] },
  { title: 'Token gaps of the paced stream, by 10 s', unit: 'ms', lines: [{ name: 'p50', points: thin(tens).map(([t, p50]) => [t, p50]) }, { name: 'p99', points: thin(tens).map(([t, , p99]) => [t, p99]) }] },
]));

console.log('');
for (const w of wrongs) console.log(`wrong: ${w}`);
for (const [name, verdict, text] of verdicts) console.log(`${verdict.padEnd(5)} ${name.padEnd(14)} ${text}`);
const failed = verdicts.filter(([, v]) => v === 'FAIL');
console.log(`soak: ${failed.length ? `FAILED: ${failed.map(([n]) => n).join(', ')}` : 'passed'} after ${f(elapsed / 60, 1)} min; ${path.join(out, 'samples.csv')}, soak.svg`);
process.exit(failed.length ? 1 : 0);
