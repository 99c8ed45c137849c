// Clients that vanish, that do not read, that come while the server leaves; and both engines at once.
import test from 'node:test';
import assert from 'node:assert/strict';
import fs from 'node:fs';
import path from 'node:path';
import { ENDLESS, Server, tempDir, until, withServer } from './lib.mjs';
import { LAW, MLP, MLP_NAME, SimClient, checkGrowth, lawServer, sims } from './simlib.mjs';

const gone = (server) =>
  until(async () => {
    const m = await server.metrics();
    return m.ic_law_simulations === 0 && m.ic_law_simulations_running === 0 && m.ic_law_state_bytes === 0 && (await sims(server)).length === 0;
  }, 'everything of clients that have gone to go');

test('clients vanish at any moment, and take everything with them', async () => {
  const server = await lawServer(['--law-batch-timeout', '10']);
  let seed = 12345;
  const rnd = (n) => (seed = (seed * 1103515245 + 12345) & 0x7fffffff) % n;
  for (let round = 0; round < 150; round++) {
    const c = await SimClient.open(server);
    const steps = [
      () => c.send({ op: 'sim_create', id: 'a', grid: 8 }),
      async () => (c.mine = (await c.create({ grid: 8 })).sim_id),
      () => c.send({ op: 'sim_run', sim_id: c.mine, rate: rnd(2) ? 0 : 30 }),
      () => c.send({ op: 'sim_create', id: 'b', grid: 8, state: true }),
      () => c.send({ op: 'sim_set', sim_id: c.mine, view: 'phase_hsv', encoding: 'f32' }),
      () => c.send({ op: 'sim_state', sim_id: c.mine }),
      () => c.nextFrame(c.mine),
      () => c.send({ op: 'sim_step', sim_id: c.mine, steps: 5 }),
      () => c.send({ op: 'sim_tool', sim_id: c.mine, tool: 'vortex' }),
      () => c.send({ op: 'sim_close', sim_id: c.mine }),
    ];
    for (const step of steps.slice(0, rnd(steps.length + 1))) await step();
    if (rnd(2)) c.terminate();
    else c.ws.close();
    server.clients.delete(c);
  }
  await gone(server);
  const m = await server.metrics();
  assert.ok(m.ic_law_simulations_created_total > 50);
  await server.stop();
});

test('a client that does not read loses frames, and nothing else; others notice nothing', async () => {
  const server = await lawServer(['--outbox', '262144', '--grid-max', '128', '--idle-seconds', '3600']);
  const slow = await SimClient.open(server), fast = await SimClient.open(server);
  const a = await slow.create({ law: MLP_NAME, grid: 64, view: 'fields', encoding: 'f32' }), b = await fast.create({ law: MLP_NAME, grid: 64 });
  await slow.sim('sim_run', { sim_id: a.sim_id });
  await slow.nextFrame(a.sim_id);
  const rss = server.rss();
  slow.ws._socket.pause();
  await fast.sim('sim_run', { sim_id: b.sim_id });
  const begin = (await fast.nextFrame(b.sim_id)).step;
  // far more frames of the slow one than the kernel's buffers and the outbox hold (49 KiB each)
  const had = (await server.metrics()).ic_law_frames_total;
  await until(async () => (await server.metrics()).ic_law_frames_total > had + 450, 'the slow client to fall far behind');
  const f = await fast.nextFrame(b.sim_id);
  assert.ok(f.step > begin + 50, 'the other one has gone on');
  assert.equal(f.lost, 0, 'and has lost nothing');
  checkGrowth(server, rss, 12 << 20);
  // what must not be lost is not: the answers of its own commands come, and it is not closed for its frames
  const paused = slow.wait((m) => m.op === 'sim_status' && m.id === 'p', 'the pause', slow.mark());
  slow.send({ op: 'sim_pause', id: 'p', sim_id: a.sim_id });
  await until(async () => (await sims(server)).some((s) => s.sim_id === a.sim_id && s.status === 'paused'), 'the pause to arrive');
  slow.ws._socket.resume();
  await paused;
  const last = slow.nextFrame(a.sim_id);
  await slow.sim('sim_step', { sim_id: a.sim_id });
  assert.ok((await last).lost > 100, `${(await last).lost} frames were thrown away`);
  assert.ok(slow.isOpen);
  await Promise.all([slow.close(), fast.close()]);
  await gone(server);
  await server.stop();
});

