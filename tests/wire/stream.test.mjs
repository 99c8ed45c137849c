// Streaming: ids, interleaving, whole characters, what a token and an end carry.
import test from 'node:test';
import assert from 'node:assert/strict';
import { ENDLESS, GREEDY, Server, checkError } from './lib.mjs';

const server = await Server.start();

test('hello says what the server is and where its limits lie', async () => {
  const c = await server.connect();
  const h = c.hello;
  assert.equal(h.status, 'ready');
  assert.equal(h.model, 'stories260K-f32');
  assert.equal(h.protocol, 1);
  assert.equal(h.requires_auth, false);
  assert.ok(Array.isArray(h.laws));
  assert.match(h.version, /^\d+\.\d+/);
  const limits = ['message_bytes', 'outbox_bytes', 'connections', 'requests_per_connection', 'sessions', 'queue', 'context_tokens', 'prompt_tokens'];
  for (const l of limits) assert.ok(h.limits[l] > 0, l);
  assert.equal(h.limits.context_tokens, 512);
  assert.equal(c.log[0], h, 'hello comes first and unasked');
  for (const op of ['hello', 'ping', 'HELLO', 'Ping']) assert.equal((await c.ask({ op }, 'hello')).status, 'ready');
  await c.close();
});

test('an answer comes token by token, in order, and then its end', async () => {
  const c = await server.connect();
  const s = await c.infer('Once upon a time', { ...GREEDY, max_tokens: 40 }).done();
  assert.equal(s.tokens.length, 40, 'plain text of this vocabulary: one message a token');
  assert.deepEqual(s.tokens.map((t) => t.index), [...Array(40).keys()]);
  for (const t of s.tokens) {
    assert.ok(t.prob > 0 && t.prob <= 1, `prob ${t.prob}`);
    assert.ok(t.content.length > 0);
    assert.deepEqual(Object.keys(t), ['op', 'id', 'content', 'index', 'prob']);
  }
  assert.equal(s.end.reason, 'length');
  assert.match(s.text, /^, there was a little girl/);
  await c.close();
});

test('the statistics of an end are plausible', async () => {
  const c = await server.connect();
  const s = await c.infer('Once upon a time', { ...GREEDY, max_tokens: 30 }).done();
  const st = s.end.stats;
  assert.equal(st.tokens, 30);
  assert.ok(st.prompt_tokens > 4 && st.prompt_tokens <= 'Once upon a time'.length + 2, `prompt_tokens ${st.prompt_tokens}`);
  assert.ok(0 <= st.cached_tokens && st.cached_tokens < st.prompt_tokens, 'somebody may have begun alike');
  assert.equal(st.ms, st.total_ms);
  assert.ok(0 <= st.queue_ms && st.queue_ms <= st.ttft_ms && 0 < st.ttft_ms && st.ttft_ms <= st.total_ms, JSON.stringify(st));
  const rest_s = (st.total_ms - st.ttft_ms) / 1000;
  assert.ok(st.tps >= 29 / rest_s / 1.5, `tps ${st.tps} over ${rest_s} s`);
  await c.close();
});

test('two prompts are streamed at once', async () => {
  const c = await server.connect();
  const order = [];
  c.onmessage = (m) => m.op === 'token' && order.push(m.id);
  const a = c.infer('Once upon a time', { ...ENDLESS, max_tokens: 300 });
  const b = c.infer('The dog and the cat', { ...ENDLESS, max_tokens: 300 });
  await Promise.all([a.done(), b.done()]);
  const turns = order.filter((id, i) => i > 0 && id !== order[i - 1]).length;
  assert.ok(turns > 100, `tokens of the two interleave (${turns} turns in ${order.length})`);
  assert.equal(a.tokens.length + b.tokens.length, order.length, 'every token carries one of the two ids');
  await c.close();
});

test('streams at once say the same as alone', async () => {
  const c = await server.connect();
  const prompts = ['Once upon a time', 'The dog and the cat', 'Tom had a big red car. ', 'Mom and dad']; // no ties in their first 80 tokens
  const alone = [];
  for (const p of prompts) alone.push(await c.text(p, { ...GREEDY, max_tokens: 80 }));
  const both = await Promise.all(prompts.map((p) => c.text(p, { ...GREEDY, max_tokens: 80 })));
  assert.deepEqual(both, alone);
  assert.equal(new Set(alone).size, prompts.length);
  await c.close();
});

test('one connection serves many requests', async () => {
  const c = await server.connect();
  for (let i = 0; i < 100; i++) {
    const s = await c.infer('Once', { ...GREEDY, max_tokens: 3 }).done();
    assert.equal(s.end.stats.tokens, 3);
  }
  const all = await Promise.all(Array.from({ length: 50 }, () => c.text('Once', { ...GREEDY, max_tokens: 3 })));
  assert.equal(new Set(all).size, 1);
  await c.close();
});

