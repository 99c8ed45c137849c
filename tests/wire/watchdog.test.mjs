// What stands still is told to stop, then left behind, and only at the end the process goes; what idles is unloaded and
// comes back. The faults come from IC_FAULT (src/base/fault.h).
import test from 'node:test';
import assert from 'node:assert/strict';
import fs from 'node:fs';
import path from 'node:path';
import { ENDLESS, GREEDY, MODEL, Client, Server, run, sleep, tempDir, until, withServer } from './lib.mjs';
import { LAW, MLP, SimClient } from './simlib.mjs';

const STORY = 'Once upon a time';
const LONG = { ...GREEDY, max_tokens: 40 };
// A thread that hangs keeps what it has: no leak.
const env = (fault) => ({ env: { IC_FAULT: fault, ASAN_OPTIONS: 'detect_leaks=0' } });
const healed = (server, name, engine, n = 1) =>
  until(async () => (await server.metrics())[`ic_engine_${name}{engine="${engine}"}`] === n, `${name} of ${engine}`);

test('a decode that takes too long is told to stop: those in it fail, who waited is served', async () => {
  await withServer(['--stall-seconds', '1', '--parallel', '1'], async (server) => {
    const c = await server.connect();
    const hit = c.infer(STORY, ENDLESS);
    await hit.first();
    const waits = c.infer(STORY, LONG);
    assert.equal((await hit.refused()).code, 'internal');
    assert.equal((await hit.finished()).reason, 'error');
    const text = (await waits.done()).text;
    assert.equal(await c.text(STORY, LONG), text);
    await healed(server, 'ticks_aborted_total', 'text');
    assert.equal((await server.metrics())['ic_engine_rebuilt_total{engine="text"}'], 0);
  }, env('text-stall:20'));
});

test('a decode that hangs is left behind, and the engine goes on in the same process', async () => {
  await withServer(['--stall-seconds', '1', '--parallel', '2'], async (server) => {
    const c = await server.connect();
    const hit = [c.infer(STORY, ENDLESS), c.infer('The cat', ENDLESS)];
    await hit[0].first();
    const waits = c.infer(STORY, LONG);
    for (const s of hit) {
      assert.equal((await s.refused()).code, 'internal');
      assert.equal((await s.finished()).reason, 'error');
    }
    const text = (await waits.done()).text;
    await healed(server, 'rebuilt_total', 'text');
    assert.equal(await (await server.connect()).text(STORY, LONG), text, 'and is right');
    assert.equal((await server.http('/health')).status, 200);
  }, env('text-hang:30'));
});

test('a process that is stopped for long, as a paused container is, goes on with everybody when it may', async () => {
  const args = ['--stall-seconds', '4', '--idle-seconds', '1', '--ctx-size', '8192', '--law', MLP];
  await withServer(args, async (server) => {
    const c = await server.connect();
    const streams = ['Once', 'The cat', 'A dog', 'One day'].map((p) => c.infer(p, ENDLESS));
    const silent = await server.connect();
    const sims = await SimClient.open(server);
    const { sim_id } = await sims.create({ grid: 64 });
    await sims.sim('sim_run', { sim_id, frames: false });
    for (const s of streams) await s.first();
    server.signal('SIGSTOP');
    await sleep(8000);
    server.signal('SIGCONT');
    const had = streams.map((s) => s.tokens.length);
    await until(() => streams.every((s, i) => s.tokens.length > had[i] + 5), 'more tokens of each stream');
    await silent.sync();
    await sims.sim('sim_pause', { sim_id });
    assert.deepEqual(streams.map((s) => [s.error, s.end]), streams.map(() => [null, null]));
    const m = await server.metrics();
    for (const engine of ['text', 'law']) assert.equal(m[`ic_engine_ticks_aborted_total{engine="${engine}"}`], 0);
  });
});

test('what was said before the hang is not lost', async () => {
  await withServer(['--stall-seconds', '1'], async (server) => {
    const c = await server.connect();
    const session_id = await c.session();
    const said = await c.text(STORY, { ...GREEDY, max_tokens: 10 }, { session_id });
    const hit = c.infer('The cat', ENDLESS);
    assert.equal((await hit.refused()).code, 'internal');
    const more = await c.text(' Then', { ...GREEDY, max_tokens: 10 }, { session_id });
    assert.equal(more, await c.text(`${STORY}${said} Then`, { ...GREEDY, max_tokens: 10 }));
  }, env('text-hang:60'));
});

