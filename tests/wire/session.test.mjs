// Sessions: a conversation goes on, belongs to its connection, and ends with it.
import test from 'node:test';
import assert from 'node:assert/strict';
import { ENDLESS, GREEDY, Server, until, withServer } from './lib.mjs';

const server = await Server.start(['--sessions', '3']);
const STORY = 'Once upon a time';

test('a conversation goes on where it stopped, its KV kept', async () => {
  const c = await server.connect();
  const session_id = await c.session();
  assert.match(session_id, /^sess_[0-9a-f]{32}$/);
  const a = await c.infer(STORY, { ...GREEDY, max_tokens: 30 }, { session_id }).done();
  assert.equal(a.end.session_id, session_id);
  assert.ok(a.tokens.every((t) => t.session_id === session_id));
  assert.equal(a.end.stats.cached_tokens, 0);
  const b = await c.infer(' Then', { ...GREEDY, max_tokens: 30 }, { session_id }).done();
  const known = a.end.stats.prompt_tokens + a.end.stats.tokens;
  assert.ok(b.end.stats.cached_tokens >= known - 1, `${b.end.stats.cached_tokens} of ${known} tokens were there`);
  assert.ok(b.end.stats.prompt_tokens > known);
  const once = await c.text(`${STORY}${a.text} Then`, { ...GREEDY, max_tokens: 30 });
  assert.equal(b.text, once, 'the same as when all of it is sent at once');
  const d = await c.infer(' She', { ...GREEDY, max_tokens: 5 }, { session_id }).done();
  assert.ok(d.end.stats.cached_tokens > b.end.stats.cached_tokens);
  await c.close();
});

test('sessions of one client know nothing of each other', async () => {
  const c = await server.connect();
  const [x, y] = [await c.session(), await c.session()];
  await c.text('The dog and the cat', { ...GREEDY, max_tokens: 20 }, { session_id: x });
  const first = await c.infer(STORY, { ...GREEDY, max_tokens: 20 }, { session_id: y, cache_salt: 'y' }).done();
  assert.equal(first.end.stats.cached_tokens, 0);
  assert.equal(first.text, await c.text(STORY, { ...GREEDY, max_tokens: 20 }));
  await c.close();
});

test('a conversation survives an abort and goes on from what was said', async () => {
  const c = await server.connect();
  const session_id = await c.session();
  const a = c.infer(STORY, ENDLESS, { session_id });
  await a.first();
  assert.equal((await c.ask({ op: 'abort', session_id }, 'abort')).status, 'aborted');
  assert.equal((await a.finished()).reason, 'abort');
  const b = await c.infer(' The end.', { ...GREEDY, max_tokens: 10 }, { session_id }).done();
  assert.ok(b.end.stats.cached_tokens > 0);
  await c.close();
});

test('closing a session ends what it generates', async () => {
  const c = await server.connect();
  const session_id = await c.session();
  const s = c.infer(STORY, ENDLESS, { session_id });
  const behind = c.infer(STORY, GREEDY, { session_id });
  const other = c.infer(STORY, { ...GREEDY, max_tokens: 200 });
  await s.first();
  assert.equal((await c.ask({ op: 'close_session', session_id }, 'session_closed')).session_id, session_id);
  assert.equal((await s.finished()).reason, 'abort');
  assert.equal((await behind.finished()).reason, 'abort');
  assert.equal((await other.done()).end.reason, 'length', 'others go on');
  const e = await c.infer(STORY, GREEDY, { session_id }).refused();
  assert.equal(e.code, 'not_found');
  await c.close();
});

test('closing while generating, again and again, harms nobody', async () => {
  const c = await server.connect();
  const want = await c.text(STORY, { ...GREEDY, max_tokens: 30 });
  for (let i = 0; i < 60; i++) {
    const session_id = await c.session();
    const s = c.infer(STORY, ENDLESS, { session_id });
    if (i % 3) await s.first();
    if (i % 2) await c.ask({ op: 'close_session', session_id }, 'session_closed');
    else c.send({ op: 'close_session', session_id });
    assert.equal((await s.finished()).reason, 'abort');
  }
  assert.equal(await c.text(STORY, { ...GREEDY, max_tokens: 30 }), want);
  await c.close();
});

test('an unknown session is not found, and neither is a stranger’s', async () => {
  const [a, b] = [await server.connect(), await server.connect()];
  const session_id = await a.session();
  const mine = a.infer(STORY, ENDLESS, { session_id });
  await mine.first();
  for (const s of [session_id, 'sess_00000000', '', 'x']) {
    const e = await b.infer(STORY, GREEDY, { session_id: s }).refused();
    assert.equal(e.code, 'not_found', s);
  }
  assert.equal((await b.ask({ op: 'abort', session_id }, 'abort')).status, 'not_found', 'nor can a stranger abort it');
  await b.bad({ op: 'close_session', session_id }, 'not_found');
  const had = mine.tokens.length;
  await until(() => mine.tokens.length > had || mine.end, 'the stream to go on');
  assert.ok(!mine.end || mine.end.reason === 'length');
  await Promise.all([a.close(), b.close()]);
});

