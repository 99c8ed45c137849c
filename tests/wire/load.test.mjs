// Many at once: fairness, bounds, priorities, deadlines, and a KV cache smaller than the demand.
import test from 'node:test';
import assert from 'node:assert/strict';
import { ENDLESS, GREEDY, same, Server, until, withServer } from './lib.mjs';

const STORY = 'Once upon a time';
const PROMPTS = ['Once upon a time', 'The dog and the cat', 'One day, a bird', 'Lily went to the', 'Tom had a big red car. ', 'Mom and dad', 'In the park there was a tree', '"Hello," said the bear'];
const server = await Server.start();
const alone = {};
{
  const c = await server.connect();
  for (const p of PROMPTS) alone[p] = await c.infer(p, { ...GREEDY, max_tokens: 60, logprobs: 2 }).done();
  await c.close();
}

test('64 clients at once all get their whole answer', async () => {
  const clients = await Promise.all(Array.from({ length: 64 }, () => server.connect()));
  const s = await Promise.all(clients.map((c, i) => c.infer(PROMPTS[i % PROMPTS.length], { ...GREEDY, max_tokens: 60 }).done()));
  for (const x of s) {
    assert.equal(x.end.stats.tokens, 60);
    assert.equal(x.end.reason, 'length');
    assert.deepEqual(x.tokens.map((t) => t.index), [...Array(60).keys()]);
  }
  s.forEach((x, i) => same(x, alone[PROMPTS[i % PROMPTS.length]]));
  await Promise.all(clients.map((c) => c.close()));
});

test('more than may be decoded at once wait their turn', () => withServer(['--parallel', '4'], async (srv) => {
  const clients = await Promise.all(Array.from({ length: 32 }, () => srv.connect()));
  const s = await Promise.all(clients.map((c, i) => c.infer(PROMPTS[i % PROMPTS.length], { ...GREEDY, max_tokens: 60 }).done()));
  s.forEach((x, i) => same(x, alone[PROMPTS[i % PROMPTS.length]]));
  const queued = s.filter((x) => x.queued.length);
  assert.ok(queued.length > 0, 'some were told to wait');
  for (const x of queued) {
    assert.equal(x.queued.length, 1, 'told once');
    assert.ok(x.queued[0].position >= 1 && x.queued[0].position <= 32);
  }
}));

test('past --queue a request is refused as busy, the others are served', () => withServer(['--parallel', '1', '--queue', '5', '--ctx-size', '16384'], async (srv) => {
  const c = await srv.connect();
  assert.equal(c.hello.limits.queue, 5);
  const running = c.infer(STORY, ENDLESS);
  await running.first();
  const s = Array.from({ length: 20 }, () => c.infer(STORY, { ...GREEDY, max_tokens: 5 }));
  await c.sync();
  const refused = s.filter((x) => x.error);
  assert.ok(refused.length === 15 || refused.length === 14, `${refused.length} refused`); // one may be between inbox and queue
  for (const x of refused) assert.equal((await x.refused()).code, 'busy');
  await until(async () => (await srv.http('/ready')).status === 503, '/ready to say so'); // once the engine has taken them
  assert.equal((await srv.http('/health')).status, 200);
  await c.ask({ op: 'abort', id: running.id }, 'abort');
  for (const x of s) if (!x.error) assert.equal((await x.done()).end.stats.tokens, 5);
  assert.equal((await srv.http('/ready')).status, 200);
}));

test('a connection has a bounded number of requests under way', () => withServer(['--requests', '4', '--ctx-size', '16384'], async (srv) => {
  const [c, d] = [await srv.connect(), await srv.connect()];
  const s = Array.from({ length: 6 }, () => c.infer(STORY, ENDLESS));
  await c.sync();
  for (const x of s.slice(4)) assert.equal((await x.refused()).code, 'busy');
  assert.equal((await d.text(STORY, { ...GREEDY, max_tokens: 5 })).length > 0, true, 'another client is not concerned');
  await c.ask({ op: 'abort' }, 'abort');
  await Promise.all(s.slice(0, 4).map((x) => x.finished()));
  await c.text(STORY, { ...GREEDY, max_tokens: 1 });
}));

test('5000 requests on one connection: busy, no growth', () => withServer([], async (srv) => {
  const c = await srv.connect();
  await c.text(STORY, GREEDY);
  const before = srv.rss();
  const pad = 'Once upon a time '.repeat(20);
  const s = Array.from({ length: 5000 }, () => c.infer(pad, { ...GREEDY, max_tokens: 2 }));
  const ends = { ok: 0, busy: 0 };
  for (const x of s)
    await x.done().then(
      () => ends.ok++,
      () => ends[x.error.code]++,
    );
  assert.equal(ends.ok + ends.busy, 5000, JSON.stringify(ends));
  assert.ok(ends.ok >= 64, JSON.stringify(ends));
  assert.ok(ends.busy > 0, JSON.stringify(ends));
  srv.grownLessThan(64 << 20, before);
}));

