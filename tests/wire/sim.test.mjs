// The sim_* ops: what each answers, what a frame holds, what is refused.
import test, { afterEach } from 'node:test';
import assert from 'node:assert/strict';
import { checkError, until } from './lib.mjs';
import { LAW_NAME, MLP_NAME, SimClient, VIEWS, dropClients, floats, lawServer, sims } from './simlib.mjs';

const server = await lawServer(['--simulations', '40', '--simulations-per-connection', '4', '--grid-max', '256', '--law-batch-timeout', '5']);

afterEach(() => server.exited || dropClients(server));

test('hello and /v1/laws name the law', async () => {
  const c = await SimClient.open(server);
  assert.deepEqual(c.hello.laws, [LAW_NAME, MLP_NAME]);
  assert.equal(c.hello.status, 'ready');
  assert.equal(c.hello.model, null);
  assert.equal(c.hello.limits.grid_side, 256);
  assert.equal(c.hello.limits.simulations, 4);
  assert.ok(c.hello.limits.steps > 1000);
  const laws = (await server.http('/v1/laws')).json;
  assert.equal(laws.object, 'list');
  assert.equal(laws.data.length, 2);
  assert.equal(laws.data[1].architecture, 'MLP');
  assert.equal(laws.data[1].grid_multiple, 1);
  const l = laws.data[0];
  assert.equal(l.name, LAW_NAME);
  assert.equal(l.architecture, 'UNET');
  assert.equal(l.d_state, 2);
  assert.equal(l.hidden_channels, 32);
  assert.equal(l.grid_training, 64);
  assert.equal(l.grid_multiple, 4);
  assert.equal(l.memory, false);
  assert.equal(l.parameters, 1699 * 32 ** 2 + 20 * 32 * 2 + 86 * 32 + 2 * 2);
  assert.ok(Math.abs(l.gamma - 0.01) < 1e-6);
  await c.close();
});

test('a life: created, run, paused, stepped, set, reset, closed; /v1/sims follows', async () => {
  const c = await SimClient.open(server);
  assert.deepEqual(await sims(server), []);
  const m = await c.create({ seed: 7, gamma: 0.5, view: 'real', encoding: 'f32', every: 3, fps: 20, rate: 200 });
  assert.match(m.sim_id, /^sim_\d+$/);
  const { sim_id } = m;
  const want = { law: LAW_NAME, height: 16, width: 16, d: 2, status: 'paused', step: 0, steps_left: 0, gamma: 0.5, seed: 7,
    precision: 'fp32', view: 'real', encoding: 'f32', every: 3, fps: 20, rate: 200, bytes: 16 * 16 * 2 * 8 };
  for (const [k, v] of Object.entries(want)) assert.equal(m[k], v, k);
  assert.deepEqual(await sims(server), [{ sim_id, law: LAW_NAME, height: 16, width: 16, step: 0, status: 'paused' }]);
  const run = await c.sim('sim_run', { sim_id, steps: -1, view: 'phase', encoding: 'u8', every: 1, fps: 0, rate: 0 });
  assert.equal(run.status, 'running');
  assert.equal(run.steps_left, -1);
  assert.equal(run.view, 'phase');
  await c.nextFrame(sim_id, (f) => f.step >= 5);
  assert.equal((await sims(server))[0].status, 'running');
  assert.ok((await server.metrics()).ic_law_simulations_running === 1);
  const paused = await c.sim('sim_pause', { sim_id });
  assert.equal(paused.status, 'paused');
  assert.equal(paused.steps_left, 0);
  const again = await c.sim('sim_pause', { sim_id });
  assert.equal(again.step, paused.step, 'nothing moves while it is paused');
  const over = await c.steps(sim_id, 4);
  assert.equal(over.step, paused.step + 4);
  const one = c.wait((x) => x.op === 'sim_status' && !x.id && x.step === paused.step + 5, 'one step', c.mark());
  await c.sim('sim_step', { sim_id });
  await one;
  const set = await c.sim('sim_set', { sim_id, gamma: 0.25, roi: { x: 4, y: 8, w: 8, h: 4 } });
  assert.equal(set.gamma, 0.25);
  assert.deepEqual(set.roi, { x: 4, y: 8, w: 8, h: 4 });
  assert.equal((await c.sim('sim_set', { sim_id, roi: null })).roi, undefined);
  const reset = await c.sim('sim_reset', { sim_id, seed: 9 });
  assert.equal(reset.step, 0);
  assert.equal(reset.seed, 9);
  const closed = await c.sim('sim_close', { sim_id });
  assert.equal(closed.sim_id, sim_id);
  await c.refused('sim_run', { sim_id }, 'not_found');
  assert.deepEqual(await sims(server), [], 'nothing is left of it');
  const metrics = await server.metrics();
  for (const k of ['ic_law_simulations', 'ic_law_simulations_running', 'ic_law_state_bytes']) assert.equal(metrics[k], 0, k);
  await c.close();
});

