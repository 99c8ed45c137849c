// Heat: slowing down, pausing, going on, and what clients are told of it. The temperatures come from a file; what follows is
// waited for (readings come once a second).
import test from 'node:test';
import assert from 'node:assert/strict';
import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { ENDLESS, GREEDY, run, sleep, tempDir, until, withServer } from './lib.mjs';

function thermometer(t, text = 'temp=50\ncpu=40\n') {
  const file = path.join(tempDir(t), 'sensors');
  const set = (s) => {
    fs.writeFileSync(`${file}.new`, s);
    fs.renameSync(`${file}.new`, file); // never half a file
  };
  set(text);
  return { set, remove: () => fs.rmSync(file), args: ['--sensor-file', file] };
}

const is = (state) => (m) => m.op === 'status' && m.state === state;
const LONG = ['--ctx-size', '200000', '--kv-size', '200000']; // an answer that lasts as long as the test wants

/** Tokens that come while `fn` runs. */
async function tokensDuring(s, fn) {
  const before = s.tokens.length;
  await fn();
  return s.tokens.length - before;
}

test('heat slows an answer down, more heat stops it, and when it has cooled down it goes on to its end', async (t) => {
  const heat = thermometer(t);
  await withServer([...LONG, ...heat.args], async (server) => {
    const c = await server.connect();
    const idle = await server.connect(); // told as well, though it asked for nothing
    const s = c.infer('Once upon a time', ENDLESS);
    await s.first();
    assert.equal((await server.http('/ready')).status, 200);
    assert.equal((await server.metrics()).ic_thermal_state, 0);

    heat.set('temp=86\ncpu=40\n');
    const slow = await c.wait(is('slow'), 'status slow');
    assert.deepEqual(slow, { op: 'status', state: 'slow', reason: 'GPU 0 is at 86 °C, the limit is 80 °C', temp: 86, duty: 0.2 });
    assert.deepEqual(await idle.wait(is('slow')), slow);
    assert.equal((await server.http('/ready')).status, 200, 'slow is ready');
    const a = await server.metrics();
    assert.equal(a.ic_thermal_state, 1);
    assert.ok(Math.abs(a.ic_thermal_duty - 0.2) < 1e-9);
    assert.equal(a['ic_gpu_temperature_celsius{gpu="0"}'], 86);
    assert.equal(a.ic_cpu_temperature_celsius, 40);
    const b = await until(async () => {
      const m = await server.metrics();
      return m.ic_text_tokens_total > a.ic_text_tokens_total + 20 && m;
    }, 'tokens while slow');
    const work = b.ic_text_decode_seconds_sum - a.ic_text_decode_seconds_sum;
    const rest = b.ic_thermal_rest_seconds_total - a.ic_thermal_rest_seconds_total;
    assert.ok(rest > work * 2, `rest (${rest} s) is ordered for four times the work (${work} s)`);

    heat.set('temp=91\ncpu=40\n');
    await Promise.all([c.wait(is('paused'), 'status paused'), idle.wait(is('paused'))]);
    const ready = await server.http('/ready');
    assert.equal(ready.status, 503);
    assert.match(ready.json.reason, /hot/);
    assert.equal((await server.http('/health')).status, 200, 'paused is not broken');
    const decodes = async () => (await server.metrics()).ic_text_decodes_total;
    const frozen = await until(async () => {
      const n = await decodes();
      return (await sleep(500), await decodes()) === n && n;
    }, 'the decode that was under way to end');
    assert.equal((await server.metrics()).ic_ready, 0);
    await c.sync(); // its tokens have arrived
    assert.equal(await tokensDuring(s, () => sleep(1500)), 0, 'no token while paused');
    assert.equal(await decodes(), frozen, 'nothing is computed while paused');

    // what waits meanwhile can still be aborted, and times out
    const waiting = c.infer('The dog', { ...GREEDY, max_tokens: 20 });
    const aborted = c.infer('The cat', GREEDY);
    const late = c.infer('The bird', GREEDY, { deadline_ms: 400 });
    assert.equal((await late.finished()).reason, 'deadline');
    c.send({ op: 'abort', id: aborted.id });
    assert.equal((await aborted.finished()).reason, 'abort');
    const newcomer = await server.connect();
    assert.equal((await newcomer.wait(is('paused'), 'the state, for one who came later')).temp, 91);

    heat.set('temp=78\ncpu=40\n'); // not cool enough: three degrees below the limit are wanted
    await until(async () => (await server.metrics())['ic_gpu_temperature_celsius{gpu="0"}'] === 78, 'the reading');
    assert.equal((await server.http('/ready')).status, 503);

    heat.set('temp=60\ncpu=40\n');
    const from = c.mark();
    const normal = await c.wait(is('normal'), 'status normal', from);
    assert.deepEqual(normal, { op: 'status', state: 'normal', reason: null, temp: 60, duty: 1 });
    assert.equal((await server.http('/ready')).status, 200);
    await until(() => s.tokens.length > 100 && tokensDuring(s, () => sleep(100)), 'the answer to go on');
    await waiting.done();
    c.send({ op: 'abort', id: s.id });
    assert.equal((await s.finished()).reason, 'abort');
    assert.deepEqual(s.tokens.map((x) => x.index), [...s.tokens.keys()], 'no token was lost or came twice');
    const m = await server.metrics();
    for (const [to, n] of [['slow', 1], ['paused', 1], ['normal', 1]]) assert.equal(m[`ic_thermal_transitions_total{to="${to}"}`], n);
    assert.ok(m['ic_thermal_state_seconds_total{state="paused"}'] >= 1);
    assert.deepEqual(idle.log.filter((x) => x.op === 'status').map((x) => x.state), ['slow', 'paused', 'normal']);
  });
});