test('an engine that hangs again and again ends the process, with its state written', async (t) => {
  const dump = path.join(tempDir(t), 'state');
  const server = await Server.start(['--stall-seconds', '1', '--state-dump', dump], env('text-dead:20'));
  const c = await server.connect();
  let internal = 0;
  const asker = (async () => {
    while (c.isOpen) {
      const s = c.infer(STORY, ENDLESS);
      await s.finished().catch(() => {});
      internal += s.error?.code === 'internal';
    }
  })();
  const end = await server.exit;
  await asker;
  assert.equal(end.code, 6, server.log.slice(-10).join('\n'));
  assert.equal(internal, 3, 'one for each time that the engine was built anew');
  const text = fs.readFileSync(dump, 'utf8');
  assert.match(text, /^# text engine: state 1, last sign of life [1-9]/m);
  assert.match(text, /^# connection 0: request \d+/m);
  assert.match(text, /^ic_engine_rebuilt_total\{engine="text"\} 3$/m);
  assert.ok(!text.includes(STORY));
  assert.match(server.log.at(-1), /stands still for good.*its state is in/);
});

test('a state that could not be written is not said to be there', async () => {
  const server = await Server.start(['--stall-seconds', '1', '--state-dump', '/dev/full'], env('text-dead:20'));
  const c = await server.connect();
  while (c.isOpen) await c.infer(STORY, ENDLESS).finished().catch(() => {});
  assert.equal((await server.exit).code, 6);
  assert.match(server.log.at(-2), /state dump \/dev\/full: No space left/);
  assert.match(server.log.at(-1), /stands still for good: this process ends"/);
});

test('a decode without memory fails those in it only', async () => {
  await withServer([], async (server) => {
    const c = await server.connect();
    const hit = c.infer(STORY, ENDLESS);
    assert.equal((await hit.refused()).code, 'internal');
    assert.equal((await c.infer(STORY, LONG).done()).end.reason, 'length');
  }, env('text-oom:20'));
});

test('a law whose step hangs: its simulations are lost, others and the text engine go on', async () => {
  await withServer(['--stall-seconds', '1', '--law', LAW, '--law-max-batch', '1'], async (server) => {
    const c = await SimClient.open(server);
    const kept = (await c.create({ frames: false })).sim_id;
    await c.steps(kept, 3);
    const state = await c.state(kept);
    const hit = (await c.create({ frames: false, seed: 2 })).sim_id;
    const lost = c.wait((m) => m.op === 'error' && m.code === 'internal', 'the error');
    const closed = c.wait((m) => m.op === 'sim_closed' && m.sim_id === hit, 'its end');
    await c.sim('sim_step', { sim_id: hit, steps: 100 });
    const text = c.infer(STORY, LONG);
    await Promise.all([lost, closed, text.done()]);
    await healed(server, 'rebuilt_total', 'law');
    assert.deepEqual(await c.state(kept), state, 'as it was');
    assert.equal((await c.steps(kept, 2)).step, 5);
    const again = (await c.create({ frames: false })).sim_id;
    await c.steps(again, 5);
    assert.deepEqual(await c.state(again), await c.state(kept), 'and steps as before');
    await c.refused('sim_state', { sim_id: hit }, 'not_found');
  }, env('law-hang:10'));
});

test('an idle model is unloaded, comes back for the next request, and sessions go on', async () => {
  await withServer(['--idle-unload', '1'], async (server) => {
    const c = await server.connect();
    const session_id = await c.session();
    const said = await c.text(STORY, LONG, { session_id });
    const whole = await c.text(`${STORY}${said} Then`, LONG);
    await healed(server, 'unloaded', 'text');
    const held = server.rss();
    assert.equal((await server.http('/ready')).status, 200, 'ready, though it has to wake up first');
    const { tokens } = (await server.http('/tokenize', { method: 'POST', body: JSON.stringify({ content: STORY }) })).json;
    assert.ok(tokens.length > 0, 'words are taken apart meanwhile');
    assert.equal((await server.http('/detokenize', { method: 'POST', body: JSON.stringify({ tokens }) })).json.content.trim(), STORY);
    assert.equal((await server.metrics())['ic_engine_unloaded{engine="text"}'], 1, 'that needs no model');
    assert.equal(await c.text(' Then', LONG, { session_id }), whole);
    const m = await server.metrics();
    assert.equal(m['ic_engine_woken_total{engine="text"}'], 1);
    console.log(`came back in ${m['ic_engine_wake_seconds{engine="text"}'].toFixed(3)} s; ${(held / 2 ** 20).toFixed(1)} MiB resident while away`);
    await healed(server, 'unloaded_total', 'text', 2);
    assert.equal(await c.text(STORY, LONG), said, 'again');
  });
});

test('an idle model whose file was exchanged comes back as the new one, and nothing of the old one is used', async (t) => {
  const model = path.join(tempDir(t), 'model.gguf');
  const other = fs.readFileSync(MODEL);
  for (let i = 500003; i < 600000; i += 4) other[i] ^= 0x80; // the signs of some weights
  const long = 'Once upon a time there was a little girl who liked to play in the park with her dog. '.repeat(2);
  const messages = [{ role: 'user', content: long }];
  const texts = async (c) => [await c.text(long, LONG), await c.text(messages, LONG)];
  fs.writeFileSync(model, other);
  let want;
  const args = ['--chat-template', 'chatml', '--ctx-size', '2048'];
  await withServer(args, async (server) => {
    want = await texts(await server.connect());
  }, { model });
  fs.copyFileSync(MODEL, model);
  await withServer([...args, '--idle-unload', '1'], async (server) => {
    const c = await server.connect();
    const [raw, chat] = [await c.session(), await c.session()];
    await c.text(long, LONG, { session_id: raw });
    await c.text(messages, LONG, { session_id: chat });
    assert.notDeepEqual(await texts(c), want);
    await healed(server, 'unloaded', 'text');
    assert.ok((await server.metrics()).ic_text_kv_spill_bytes > 0, 'something was kept');
    fs.rmSync(model);
    fs.writeFileSync(model, other);
    assert.deepEqual(await texts(c), want);
    assert.equal((await c.infer(' Then', LONG, { session_id: raw }).refused()).code, 'not_found');
    await c.text([{ role: 'user', content: 'And then?' }], LONG, { session_id: chat });
    assert.ok(server.log.some((l) => l.includes('another one than before')));
  }, { model });
});

test('an idle model that is asked by many at once', async () => {
  await withServer(['--idle-unload', '1'], async (server) => {
    const clients = await Promise.all(Array.from({ length: 8 }, () => server.connect()));
    const want = await clients[0].text(STORY, LONG);
    await healed(server, 'unloaded', 'text');
    assert.deepEqual(await Promise.all(clients.map((c) => c.text(STORY, LONG))), clients.map(() => want));
    await healed(server, 'unloaded_total', 'text', 2);
    const gone = await server.connect();
    gone.infer(STORY, ENDLESS);
    await gone.sync();
    gone.terminate(); // asks and goes: the model may come back for nobody, and nobody is harmed
    assert.equal(await clients[0].text(STORY, LONG), want);
  });
});

test('an idle model whose file is gone: who waits is told or may leave, laws go on, and it is looked for again', async (t) => {
  const model = path.join(tempDir(t), 'm.gguf'), away = `${model}.away`;
  fs.copyFileSync(MODEL, model);
  await withServer(['--idle-unload', '1', '--law', LAW], async (server) => {
    const c = await server.connect(), other = await server.connect();
    const said = await c.text(STORY, LONG);
    await healed(server, 'unloaded', 'text');
    fs.renameSync(model, away);
    const waits = c.infer(STORY, LONG), leaves = other.infer(STORY, LONG);
    other.send({ op: 'abort' });
    assert.equal((await leaves.finished()).reason, 'abort', 'while the model is looked for');
    assert.equal((await waits.refused()).code, 'unavailable');
    assert.equal((await waits.finished()).reason, 'error');
    const sim = await SimClient.open(server);
    await sim.steps((await sim.create({ frames: false })).sim_id, 3);
    await sim.close();
    fs.renameSync(away, model);
    assert.equal(await c.text(STORY, LONG), said);
  }, { model });
});