test('ops in any case, inside a payload, and without an id', async () => {
  const c = await SimClient.open(server);
  const { sim_id } = await c.ask({ op: 'SIM_CREATE', id: 'x', payload: { grid: 16 } }, (m) => m.id === 'x');
  const s = await c.ask({ op: 'Sim_Set', payload: { sim_id, view: 'imag', id: 'y' } }, (m) => m.id === 'y');
  assert.equal(s.view, 'imag');
  const bare = await c.ask({ op: 'sim_pause', sim_id }, 'sim_status');
  assert.equal(bare.id, undefined);
  assert.equal(bare.sim_id, sim_id);
  await c.close();
});

test('every view in every encoding', async () => {
  const c = await SimClient.open(server);
  const { sim_id } = await c.create({ height: 12, width: 20 });
  await c.steps(sim_id, 3, { view: 'phase' });
  let step = 3;
  for (const [view, channels] of Object.entries(VIEWS))
    for (const encoding of ['u8', 'f32']) {
      const frame = c.nextFrame(sim_id, (f) => f.view === view && f.dtype === encoding && f.step === step + 1);
      await c.steps(sim_id, 1, { view, encoding });
      step++;
      const f = await frame;
      assert.deepEqual(f.shape, channels === 3 ? [12, 20, 3] : [12, 20], view);
      assert.ok(Number.isFinite(f.min) && Number.isFinite(f.max) && f.min <= f.max, view);
      assert.equal(f.lost, 0);
      const v = f.values;
      if (encoding === 'f32') assert.ok(v.every((x) => x >= 0 && x <= 1), `${view} is within [0, 1]`);
      // an informative view of a living field is not a constant
      if (!['density', 'energy', 'gradient', 'spectral'].includes(view)) assert.ok(new Set(v).size > 10, `${view} ${encoding} shows something`);
    }
  await c.close();
});

test('u8 is the truncated f32, and min and max give the values back', async () => {
  const c = await SimClient.open(server);
  const { sim_id } = await c.create({ seed: 3 });
  await c.steps(sim_id, 2);
  const look = async (encoding) => {
    const f = c.nextFrame(sim_id, (x) => x.dtype === encoding && x.view === 'real');
    await c.sim('sim_set', { sim_id, view: 'real', encoding });
    return f;
  };
  const [a, b] = [await look('f32'), await look('u8')];
  assert.deepEqual([...b.values], [...a.values].map((x) => Math.trunc(Math.fround(x * 255))));
  const psi = floats(await c.state(sim_id)); // [16,16,2,2]: the view is the mean real part of the channels
  a.values.forEach((v, i) => {
    const mean = (psi[4 * i] + psi[4 * i + 2]) / 2;
    assert.ok(Math.abs(a.min + (a.max - a.min) * v - mean) < 1e-5, `cell ${i}`);
  });
  await c.close();
});

test('a region is the piece of the whole picture', async () => {
  const c = await SimClient.open(server);
  const { sim_id } = await c.create({ seed: 5 });
  await c.steps(sim_id, 2);
  const picture = async (roi) => {
    const f = c.nextFrame(sim_id);
    await c.sim('sim_set', { sim_id, view: 'phase', roi });
    return f;
  };
  const whole = await picture(null);
  assert.deepEqual(whole.shape, [16, 16]);
  for (const [x, y, w, h] of [[0, 0, 16, 16], [3, 5, 7, 2], [15, 15, 1, 1], [0, 8, 16, 1]]) {
    const part = await picture({ x, y, w, h });
    assert.deepEqual(part.shape, [h, w]);
    for (let i = 0; i < h; i++)
      assert.deepEqual([...part.values.subarray(i * w, (i + 1) * w)], [...whole.values.subarray((y + i) * 16 + x, (y + i) * 16 + x + w)]);
  }
  await c.close();
});