test('frames give way to tokens: a slow client of both is not closed for its frames', async () => {
  await withServer(['--law', MLP, '--outbox', '262144', '--idle-seconds', '3600'], async (server) => {
    const c = await SimClient.open(server);
    const { sim_id } = await c.create({ grid: 64, view: 'fields', encoding: 'f32' });
    await c.sim('sim_run', { sim_id });
    await c.nextFrame(sim_id);
    c.ws._socket.pause();
    const had = (await server.metrics()).ic_law_frames_total;
    await until(async () => (await server.metrics()).ic_law_frames_total > had + 300, 'frames to pile up');
    // small ones now, in place of the large: the outbox is full to the last few hundred bytes
    c.send({ op: 'sim_set', sim_id, encoding: 'u8', roi: { x: 0, y: 0, w: 8, h: 8 } });
    await until(async () => (await server.metrics()).ic_law_frames_total > had + 2500, 'it to be full');
    const s = c.infer('Once upon a time', { temp: 0, max_tokens: 100 });
    await until(async () => (await server.metrics()).ic_text_tokens_total >= 100, 'the answer to be made');
    c.ws._socket.resume();
    assert.equal((await s.done()).tokens.length > 50, true);
    assert.ok(c.isOpen);
    await c.close();
  });
});

test('both engines at once: an answer streams while a simulation runs', async () => {
  await withServer(['--law', LAW, '--ctx-size', '65536', '--kv-size', '131072'], async (server) => {
    const c = await SimClient.open(server);
    const { sim_id } = await c.create({ grid: 64 });
    await c.sim('sim_run', { sim_id });
    const s = c.infer('Once upon a time', ENDLESS);
    await s.first();
    for (let i = 0; i < 5; i++) {
      const [step, tokens] = [c.frames.at(-1)?.step ?? 0, s.tokens.length];
      await Promise.all([
        c.nextFrame(sim_id, (f) => f.step >= step + 5),
        until(() => s.tokens.length >= tokens + 20 || s.end, 'tokens to go on'),
      ]);
    }
    assert.equal(s.end, null);
    c.send({ op: 'abort', id: s.id });
    assert.equal((await s.finished()).reason, 'abort');
    await c.close();
  });
});

test('a server that leaves takes no new work, and closes with 1001', async () => {
  const server = await Server.start(['--law', LAW, '--drain-seconds', '60', '--ctx-size', '65536', '--kv-size', '131072']);
  const c = await SimClient.open(server);
  const { sim_id } = await c.create();
  const s = c.infer('Once upon a time', ENDLESS); // keeps it draining
  await s.first();
  await c.sim('sim_run', { sim_id });
  server.signal('SIGTERM');
  await until(() => server.log.some((l) => l.includes('draining')), 'the drain to begin');
  await c.refused('sim_create', { grid: 16 }, 'unavailable');
  await c.refused('sim_run', { sim_id }, 'unavailable');
  await c.nextFrame(sim_id); // what runs goes on
  c.send({ op: 'abort', id: s.id });
  await s.finished();
  const { code } = await c.closed.promise;
  assert.equal(code, 1001);
  assert.deepEqual(await server.exit, { code: 0, signal: null });
});

test('a law that cannot be loaded ends the server with its reason', async () => {
  const server = Server.start(['--law', '/nowhere/law'], { model: null });
  await assert.rejects(server, /the server ended .*"code":4/s);
});

test('of several laws, the one that cannot be loaded is named', async (t) => {
  const file = path.join(tempDir(t), 'broken.pth');
  fs.writeFileSync(file, 'PK or not, this is no checkpoint');
  await assert.rejects(Server.start(['--law', `${LAW},${file}`], { model: null }), /the server ended .*broken\.pth: /s);
});

test('a grid too large for the memory is refused without taking it', async () => {
  await withServer(['--law', LAW, '--law-memory', '96M', '--grid-max', '4096', '--outbox', '64M'], async (server) => {
    const c = await SimClient.open(server);
    const rss = server.rss();
    for (const grid of [512, 1024, 2048, 4096]) await c.refused('sim_create', { grid, frames: false }, 'oom');
    checkGrowth(server, rss, 32 << 20);
    // one whose whole batch would not fit gets a smaller batch
    const m = await c.create({ grid: 128 });
    await c.steps(m.sim_id, 1);
    const held = await server.metrics();
    assert.ok(held.ic_law_plan_bytes + held.ic_law_state_bytes <= 96 << 20);
    await c.sim('sim_close', { sim_id: m.sim_id });
    // unused plans make room for others
    for (const grid of [120, 124, 128, 64, 132]) await c.sim('sim_close', { sim_id: (await c.create({ grid })).sim_id });
    await c.close();
  }, { model: null });
});