test('a prompt that is too long is refused with its length and the limit', async () => {
  const c = await server.connect();
  for (const n of [520, 600, 5000, 100000]) {
    const e = await c.infer('a '.repeat(n), GREEDY).refused();
    assert.equal(e.code, 'too_large');
    const [len, limit] = /(\d+) tokens.* (\d+) fit/.exec(e.message).slice(1).map(Number);
    assert.equal(limit, 511);
    assert.ok(len > 511, e.message);
  }
  assert.equal(await c.text(STORY, { ...GREEDY, max_tokens: 60 }), alone[STORY].text, 'the connection lives');
  // The longest that fits leaves room for one token.
  let long = 'a '.repeat(510);
  for (;; long = long.slice(0, -2)) {
    const s = c.infer(long, GREEDY);
    if (await s.done().then(() => true, () => false)) {
      assert.equal(s.end.stats.prompt_tokens, 511);
      assert.equal(s.end.reason, 'length');
      assert.equal(s.end.stats.tokens, 1);
      break;
    }
    assert.equal(s.error.code, 'too_large');
  }
  await c.close();
});

test('a deadline ends a request while it is decoded', () => withServer(['--ctx-size', '65536'], async (srv) => {
  const c = await srv.connect();
  const s = c.infer(STORY, ENDLESS, { deadline_ms: 150 });
  const end = await s.finished();
  assert.equal(end.reason, 'deadline');
  assert.ok(end.stats.total_ms >= 150);
  assert.equal((await c.infer(STORY, { ...GREEDY, max_tokens: 5 }, { deadline_ms: 60000 }).done()).end.reason, 'length');
}));

test('a deadline ends a request in the queue, and while its prompt is read', () => withServer(['--parallel', '1', '--ctx-size', '32768', '--batch', '16'], async (srv) => {
  const c = await srv.connect();
  const running = c.infer(STORY, ENDLESS);
  await running.first();
  const s = c.infer(STORY, GREEDY, { deadline_ms: 30 });
  assert.equal((await s.finished()).reason, 'deadline');
  assert.equal(s.tokens.length, 0);
  assert.equal(running.end, null);
  await c.ask({ op: 'abort' }, 'abort');
  await running.finished();
  const long = c.infer('Once upon a time there was a cat. '.repeat(2500), GREEDY, { deadline_ms: 30 });
  assert.equal((await long.finished()).reason, 'deadline');
  assert.equal(long.tokens.length, 0);
}));

test('who is more important is served first', () => withServer(['--parallel', '1', '--ctx-size', '16384'], async (srv) => {
  const c = await srv.connect();
  const running = c.infer(STORY, ENDLESS, { priority: 'high' }); // else it would be put back
  await running.first();
  const order = [];
  c.onmessage = (m) => m.op === 'end' && order.push(m.id);
  const wanted = [['l1', 'low'], ['n1', 'normal'], ['h1', 'high'], ['n2'], ['l2', 'low'], ['h2', 'high']];
  const s = wanted.map(([id, priority]) => c.infer(STORY, { ...GREEDY, max_tokens: 3 }, { id, priority }));
  await c.sync();
  await c.ask({ op: 'abort', id: running.id }, 'abort');
  await Promise.all(s.map((x) => x.done()));
  assert.deepEqual(order, [running.id, 'h1', 'h2', 'n1', 'n2', 'l1', 'l2']);
}));

test('a high one takes the place of one that runs, which goes on later as if nothing had been', () => withServer(['--parallel', '1'], async (srv) => {
  const c = await srv.connect();
  const want = await c.infer(STORY, { ...GREEDY, max_tokens: 300, logprobs: 2 }).done();
  const running = c.infer(STORY, { ...GREEDY, max_tokens: 300 });
  await running.first();
  const high = await c.infer('The dog', { ...GREEDY, max_tokens: 5 }, { priority: 'high' }).done();
  assert.equal(high.tokens.length, 5);
  assert.ok(!running.end, 'it has not had to wait for its end');
  assert.equal((await srv.metrics()).ic_text_preemptions_total, 1);
  same(await running.done(), want);
}));

// Eight requests of up to 512 tokens over 700 cells: somebody has to give way, is computed again, and nothing is lost.
test('a KV cache smaller than the demand: preempted, complete, and the same text', () => withServer(['--kv-size', '700', '--parallel', '8'], async (srv) => {
  const c = await srv.connect();
  const want = {};
  for (const p of PROMPTS) want[p] = await c.infer(p, { ...GREEDY, max_tokens: 250, logprobs: 2 }).done();
  assert.equal((await srv.metrics()).ic_text_preemptions_total, 0);
  const s = await Promise.all(PROMPTS.map((p) => c.infer(p, { ...GREEDY, max_tokens: 250 }).done()));
  assert.ok((await srv.metrics()).ic_text_preemptions_total > 0, 'somebody gave way');
  for (const [i, x] of s.entries()) {
    same(x, want[PROMPTS[i]]);
    assert.ok(x.end.reason === 'stop' || x.end.stats.tokens === 250, 'complete');
    x.tokens.forEach((t, k) => assert.ok(k === 0 || t.index > x.tokens[k - 1].index, 'no token twice'));
  }
  assert.ok((await srv.metrics()).ic_text_kv_tokens_used <= 700);
}));

test('the server has survived', () => server.stop());