test('metrics come with frames when asked for, and are plausible', async () => {
  const c = await SimClient.open(server);
  const { sim_id } = await c.create({ seed: 11 });
  const plain = c.nextFrame(sim_id);
  await c.steps(sim_id, 1);
  assert.equal((await plain).metrics, undefined);
  const f = c.nextFrame(sim_id, (x) => x.step === 21);
  await c.steps(sim_id, 20, { metrics: true, every: 20 });
  const m = (await f).metrics;
  assert.ok(Math.abs(m.energy - 256) < 1e-2, `every cell has norm 1: ${m.energy}`);
  assert.ok(m.channel_entropy >= 0 && m.channel_entropy <= Math.log(2) + 1e-6);
  assert.ok(Math.abs(m.entropy - (Math.log(256) + m.channel_entropy)) < 1e-4, 'the identity of law-m.md 5.2');
  assert.ok(m.symmetry > 0 && m.symmetry <= 1);
  assert.ok(m.coherence >= 0 && m.coherence <= 1 + 1e-9);
  assert.ok(m.mean_delta > 0);
  assert.ok(Number.isInteger(m.defects) && m.defects >= 0);
  assert.equal(m.bad_cells, 0);
  assert.equal(m.epoch === 1 || m.epoch === 2, true);
  await c.close();
});

test('frames: every n steps, the last of a run, none when none are wanted', async () => {
  const c = await SimClient.open(server);
  const { sim_id } = await c.create();
  const last = c.nextFrame(sim_id, (f) => f.step === 25);
  await c.steps(sim_id, 25, { every: 10, rate: 500 });
  await last;
  assert.ok(c.frames.every((f) => [10, 20, 25].includes(f.step)), c.frames.map((f) => f.step).join());
  assert.ok(c.frames.some((f) => f.step === 25));
  const before = c.frameCount;
  await c.sim('sim_set', { sim_id, frames: false });
  await c.steps(sim_id, 10, { every: 1 });
  await c.state(sim_id);
  assert.equal(c.frameCount, before);
  const on = c.nextFrame(sim_id);
  await c.sim('sim_set', { sim_id, frames: true });
  assert.equal((await on).step, 35);
  await c.close();
});

test('the last picture always comes, however fast the steps are', async () => {
  const c = await SimClient.open(server);
  const { sim_id } = await c.create({ grid: 4 });
  for (let i = 1; i <= 20; i++) {
    const last = c.nextFrame(sim_id, (f) => f.step === 50 * i);
    await c.steps(sim_id, 50);
    await last;
  }
  const view = c.nextFrame(sim_id, (f) => f.view === 'imag');
  for (const v of ['real', 'phase', 'density', 'real', 'fields', 'imag']) c.send({ op: 'sim_set', sim_id, view: v });
  await view;
  await c.close();
});

test('fps and rate bound what happens', async () => {
  const c = await SimClient.open(server);
  const { sim_id } = await c.create({ grid: 8 });
  // 5 frames a second at most while steps run free: between two frames a few hundred steps can fit
  await c.sim('sim_run', { sim_id, fps: 5 });
  for (let i = 0; i < 8; i++) await c.nextFrame(sim_id);
  const gaps = c.frames.slice(1).map((f, i) => f.step - c.frames[i].step);
  assert.ok(Math.max(...gaps) > 5, `steps go on between frames: ${gaps}`);
  await c.sim('sim_pause', { sim_id });
  // 20 steps a second: 30 steps take 1.45 s at the least, whatever the machine does
  const begin = process.hrtime.bigint();
  await c.steps(sim_id, 30, { rate: 20, fps: 0 });
  assert.ok(Number(process.hrtime.bigint() - begin) > 1.3e9, 'not faster than its rate');
  // and the slowest rate there is does not hold a server back
  await c.sim('sim_run', { sim_id, rate: 1e-300, fps: 1e-300 });
  await c.sim('sim_set', { sim_id, rate: 0, fps: 0 });
  await c.nextFrame(sim_id);
  await c.close();
});

