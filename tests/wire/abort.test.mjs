// Abort and disconnect, in each state of a request: queued, reading its prompt, decoding, finished.
import test from 'node:test';
import assert from 'node:assert/strict';
import { ENDLESS, GREEDY, Server, UPGRADE, rawSocket, until, withServer } from './lib.mjs';

const STORY = 'Once upon a time';
// A context in which a prompt takes long to read: many small decodes.
const SLOW_PROMPT = ['--ctx-size', '32768', '--kv-size', '65536', '--batch', '32', '--parallel', '8'];
const LONG = 'Once upon a time there was a cat. '.repeat(2500);
// One at a time: the others wait.
const ONE = ['--ctx-size', '16384', '--parallel', '1'];

const server = await Server.start(['--ctx-size', '16384', '--kv-size', '65536']);
const one = await Server.start(ONE);
const slow = await Server.start(SLOW_PROMPT);
const want = await server.connect().then(async (c) => [await c.text(STORY, { ...GREEDY, max_tokens: 40 }), c.close()][0]);

// The server says the same as before and holds nothing of the departed.
async function stillRight(s) {
  await s.idle();
  const c = await s.connect();
  assert.equal(await c.text(STORY, { ...GREEDY, max_tokens: 40 }), want);
  await c.close();
  await until(async () => (await s.metrics()).ic_text_requests_running === 0, 'nothing to run'); // counted after its end is sent
}

// Aborts `s` and checks: acknowledged, no token of it after the acknowledgement, its own end follows.
async function abortIs(c, s, how = { id: s.id }, checkTokens = true) {
  const ack = await c.ask({ op: 'abort', ...how }, (m) => m.op === 'abort');
  const had = s.tokens.length;
  assert.equal(ack.status, 'aborted');
  for (const k of Object.keys(how)) assert.equal(ack[k], how[k]);
  const end = await s.finished();
  assert.equal(end.reason, 'abort');
  if (checkTokens) assert.equal(s.tokens.length, had, 'no token after the acknowledgement');
  return end;
}

test('abort while decoding, by id', async () => {
  const c = await server.connect();
  for (let i = 0; i < 30; i++) {
    const s = c.infer(STORY, ENDLESS);
    await s.first();
    const end = await abortIs(c, s);
    assert.ok(end.stats.tokens >= s.tokens.length);
  }
  await c.close();
  await stillRight(server);
});

test('abort by id ends that one only', async () => {
  const c = await server.connect();
  const [a, b] = [c.infer(STORY, ENDLESS), c.infer(STORY, { ...ENDLESS, max_tokens: 300 })];
  await Promise.all([a.first(), b.first()]);
  await abortIs(c, a);
  assert.equal((await b.done()).end.stats.tokens, 300);
  await c.close();
});

test('abort without id or session ends everything of this connection and nothing of others', async () => {
  const [c, d] = [await server.connect(), await server.connect()];
  const mine = [c.infer(STORY, ENDLESS), c.infer(STORY, ENDLESS), c.infer(STORY, ENDLESS)];
  const theirs = d.infer(STORY, ENDLESS);
  await Promise.all([...mine, theirs].map((s) => s.first()));
  assert.equal((await c.ask({ op: 'ABORT' }, 'abort')).status, 'aborted');
  for (const s of mine) assert.equal((await s.finished()).reason, 'abort');
  assert.equal((await c.ask({ op: 'abort' }, 'abort')).status, 'not_found', 'nothing is left');
  const had = theirs.tokens.length;
  await until(() => theirs.tokens.length > had + 20, 'the other client’s stream to go on');
  await abortIs(d, theirs);
  await Promise.all([c.close(), d.close()]);
});

test('abort by session', async () => {
  const c = await server.connect();
  const session_id = await c.session();
  const [a, b] = [c.infer(STORY, ENDLESS, { session_id }), c.infer(STORY, { ...ENDLESS, max_tokens: 200 })];
  await Promise.all([a.first(), b.first()]);
  await abortIs(c, a, { session_id });
  assert.equal((await b.done()).end.stats.tokens, 200);
  await c.close();
});