test('an answer under heat says the same as without, to its end', async (t) => {
  const heat = thermometer(t);
  await withServer(heat.args, async (server) => {
    const c = await server.connect();
    const cool = await c.text('Once upon a time', { ...GREEDY, max_tokens: 60 });
    heat.set('temp=84\n');
    while (!c.log.some(is('slow'))) await c.infer('a', { ...GREEDY, max_tokens: 1 }).done(); // who works is watched
    assert.equal(await c.text('Once upon a time', { ...GREEDY, max_tokens: 60 }), cool);
  });
});

test('a disconnect and the end of the process are obeyed while paused', async (t) => {
  const heat = thermometer(t, 'temp=99\n');
  await withServer(['--drain-seconds', '1', ...heat.args], async (server) => {
    const c = await server.connect();
    const gone = await server.connect();
    await c.wait(is('paused'));
    const s = c.infer('Once upon a time', GREEDY);
    gone.infer('Once upon a time', GREEDY);
    await until(async () => (await server.metrics()).ic_text_requests_total === 2, 'both to be taken');
    gone.terminate();
    await until(async () => (await server.metrics())['ic_text_requests_ended_total{reason="abort"}'] === 1, 'the request of the one who left to end');
    server.signal('SIGTERM');
    assert.equal((await s.refused()).code, 'unavailable');
    assert.equal((await s.finished()).reason, 'error');
    assert.equal((await server.exit).code, 0);
    server.stop = async () => {};
  });
});