test('a client’s tools act, a paused simulation shows it', async () => {
  const c = await SimClient.open(server);
  const { sim_id } = await c.create({ init: 'zeros' });
  const zero = await c.state(sim_id);
  assert.ok(floats(zero).every((x) => x === 0));
  const tools = [
    { tool: 'vortex', x: 8, y: 8, radius: 4, charge: 1 },
    { tool: 'wave', kx: 3, ky: 1 },
    { tool: 'collapse', intensity: 0.2 },
    { tool: 'inject_energy', type: 'dense_monolith', args: { x: 4, y: 4 } },
    { tool: 'inject_energy', type: 'primordial_soup' },
    { tool: 'click_out', args: { chance: 1, fraction: 1 } },
  ];
  let before = zero;
  for (const t of tools) {
    const f = c.nextFrame(sim_id);
    const s = await c.sim('sim_tool', { sim_id, ...t });
    assert.equal(s.step, 0);
    await f;
    const after = await c.state(sim_id);
    assert.notDeepEqual(after, before, t.tool);
    before = after;
  }
  const f = c.nextFrame(sim_id);
  await c.sim('sim_reset', { sim_id, init: 'zeros' });
  await f;
  assert.deepEqual(await c.state(sim_id), zero);
  await c.refused('sim_tool', { sim_id, tool: 'hammer' }, 'bad_request');
  await c.refused('sim_tool', { sim_id }, 'bad_request');
  await c.refused('sim_tool', { sim_id, tool: 'vortex', radius: -1 }, 'bad_request');
  await c.refused('sim_tool', { sim_id, tool: 'vortex', args: { blend: 2 } }, 'bad_request');
  await c.refused('sim_tool', { sim_id, tool: 'inject_energy', type: 'coffee' }, 'bad_request');
  await c.refused('sim_tool', { sim_id, tool: 'inject_energy', type: 'coffee', args: { x: 4 } }, 'bad_request');
  for (const bad of [{ x: '8' }, { x: true }, { args: { radius: [4] } }, { args: { chance: {} } }, { args: 5 }, { args: [] }])
    assert.match((await c.refused('sim_tool', { sim_id, tool: 'vortex', ...bad }, 'bad_request')).message, /must be/);
  assert.deepEqual(await c.state(sim_id), zero, 'what was refused has changed nothing');
  await c.close();
});

test('an op changes only what its fields are: the seed told is that of the state', async () => {
  const c = await SimClient.open(server);
  const { sim_id } = await c.create({ seed: 42, init: 'random', gamma: 0.5, view: 'real' });
  const first = await c.state(sim_id);
  const other = { seed: 43, init: 'zeros' };
  assert.equal((await c.sim('sim_set', { sim_id, ...other })).seed, 42);
  await c.steps(sim_id, 2, other);
  await c.sim('sim_state', { sim_id, gamma: 2, view: 'imag' });
  const paused = await c.sim('sim_pause', { sim_id, ...other, gamma: 2, view: 'imag' });
  assert.deepEqual([paused.seed, paused.gamma, paused.view], [42, 0.5, 'real']);
  await c.sim('sim_tool', { sim_id, tool: 'wave', ...other, gamma: 2 });
  const reset = await c.sim('sim_reset', { sim_id, gamma: 2 });
  assert.deepEqual([reset.seed, reset.gamma], [42, 0.5]);
  assert.deepEqual(await c.state(sim_id), first);
  await c.close();
});

test('the same seed is the same state; another is another; reset brings it back', async () => {
  const c = await SimClient.open(server);
  for (const init of ['random', 'complex_noise']) {
    const [a, b, d] = [await c.create({ init, seed: 42 }), await c.create({ init, seed: 42 }), await c.create({ init, seed: 43 })];
    const first = await c.state(a.sim_id);
    assert.deepEqual(await c.state(b.sim_id), first);
    assert.notDeepEqual(await c.state(d.sim_id), first);
    await c.steps(a.sim_id, 3);
    assert.notDeepEqual(await c.state(a.sim_id), first);
    await c.sim('sim_reset', { sim_id: a.sim_id });
    assert.deepEqual(await c.state(a.sim_id), first);
    await c.sim('sim_reset', { sim_id: a.sim_id, seed: 43 });
    assert.deepEqual(await c.state(a.sim_id), await c.state(d.sim_id));
    for (const x of [a, b, d]) await c.sim('sim_close', { sim_id: x.sim_id });
  }
  // A seed that was chosen for the client is told, and can be given back by one whose numbers are doubles.
  for (let i = 0; i < 4; i++) {
    const chosen = await c.sim('sim_create', { grid: 16 });
    assert.ok(Number.isSafeInteger(chosen.seed), `${chosen.seed}`);
    const again = await c.create({ seed: chosen.seed });
    assert.ok((await c.state(chosen.sim_id)).equals(await c.state(again.sim_id)));
    for (const s of [chosen, again]) await c.sim('sim_close', { sim_id: s.sim_id });
  }
  await c.close();
});