test('requests of one session are served one after the other, in order', async () => {
  const c = await server.connect();
  const session_id = await c.session();
  const order = [];
  c.onmessage = (m) => ['token', 'end'].includes(m.op) && order.push(`${m.id}:${m.op}`);
  const a = c.infer(STORY, { ...GREEDY, max_tokens: 60 }, { session_id, id: 'a' });
  const b = c.infer(' Then', { ...GREEDY, max_tokens: 60 }, { session_id, id: 'b' });
  const d = c.infer(' And', { ...GREEDY, max_tokens: 60 }, { session_id, id: 'd' });
  await Promise.all([a.done(), b.done(), d.done()]);
  const seen = order.filter((o, i) => o !== order[i - 1]);
  assert.deepEqual(seen, ['a:token', 'a:end', 'b:token', 'b:end', 'd:token', 'd:end']);
  assert.equal(b.text, await c.text(`${STORY}${a.text} Then`, { ...GREEDY, max_tokens: 60 }));
  assert.ok(d.end.stats.cached_tokens > b.end.stats.cached_tokens);
  await c.close();
});

test('the limit of sessions is kept, and closing one makes room', async () => {
  const c = await server.connect();
  const all = [await c.session(), await c.session(), await c.session()];
  const e = await c.ask({ op: 'create_session' }, (m) => /^session_/.test(m.op));
  assert.equal(e.op, 'session_error');
  assert.equal(e.error, 'Failed to create session (limit reached)');
  await c.ask({ op: 'close_session', session_id: all[1] }, 'session_closed');
  assert.match(await c.session(), /^sess_/);
  await c.close();
});

test('sessions die with their connection', () => withServer(['--sessions', '3'], async (server) => {
  const c = await server.connect();
  const session_id = await c.session();
  await c.text(STORY, { ...GREEDY, max_tokens: 5 }, { session_id });
  assert.ok((await server.metrics()).ic_text_sessions >= 1);
  c.terminate();
  await until(async () => (await server.metrics()).ic_text_sessions === 0, 'the session to go');
  const d = await server.connect();
  assert.equal((await d.infer(STORY, GREEDY, { session_id }).refused()).code, 'not_found');
  for (let i = 0; i < 3; i++) assert.match(await d.session(), /^sess_/, 'and do not count any more');
}));

test('a session that is full says so', async () => {
  const c = await server.connect();
  const session_id = await c.session();
  const a = await c.infer(STORY, { temp: 0, grammar: 'root ::= [a-z] root' }, { session_id }).done();
  assert.equal(a.end.reason, 'length');
  const e = await c.infer(' more', GREEDY, { session_id }).refused();
  assert.equal(e.code, 'too_large');
  assert.equal(e.session_id, session_id);
  await c.close();
});

test('a refused request leaves the conversation as it was', async () => {
  const c = await server.connect();
  const session_id = await c.session();
  const a = await c.infer(STORY, { ...GREEDY, max_tokens: 20 }, { session_id }).done();
  assert.equal((await c.infer('x'.repeat(3000), GREEDY, { session_id }).refused()).code, 'too_large');
  assert.equal((await c.infer(' x', { grammar: 'root ::= "' }, { session_id }).refused()).code, 'bad_request');
  assert.equal((await c.infer([{ role: 'user', content: 'x' }], GREEDY, { session_id }).refused()).code, 'bad_request');
  const b = await c.infer(' Then', { ...GREEDY, max_tokens: 20 }, { session_id }).done();
  assert.equal(b.text, await c.text(`${STORY}${a.text} Then`, { ...GREEDY, max_tokens: 20 }));
  await c.close();
});

test('more sessions than sequences: idle ones lose their KV, not their words', async () => {
  const few = await Server.start(['--parallel', '2', '--sessions', '6']);
  const c = await few.connect();
  const sessions = [];
  for (let i = 0; i < 6; i++) sessions.push(await c.session());
  const first = [];
  for (const session_id of sessions) first.push(await c.text(STORY, { temp: 1, seed: first.length + 1, max_tokens: 20 }, { session_id }));
  assert.equal(new Set(first).size, 6);
  const next = await Promise.all(sessions.map((session_id) => c.text(' Then', { ...GREEDY, max_tokens: 20 }, { session_id })));
  for (const [i, f] of first.entries())
    assert.equal(next[i], await c.text(`${STORY}${f} Then`, { ...GREEDY, max_tokens: 20 }), `session ${i}`);
  await few.stop();
});

test('the server has survived', () => server.stop());