test('abort of what is not there: not_found', async () => {
  const c = await server.connect();
  for (const how of [{ id: 'never' }, { session_id: 'sess_0' }, {}]) assert.equal((await c.ask({ op: 'abort', ...how }, 'abort')).status, 'not_found');
  const s = await c.infer(STORY, { ...GREEDY, max_tokens: 3 }, { id: 'done' }).done();
  assert.equal((await c.ask({ op: 'abort', id: 'done' }, 'abort')).status, 'not_found', 'finished already');
  assert.equal(s.end.reason, 'length');
  const lives = c.infer(STORY, { ...ENDLESS, max_tokens: 200 });
  await lives.first();
  assert.deepEqual(await c.ask({ op: 'abort', id: '' }, 'abort'), { op: 'abort', id: '', status: 'not_found' }, 'an empty id is not all of them');
  assert.equal((await lives.done()).end.reason, 'length');
  await c.close();
});

test('abort of another connection’s id: not_found', async () => {
  const [c, d] = [await server.connect(), await server.connect()];
  const s = c.infer(STORY, ENDLESS, { id: 'private' });
  await s.first();
  assert.equal((await d.ask({ op: 'abort', id: 'private' }, 'abort')).status, 'not_found');
  assert.equal(s.end, null);
  await Promise.all([c.close(), d.close()]);
});

test('abort while queued: it never starts', async () => {
  const c = await one.connect();
  const running = c.infer(STORY, ENDLESS);
  await running.first();
  const waiting = c.infer(STORY, GREEDY);
  const behind = c.infer(STORY, { ...GREEDY, max_tokens: 40 });
  await c.wait((m) => m.op === 'queued' && m.id === behind.id, 'queued');
  assert.deepEqual(waiting.queued.map((q) => q.position), [1]);
  assert.deepEqual(behind.queued.map((q) => q.position), [2]);
  const end = await abortIs(c, waiting);
  assert.equal(end.stats.tokens, 0);
  assert.equal(waiting.tokens.length, 0);
  assert.equal(running.end, null, 'the running one goes on');
  await abortIs(c, running);
  assert.equal((await behind.done()).text, want);
  await c.close();
  await stillRight(one);
});

test('abort while the prompt is read: at once, not after it', async () => {
  const c = await slow.connect();
  for (let i = 0; i < 3; i++) {
    const before = await slow.metrics();
    const s = c.infer(LONG, GREEDY);
    await until(async () => (await slow.metrics()).ic_text_decode_rows_total > before.ic_text_decode_rows_total, 'the prompt to be read');
    const end = await abortIs(c, s);
    assert.equal(end.stats.tokens, 0, 'it was still reading');
    const rows = (await slow.metrics()).ic_text_decode_rows_total - before.ic_text_decode_rows_total;
    assert.ok(rows < end.stats.prompt_tokens, `${rows} of ${end.stats.prompt_tokens} prompt tokens were read`);
  }
  await c.close();
  await stillRight(slow);
});

test('abort right behind the request, before anything else', async () => {
  const c = await server.connect();
  const all = [];
  for (let i = 0; i < 50; i++) {
    const s = c.infer(STORY, ENDLESS);
    c.send({ op: 'abort', id: s.id });
    all.push(s);
    if (i % 10 === 9) await Promise.all(all.map((x) => x.finished()));
  }
  for (const s of all) assert.equal((await s.finished()).reason, 'abort');
  await c.close();
  await stillRight(server);
});

// ---- disconnect ------------------------------------------------------------------------------------------------------