test('two laws at once, and a grid of odd sides where the law takes it', async () => {
  const c = await SimClient.open(server);
  const a = await c.create(), b = await c.create({ law: MLP_NAME, grid: undefined, height: 5, width: 7, init: 'random' });
  assert.equal(b.bytes, 5 * 7 * 8 * 8);
  await Promise.all([c.steps(a.sim_id, 20), c.steps(b.sim_id, 33)]);
  assert.equal((await c.sim('sim_pause', { sim_id: b.sim_id })).step, 33);
  const v = floats(await c.state(b.sim_id));
  for (let i = 0; i < v.length; i += 16) assert.ok(Math.abs(v.subarray(i, i + 16).reduce((n, x) => n + x * x, 0) - 1) < 1e-4, 'each cell has norm 1');
  await c.close();
});

test('a state that was sent comes back as it is', async () => {
  const c = await SimClient.open(server);
  const bytes = Buffer.from(Float32Array.from({ length: 16 * 16 * 4 }, (_, i) => Math.sin(i) * 0.7).buffer);
  const m = await c.upload(bytes);
  assert.equal(m.op, 'sim_created');
  const s = await c.sim('sim_state', { sim_id: m.sim_id });
  assert.deepEqual(s.shape, [16, 16, 2, 2]);
  assert.equal(s.dtype, 'f32');
  assert.equal(s.step, 0);
  assert.deepEqual(s.bytes, bytes);
  // on a grid that is not square, rows first
  const n = await c.upload(bytes.subarray(0, 8 * 12 * 16), { grid: undefined, height: 8, width: 12 });
  assert.deepEqual((await c.sim('sim_state', { sim_id: n.sim_id })).shape, [8, 12, 2, 2]);
  // NaN and infinity are a client's own affair: they come back, and nothing breaks
  const bad = Buffer.from(Float32Array.from({ length: 1024 }, (_, i) => [NaN, Infinity, -Infinity, 1e38][i % 4]).buffer);
  const b = await c.upload(bad);
  assert.deepEqual(await c.state(b.sim_id), bad);
  const f = c.nextFrame(b.sim_id, (x) => x.step === 2);
  await c.steps(b.sim_id, 2, { metrics: true });
  assert.equal(typeof (await f).metrics, 'object');
  await c.close();
});

test('a wrong state is refused, and the next message is understood again', async () => {
  const c = await SimClient.open(server);
  for (const size of [0, 4, 1023 * 4, 1025 * 4, 4097]) {
    const m = await c.upload(Buffer.alloc(size));
    assert.equal(m.op, 'error', `${size} bytes`);
    checkError(m);
    assert.equal(m.code, 'bad_request');
  }
  // without sim_create a binary message is an ordinary one, and here not JSON
  const e = await c.ask(Buffer.alloc(4096), 'error', { binary: true });
  checkError(e);
  assert.equal(e.code, 'bad_request');
  // one that is larger than a message may be answers its sim_create all the same, and nothing waits for it any more
  const large = await c.upload(Buffer.alloc(c.hello.limits.message_bytes + 4));
  checkError(large);
  assert.equal(large.code, 'too_large');
  await c.sim('sim_close', { sim_id: (await c.create()).sim_id });
  // a text message that is too large is another matter: the state may still come
  c.send({ op: 'sim_create', id: 'after-text', grid: 16, state: true });
  c.send(JSON.stringify({ op: 'ping', fill: 'x'.repeat(c.hello.limits.message_bytes) }));
  const late = c.wait((m) => m.id === 'after-text', 'after-text', c.mark());
  c.send(Buffer.alloc(4096), { binary: true });
  await c.sim('sim_close', { sim_id: (await late).sim_id });
  // one state at a time
  c.send({ op: 'sim_create', id: 'p', grid: 16, state: true });
  await c.refused('sim_create', { grid: 16 }, 'bad_request');
  const made = c.wait((m) => m.id === 'p', 'p', c.mark());
  c.send(Buffer.alloc(4096), { binary: true });
  assert.equal((await made).op, 'sim_created');
  assert.equal((await sims(server)).length, 1);
  await c.close();
});