test('simulations rest, pause and go on alike, and obey commands meanwhile', async (t) => {
  const law = fileURLToPath(new URL('../../demo/laws/ginzburg-landau', import.meta.url));
  const heat = thermometer(t);
  await withServer(['--law', law, '--law-threads', '1', ...heat.args], async (server) => {
    const steps = async () => (await server.metrics()).ic_law_steps_total;
    const c = await server.connect();
    const { sim_id } = await c.ask({ op: 'sim_create', grid: 16, frames: false }, 'sim_created');
    await c.ask({ op: 'sim_run', sim_id, steps: -1, frames: false }, 'sim_status');
    await until(async () => (await steps()) > 10, 'steps');
    heat.set('temp=85\n');
    await c.wait(is('slow'));
    const a = await server.metrics();
    const b = await until(async () => {
      const m = await server.metrics();
      return m.ic_law_steps_total > a.ic_law_steps_total + 20 && m;
    }, 'steps while slow');
    const work = b.ic_law_batch_seconds_sum - a.ic_law_batch_seconds_sum;
    const rest = b.ic_thermal_rest_seconds_total - a.ic_thermal_rest_seconds_total;
    assert.ok(rest > work * 2, `rest (${rest} s) is ordered for four times the work (${work} s)`);
    heat.set('temp=90\n');
    await c.wait(is('paused'));
    const frozen = await until(async () => {
      const n = await steps();
      return (await sleep(500), await steps()) === n && n;
    }, 'the last step');
    assert.equal((await c.ask({ op: 'sim_set', sim_id, gamma: 0.2 }, 'sim_status')).gamma, 0.2);
    await c.ask({ op: 'sim_close', sim_id: (await c.ask({ op: 'sim_create', grid: 16, frames: false }, 'sim_created')).sim_id }, 'sim_closed');
    assert.equal(await steps(), frozen);
    heat.set('temp=76\n');
    await c.wait(is('normal'));
    await until(async () => (await steps()) > frozen + 10, 'steps again');
    await c.ask({ op: 'sim_pause', sim_id }, (m) => m.op === 'sim_status' && m.status === 'paused');
  }, { model: null });
});

test('the CPU counts too, and 0 switches a limit off', async (t) => {
  const heat = thermometer(t, 'temp=130\ncpu=96\n');
  await withServer(['--temp-limit', '0', ...heat.args], async (server) => {
    const c = await server.connect();
    assert.equal((await c.wait(is('slow'))).reason, 'the CPU is at 96 °C, the limit is 95 °C');
    heat.set('cpu=106\n');
    await c.wait(is('paused'));
    heat.set('cpu=50\n');
    await c.wait(is('normal'));
    await c.infer('Once', { ...GREEDY, max_tokens: 5 }).done();
  });
  await withServer(['--temp-limit', '0', '--cpu-temp-limit', '0', ...heat.args], async (server) => {
    heat.set('temp=130\ncpu=130\n');
    const c = await server.connect();
    await c.infer('Once', { ...GREEDY, max_tokens: 20 }).done();
    await c.ask({ op: 'subscribe_metrics' }, (m) => m.op === 'metrics' && m.cpu.temp === 130);
    assert.equal((await server.metrics()).ic_thermal_state, 0);
  });
});

test('metrics carry true figures, and null where there are none', async (t) => {
  const heat = thermometer(t, 'temp=61.5\ncpu=44\npower=87.5\nfan=43\nvram_total_mb=3072\nvram_used_mb=1000\nthrottle=32\n');
  const FIELDS = ['temp', 'vram_total_mb', 'vram_used_mb', 'vram_free_mb', 'power_watts', 'fan_percent', 'throttling'];
  await withServer(heat.args, async (server) => {
    const c = await server.connect();
    const m = await c.ask({ op: 'subscribe_metrics' }, (x) => x.op === 'metrics' && x.gpu.temp !== null);
    assert.deepEqual(FIELDS.map((f) => m.gpu[f]), [61.5, 3072, 1000, 2072, 87.5, 43, true]);
    assert.equal(m.gpu.graphics_mhz, null);
    assert.equal(m.cpu.temp, 44);
    assert.deepEqual(m.thermal, { state: 'normal', duty: 1 });
    const p = await server.metrics();
    assert.equal(p['ic_gpu_power_watts{gpu="0"}'], 87.5);
    assert.equal(p['ic_gpu_memory_used_bytes{gpu="0"}'], 1000 * 2 ** 20);
    assert.equal(p['ic_gpu_graphics_clock_hertz{gpu="0"}'], undefined);
    heat.remove(); // every sensor is gone
    const from = c.mark();
    const blind = await c.wait((x) => x.op === 'metrics' && x.gpu.temp === null, 'metrics without a reading', from);
    assert.deepEqual(FIELDS.map((f) => blind.gpu[f]), Array(7).fill(null));
    assert.equal(blind.cpu.temp, null);
  });
  await withServer(['--nvml-library', '/nonexistent'], async (server) => { // whatever this machine has
    const c = await server.connect();
    const m = await c.ask({ op: 'subscribe_metrics' }, 'metrics');
    assert.deepEqual(FIELDS.map((f) => m.gpu[f]), Array(7).fill(null));
  });
});