const leave = { close: (c) => c.close(), drop: (c) => c.terminate() };
for (const [name, go] of Object.entries(leave)) {
  test(`disconnect (${name}) while decoding`, async () => {
    for (let i = 0; i < 25; i++) {
      const c = await server.connect();
      const s = [c.infer(STORY, ENDLESS), c.infer(STORY, ENDLESS)];
      await Promise.all(s.map((x) => x.first()));
      go(c);
    }
    await stillRight(server);
  });

  test(`disconnect (${name}) while queued`, async () => {
    const holder = await one.connect();
    const running = holder.infer(STORY, ENDLESS);
    await running.first();
    for (let i = 0; i < 15; i++) {
      const c = await one.connect();
      const s = [c.infer(STORY, GREEDY), c.infer(STORY, GREEDY)];
      await c.wait((m) => m.op === 'queued' && m.id === s[1].id, 'queued');
      go(c);
    }
    await until(async () => (await one.metrics()).ic_text_requests_waiting === 0, 'the queue to be empty');
    assert.equal(running.end, null);
    await abortIs(holder, running);
    await holder.close();
    await stillRight(one);
  });

  test(`disconnect (${name}) while the prompt is read`, async () => {
    for (let i = 0; i < 6; i++) {
      const c = await slow.connect();
      const before = (await slow.metrics()).ic_text_decode_rows_total;
      c.infer(LONG, GREEDY);
      await until(async () => (await slow.metrics()).ic_text_decode_rows_total > before, 'the prompt to be read');
      go(c);
    }
    await stillRight(slow);
    assert.equal((await slow.metrics())['ic_text_tokens_total'] > 0, true);
  });
}

test('disconnect right behind the request', async () => {
  for (let i = 0; i < 40; i++) {
    const c = await server.connect({ hello: false });
    c.infer(STORY, ENDLESS);
    if (i % 2) c.terminate();
    else c.ws.close();
  }
  await stillRight(server);
});

test('disconnect in the middle of the handshake and of a frame', async () => {
  for (let at = 1; at < UPGRADE.length; at += 7) (await rawSocket(server, UPGRADE.slice(0, at))).destroy();
  for (const bytes of [[0x81], [0x81, 0xfe], [0x81, 0xfe, 0x01], [0x81, 0x85, 1, 2, 3, 4, 5], [0x01, 0x83, 0, 0, 0, 0, 65, 66, 67], [0x88, 0x82, 0]]) {
    const s = await rawSocket(server, UPGRADE);
    await until(() => s.got.includes('hello'), 'hello');
    s.write(Buffer.from(bytes));
    s.destroy();
  }
  await stillRight(server);
});

test('what was meant for a client that left reaches nobody else', async () => {
  for (let i = 0; i < 12; i++) {
    const leavers = await Promise.all([server.connect(), server.connect(), server.connect()]);
    const s = leavers.flatMap((c) => [c.infer(STORY, ENDLESS), c.infer(STORY, ENDLESS)]);
    await Promise.all(s.map((x) => x.first()));
    leavers.forEach((c) => c.terminate());
    // Silent connections and fresh clients take the freed places at once.
    const silent = await Promise.all(Array.from({ length: 4 }, () => rawSocket(server)));
    const fresh = await Promise.all([server.connect(), server.connect()]);
    await Promise.all(fresh.map((c) => c.text(STORY, { ...GREEDY, max_tokens: 40 }).then((t) => assert.equal(t, want))));
    for (const c of fresh) {
      const own = new Set(c.streams.keys());
      for (const m of c.log) assert.ok(m.op === 'hello' || own.has(m.id), `a stranger's message: ${JSON.stringify(m)}`);
    }
    for (const r of silent) {
      assert.equal(r.got.length, 0, 'a silent connection gets nothing');
      r.destroy();
    }
    await Promise.all(fresh.map((c) => c.close()));
  }
  await stillRight(server);
});

test('clients that come and go while others are served', async () => {
  const c = await server.connect();
  let stop = false;
  const noise = (async () => {
    for (let i = 0; !stop; i++) {
      const d = await server.connect();
      const s = d.infer('The dog', ENDLESS);
      if (i % 3 === 1) await s.first();
      if (i % 3 === 2) d.send({ op: 'abort', id: s.id });
      if (i % 2) d.terminate();
      else await d.close();
    }
  })();
  for (let i = 0; i < 12; i++) assert.equal(await c.text(STORY, { ...GREEDY, max_tokens: 40 }), want);
  stop = true;
  await noise;
  await c.close();
  await stillRight(server);
});

test('a server under --parallel 1 that is left alone is idle', () => withServer(ONE, async (s) => {
  await stillRight(s);
}));

for (const s of [server, one, slow]) test('the server has survived', () => s.stop());