test('what is wrong is refused, with its code, and leaves nothing behind', async () => {
  const c = await SimClient.open(server);
  const { sim_id } = await c.create();
  const before = await c.sim('sim_pause', { sim_id });
  const create = [
    [{ law: 'no such law' }, 'not_found'],
    [{ law: 7 }, 'bad_request'],
    [{ grid: 0 }, 'bad_request'],
    [{ grid: -4 }, 'bad_request'],
    [{ grid: 18 }, 'bad_request'],
    [{ grid: 16.5 }, 'bad_request'],
    [{ grid: '16' }, 'bad_request'],
    [{ height: 16, width: 17 }, 'bad_request'],
    [{ grid: 260 }, 'too_large'],
    [{ grid: 1e9 }, 'too_large'],
    [{ height: 4, width: 4096 }, 'too_large'],
    [{ init: 'chaos' }, 'bad_request'],
    [{ init: null, seed: -1 }, 'bad_request'],
    [{ seed: 'x' }, 'bad_request'],
    [{ seed: 1.5 }, 'bad_request'],
    [{ gamma: 'x' }, 'bad_request'],
    [{ gamma: 1e9 }, 'bad_request'],
    [{ precision: 'fp8' }, 'bad_request'],
    [{ state: 'yes' }, 'bad_request'],
    [{ view: 'x-ray' }, 'bad_request'],
    [{ encoding: 'png' }, 'bad_request'],
    [{ roi: { x: 0, y: 0, w: 17, h: 1 } }, 'bad_request'],
  ];
  for (const [fields, code] of create) await c.refused('sim_create', { grid: 16, ...fields }, code);
  const set = [
    [{ every: 0 }, 'bad_request'],
    [{ every: 1.5 }, 'bad_request'],
    [{ fps: -1 }, 'bad_request'],
    [{ fps: 'fast' }, 'bad_request'],
    [{ rate: -1 }, 'bad_request'],
    [{ rate: 1e7 }, 'bad_request'],
    [{ metrics: 1 }, 'bad_request'],
    [{ frames: 'no' }, 'bad_request'],
    [{ roi: [0, 0, 1, 1] }, 'bad_request'],
    [{ roi: { x: 10, y: 0, w: 7, h: 4 } }, 'bad_request'],
    [{ roi: { x: 0, y: 16, w: 1, h: 1 } }, 'bad_request'],
    [{ roi: { x: -1, y: 0, w: 4, h: 4 } }, 'bad_request'],
    [{ roi: { x: 0, y: 0, w: 0, h: 4 } }, 'bad_request'],
    [{ roi: { x: 4096, y: 4096, w: 4096, h: 4096 } }, 'bad_request'],
    [{ view: 3 }, 'bad_request'],
  ];
  for (const [fields, code] of set)
    for (const op of ['sim_set', 'sim_run']) await c.refused(op, { sim_id, view: 'imag', ...fields }, code);
  const run = [
    [{ steps: 0 }, 'bad_request'],
    [{ steps: -2 }, 'bad_request'],
    [{ steps: 2.5 }, 'bad_request'],
    [{ steps: 'all' }, 'bad_request'],
    [{ steps: 1e12 }, 'too_large'],
    [{ steps: 1e300 }, 'bad_request'],
  ];
  for (const [fields, code] of run) for (const op of ['sim_run', 'sim_step']) await c.refused(op, { sim_id, ...fields }, code);
  for (const bad of ['', 'sim_', 'sim_0', 'sim_99999', 'sim_18446744073709551616', 'x', `${sim_id} `, `${sim_id}x`, sim_id.slice(4)])
    for (const op of ['sim_run', 'sim_pause', 'sim_step', 'sim_set', 'sim_tool', 'sim_state', 'sim_reset', 'sim_close'])
      await c.refused(op, { sim_id: bad }, 'not_found');
  for (const bad of [null, undefined, 7, {}]) await c.refused('sim_run', { sim_id: bad }, 'bad_request');
  await c.refused('sim_run', { sim_id: 'x'.repeat(100) }, 'too_large');
  const after = await c.sim('sim_pause', { sim_id });
  assert.deepEqual({ ...after, id: 0 }, { ...before, id: 0 }, 'nothing of all that has changed it');
  assert.equal((await sims(server)).length, 1);
  await c.close();
});