test('ids are echoed as they are, and chosen by the server where absent', async () => {
  const c = await server.connect();
  for (const id of ['a', 'ü😀', '"quoted\\"', 'x'.repeat(128), 'r1', ' ', '\u0001'])
    assert.equal((await c.infer('Once', { ...GREEDY, max_tokens: 1 }, { id }).done()).end.id, id);
  await c.close();
  const d = await server.connect();
  d.send({ op: 'infer', prompt: 'Once', params: { ...GREEDY, max_tokens: 20 } });
  d.send({ op: 'infer', prompt: 'Once', params: { ...GREEDY, max_tokens: 20 } });
  const ends = [];
  await d.wait((m) => m.op === 'end' && ends.push(m.id) === 2, 'two ends');
  assert.notEqual(ends[0], ends[1]);
  for (const id of ends) assert.equal(d.log.filter((m) => m.op === 'token' && m.id === id).length, 20, 'each its own');
  await d.close();
});

test('an id chosen by the server avoids those in use', async () => {
  const c = await server.connect();
  const mine = c.infer('Once', { ...ENDLESS }, { id: 'r1' });
  await mine.first();
  const from = c.mark();
  c.send({ op: 'infer', prompt: 'Once', params: { ...GREEDY, max_tokens: 2 } });
  const other = await c.wait((m) => m.op === 'end' && m.id !== 'r1' && m.reason === 'length', 'the other end', from);
  assert.match(other.id, /^r\d+$/);
  await c.close();
});

test('an id under way cannot be used twice, and the first request goes on', async () => {
  const c = await server.connect();
  const s = c.infer('Once upon a time', { ...ENDLESS, max_tokens: 400 }, { id: 'twin' });
  await s.first();
  const from = c.mark();
  c.send({ op: 'infer', id: 'twin', prompt: 'Once' });
  const e = await c.wait((m) => m.op === 'error', 'the refusal', from);
  checkError(e);
  assert.equal(e.code, 'bad_request');
  assert.equal(e.id, 'twin');
  s.error = null; // it was the other one's
  await s.finished();
  assert.equal(s.end.stats.tokens, 400);
  assert.equal((await c.text('Once', { ...GREEDY, max_tokens: 1 }, { id: 'twin' })).length > 0, true, 'free again after its end');
  await c.close();
});

test('the same id on two connections is two requests', async () => {
  const [a, b] = await Promise.all([server.connect(), server.connect()]);
  const [x, y] = await Promise.all([
    a.infer('Once upon a time', { ...GREEDY, max_tokens: 30 }, { id: 'same' }).done(),
    b.infer('The dog and the cat', { ...GREEDY, max_tokens: 30 }, { id: 'same' }).done(),
  ]);
  assert.notEqual(x.text, y.text);
  assert.equal(x.tokens.length, 30);
  assert.equal(y.tokens.length, 30);
  await Promise.all([a.close(), b.close()]);
});

// The vocabulary has no token for these characters: the model must write them byte by byte. The client's WebSocket
// library refuses text that is not UTF-8, so every message is checked; a broken character would show as U+FFFD.
for (const want of ['héllo 😀 wörld', '日本語 — ¿qué?', '😀😀😀', 'ü', 'a\u0301\u200d👩‍👩‍👧', '\u{10FFFF}\u0800\u07ff'])
  test(`characters split over byte tokens come whole: ${JSON.stringify(want)}`, async () => {
    const c = await server.connect();
    const s = await c.infer('Say it: ', { ...GREEDY, grammar: `root ::= ${JSON.stringify(want)}` }).done();
    assert.equal(s.text, want);
    assert.equal(s.end.reason, 'stop');
    assert.ok(s.end.stats.tokens > [...want].length, `${s.end.stats.tokens} tokens for ${[...want].length} characters: bytes were joined`);
    for (const t of s.tokens) assert.ok(t.content.isWellFormed?.() ?? true);
    const bytes = Buffer.byteLength(want);
    assert.ok(s.tokens.length <= bytes);
    await c.close();
  });

test('an answer cut off inside a character says so with U+FFFD and not with half a character', async () => {
  const c = await server.connect();
  const s = await c.infer('Say it: ', { ...GREEDY, grammar: 'root ::= "😀😀"', max_tokens: 6 }).done();
  assert.equal(s.end.reason, 'length');
  assert.match(s.text, /^😀\uFFFD*$/u);
  await c.close();
});

test('a prompt of any characters is taken', async () => {
  const c = await server.connect();
  for (const p of ['é', '😀', 'naïve café — “quoted” 日本語', '\u0001', '\n\n\t', '\ufeff', ' ', '<s></s>', '\u{10FFFF}']) {
    const s = await c.infer(p, { ...GREEDY, max_tokens: 4 }).done();
    assert.ok(s.end.stats.prompt_tokens >= 2, `${JSON.stringify(p)} has ${s.end.stats.prompt_tokens} tokens`);
    assert.ok(s.end.stats.prompt_tokens <= Buffer.byteLength(p) + 2);
  }
  await c.close();
});

test('the server has survived', () => server.stop());
