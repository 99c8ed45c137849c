// What a simulation computes: the same, to the last bit, as `law step` does alone, whoever else is in the batch.
import test, { afterEach } from 'node:test';
import assert from 'node:assert/strict';
import { tempDir } from './lib.mjs';
import { CONVLSTM, SimClient, dropClients, floats, lawServer, stepByHand } from './simlib.mjs';

const server = await lawServer(['--simulations-per-connection', '64']);

afterEach(() => server.exited || dropClients(server));

test('after n steps the state is that of `law step`, bit for bit', async (t) => {
  const c = await SimClient.open(server);
  for (const [h, w, steps, more] of [[16, 16, 1, {}], [16, 16, 25, {}], [12, 20, 7, {}], [64, 64, 3, { gamma: 0.3 }], [4, 4, 50, { gamma: 0 }]]) {
    const { sim_id } = await c.create({ grid: undefined, height: h, width: w, seed: 100 + steps, init: 'random', ...more });
    const start = await c.state(sim_id);
    await c.steps(sim_id, steps);
    const got = await c.state(sim_id);
    const want = await stepByHand(tempDir(t), start, [h, w, 2], steps, more.gamma === undefined ? [] : ['--gamma', String(more.gamma)]);
    assert.equal(Buffer.compare(got, want), 0, `${h} x ${w}, ${steps} steps`);
    assert.ok(floats(got).some((x, i) => x !== floats(start)[i]));
    await c.sim('sim_close', { sim_id });
  }
  await c.close();
});

test('gamma is each simulation’s own, and may change on the way', async (t) => {
  const c = await SimClient.open(server);
  const [a, b] = [await c.create({ seed: 1, gamma: 0 }), await c.create({ seed: 1, gamma: 0.4 })];
  const start = await c.state(a.sim_id);
  await Promise.all([c.steps(a.sim_id, 5), c.steps(b.sim_id, 5)]);
  const [sa, sb] = [await c.state(a.sim_id), await c.state(b.sim_id)];
  assert.notDeepEqual(sa, sb);
  const dir = tempDir(t);
  assert.deepEqual(sa, await stepByHand(dir, start, [16, 16, 2], 5, ['--gamma', '0']));
  assert.deepEqual(sb, await stepByHand(dir, start, [16, 16, 2], 5, ['--gamma', '0.4']));
  await c.sim('sim_set', { sim_id: a.sim_id, gamma: 0.4 });
  await c.steps(a.sim_id, 2);
  assert.deepEqual(await c.state(a.sim_id), await stepByHand(dir, sa, [16, 16, 2], 2, ['--gamma', '0.4']));
  await c.close();
});

test('alone or among twenty-four others: the same bits; and everybody is served', async () => {
  const c = await SimClient.open(server);
  const alone = await c.create({ seed: 77 });
  await c.steps(alone.sim_id, 40);
  const want = await c.state(alone.sim_id);
  const before = await server.metrics();
  const others = [];
  for (let i = 0; i < 24; i++) {
    const o = await SimClient.open(server);
    o.mine = (await o.create({ seed: i, init: i % 2 ? 'complex_noise' : 'random' })).sim_id;
    others.push(o);
  }
  await Promise.all(others.map((o, i) => o.sim('sim_run', { sim_id: o.mine, gamma: i / 100 })));
  await Promise.all(others.map((o) => o.nextFrame(o.mine)));
  for (let i = 0; i < 3; i++) {
    const again = await c.create({ seed: 77 });
    await c.steps(again.sim_id, 40);
    assert.equal(Buffer.compare(await c.state(again.sim_id), want), 0);
  }
  // frames for all, and nobody is left behind
  await Promise.all(others.map((o) => o.nextFrame(o.mine, (f) => f.step >= 60)));
  const steps = (await Promise.all(others.map((o) => o.sim('sim_pause', { sim_id: o.mine })))).map((m) => m.step);
  const after = await server.metrics();
  assert.ok(after.ic_law_batched_steps_total - before.ic_law_batched_steps_total > 24 * 40, 'they were stepped together');
  assert.ok((after.ic_law_steps_total - before.ic_law_steps_total) / (after.ic_law_batches_total - before.ic_law_batches_total) > 4);
  assert.ok(Math.min(...steps) >= 60, steps.join());
  await Promise.all([...others, c].map((o) => o.close()));
});

test('a state with its memory, saved and uploaded, goes on where it was', async () => {
  const keeper = await lawServer(['--law', CONVLSTM]);
  const c = await SimClient.open(keeper);
  const { sim_id: a } = await c.create({ seed: 5 });
  await c.steps(a, 4);
  const saved = await c.sim('sim_state', { sim_id: a });
  assert.deepEqual(saved.memory_shape, [2, 32, 4, 4]);
  const { sim_id: b } = await c.upload(saved.bytes);
  const { sim_id: bare } = await c.upload(saved.bytes.subarray(0, saved.shape.reduce((x, y) => x * y, 4)));
  for (const s of [a, b, bare]) await c.steps(s, 3);
  const [sa, sb, sc] = [await c.state(a), await c.state(b), await c.state(bare)];
  assert.equal(Buffer.compare(sa, sb), 0);
  assert.notEqual(Buffer.compare(sa, sc), 0, 'without its memory it goes another way');
  await keeper.stop();
});

test('the server has survived', async () => {
  await server.stop();
  server.exited = true;
});