test('a stranger’s simulation does not exist', async () => {
  const [a, b] = [await SimClient.open(server), await SimClient.open(server)];
  const { sim_id } = await a.create();
  for (const op of ['sim_run', 'sim_pause', 'sim_step', 'sim_set', 'sim_tool', 'sim_state', 'sim_reset', 'sim_close'])
    await b.refused(op, { sim_id, tool: 'vortex' }, 'not_found');
  assert.equal((await a.sim('sim_pause', { sim_id })).step, 0);
  await Promise.all([a.close(), b.close()]);
});

test('too many simulations: busy, of one connection and of all', async () => {
  const c = await SimClient.open(server);
  const mine = [];
  for (let i = 0; i < 4; i++) mine.push((await c.create()).sim_id);
  await c.refused('sim_create', { grid: 16 }, 'busy');
  await c.sim('sim_close', { sim_id: mine[2] });
  await c.create();
  const others = [];
  for (let i = 0; i < 9; i++) {
    others.push(await SimClient.open(server));
    for (let k = 0; k < 4; k++) await others[i].create();
  }
  assert.equal((await server.metrics()).ic_law_simulations, 40);
  assert.equal((await sims(server)).length, 40);
  const one = await SimClient.open(server);
  await one.refused('sim_create', { grid: 16 }, 'busy');
  const r = await server.http('/predict?grid=4', { method: 'POST', body: Buffer.alloc(4 * 4 * 16), headers: { 'content-type': 'application/octet-stream' } });
  assert.equal(r.status, 429, 'predictions count');
  assert.ok(r.headers['retry-after']);
  await Promise.all(others.map((o) => o.close()));
  await until(async () => (await server.metrics()).ic_law_simulations === 4, 'room');
  await one.create();
  await Promise.all([c.close(), one.close()]);
  await until(async () => (await server.metrics()).ic_law_state_bytes === 0, 'all to go');
});

test('what is sent behind a close is answered too', async () => {
  const c = await SimClient.open(server);
  for (let round = 0; round < 100; round++) {
    // more than a connection may have waiting in all: not one answer gets lost
    const { sim_id } = await c.create({ grid: 4 });
    const id = (k) => `${round}-${k}`;
    const from = c.mark();
    c.send({ op: 'sim_run', id: id(0), sim_id });
    c.send({ op: 'sim_close', id: id(1), sim_id });
    for (let k = 2; k < 6; k++) c.send({ op: ['sim_set', 'sim_state', 'sim_close', 'sim_step'][k - 2], id: id(k), sim_id });
    for (let k = 0; k < 6; k++) {
      const m = await c.wait((x) => x.id === id(k), `the answer to ${id(k)}`, from);
      if (k >= 2) assert.equal(m.code, 'not_found');
    }
  }
  await c.close();
});

test('an id that is guessed before it is told opens nothing', async () => {
  const c = await SimClient.open(server);
  const { sim_id } = await c.create();
  const next = `sim_${Number(sim_id.slice(4)) + 1}`;
  c.send({ op: 'sim_create', id: 'late', grid: 16, state: true });
  await c.refused('sim_run', { sim_id: next }, 'not_found');
  const made = c.wait((m) => m.id === 'late', 'late', c.mark());
  c.send(Buffer.alloc(4096), { binary: true });
  assert.equal((await made).sim_id, next);
  await c.sim('sim_close', { sim_id: next });
  await c.close();
});

test('messages in a flood: answered each, or refused as busy', async () => {
  const c = await SimClient.open(server);
  const { sim_id } = await c.create({ grid: 4, frames: false });
  const n = 3000;
  for (let i = 0; i < n; i++) c.send({ op: 'sim_set', id: `f${i}`, sim_id, gamma: 0.1 });
  const answers = await until(() => {
    const got = c.log.filter((m) => /^f\d+$/.test(m.id ?? ''));
    return got.length >= n && got;
  }, 'an answer to each');
  assert.equal(new Set(answers.map((m) => m.id)).size, n);
  assert.equal(answers.length, n);
  assert.ok(answers.every((m) => m.op === 'sim_status' || m.code === 'busy'));
  await c.sim('sim_set', { sim_id, gamma: 0.2 });
  await c.close();
});

test('the server has survived, and nothing is left', async () => {
  await until(async () => (await server.metrics()).ic_law_simulations === 0, 'all to go');
  const m = await server.metrics();
  assert.equal(m.ic_law_state_bytes, 0);
  assert.equal(m.ic_law_simulations_running, 0);
  assert.ok(m.ic_law_steps_total > 100 && m.ic_law_batches_total > 10 && m.ic_law_frames_total > 50);
  await server.stop();
  server.exited = true;
});