test('a sensor that falls silent keeps the last decision for a while, then it runs free', async (t) => {
  const heat = thermometer(t, 'temp=95\n');
  await withServer(heat.args, async (server) => {
    const c = await server.connect();
    await c.wait(is('paused'));
    heat.remove();
    await until(async () => (await server.metrics())['ic_gpu_up{gpu="0"}'] === 0, 'the sensor to be missed');
    assert.equal((await server.http('/ready')).status, 503);
    await c.wait(is('normal'), 'status normal', c.mark());
    assert.equal((await server.http('/ready')).status, 200);
    await until(() => server.log.some((l) => /not protected any more/.test(l)), 'a warning that says so'); // by a thread of its own
    heat.set('temp=95\n');
    const from = c.mark();
    const s = c.infer('Once upon a time', { ...GREEDY, max_tokens: 2 }); // somebody works, so somebody looks
    await c.wait(is('paused'), 'status paused', from);
    heat.set('temp=50\n');
    await s.done();
  });
});

test('no sensor is read while there is nothing to do, and work wakes the reading up', async (t) => {
  const heat = thermometer(t);
  await withServer([...LONG, ...heat.args], async (server) => {
    const c = await server.connect();
    const first = await until(async () => {
      const m = await server.metrics();
      return m.ic_hw_reads_total >= 1 && m;
    }, 'the reading at the start');
    await sleep(3500);
    const idle = await server.metrics();
    assert.equal(idle.ic_hw_reads_total, first.ic_hw_reads_total, 'idle: nothing is read');
    const s = c.infer('Once upon a time', ENDLESS);
    await s.first();
    const busy = await until(async () => {
      const m = await server.metrics();
      return m.ic_hw_gpu_reads_total >= idle.ic_hw_gpu_reads_total + 2 && m;
    }, 'readings while working');
    assert.ok(busy.ic_hw_gpu_reads_total > idle.ic_hw_gpu_reads_total);
    c.send({ op: 'abort', id: s.id });
    await s.finished();
    const rest = async (m) => (await sleep(2500), (await server.metrics()).ic_hw_gpu_reads_total === m.ic_hw_gpu_reads_total);
    await until(async () => rest(await server.metrics()), 'the reading to go to sleep');
    // a client that watches keeps it awake
    await c.ask({ op: 'subscribe_metrics' }, 'metrics_subscribed');
    const before = (await server.metrics()).ic_hw_gpu_reads_total;
    await until(async () => (await server.metrics()).ic_hw_gpu_reads_total >= before + 2, 'readings for one who watches');
    await c.ask({ op: 'unsubscribe_metrics' }, 'metrics_unsubscribed');
    await until(async () => rest(await server.metrics()), 'the reading to go to sleep again');
  });
});

test('limits that make no sense are refused', async () => {
  for (const args of [['--temp-critical', '80'], ['--temp-limit', '90', '--temp-critical', '85'], ['--temp-limit', '200']]) {
    const r = await run(['serve', '--port', '0', '--model', '/dev/null', ...args]);
    assert.equal(r.code, 2, r.stderr);
    assert.match(r.stderr, /temp-/);
  }
});
