// What a client written for InferenceCenter sends and expects: field names, texts, the first frame. And what it could
// do to that server and cannot do to this one.
import test from 'node:test';
import assert from 'node:assert/strict';
import { ENDLESS, GREEDY, Server, checkError } from './lib.mjs';

const server = await Server.start();
const HEADERS = { 'X-Client-ID': 'jota', 'X-API-Key': 'secret' };
const STORY = 'Once upon a time';

test('auth_success comes first when headers carry credentials, then hello', async () => {
  const c = await server.connect({ headers: HEADERS });
  assert.deepEqual(c.log.slice(0, 2).map((m) => m.op), ['auth_success', 'hello']);
  assert.equal(c.log[0].client_id, 'jota');
  assert.equal(typeof c.log[0].max_sessions, 'number');
  await c.close();
  const d = await server.connect();
  assert.equal(d.log[0].op, 'hello', 'and hello without');
  await d.close();
});

test('hello on request: status, message, uptime', async () => {
  const c = await server.connect({ headers: HEADERS });
  const h = await c.ask({ op: 'hello' }, 'hello');
  assert.equal(h.status, 'ready');
  assert.equal(h.message, 'Server is available');
  assert.ok(Number.isInteger(h.uptime_seconds) && h.uptime_seconds >= 0);
  assert.equal(typeof h.requires_auth, 'boolean');
  await c.close();
});

test('the auth op of its older clients', async () => {
  const c = await server.connect();
  const a = await c.ask({ op: 'auth', client_id: 'old', api_key: 'anything' }, (m) => /^auth_/.test(m.op));
  assert.equal(a.op, 'auth_success');
  assert.equal(a.client_id, 'old');
  for (const bad of [{ client_id: 5 }, { api_key: {} }, { client_id: 'x'.repeat(500) }]) {
    const f = await c.ask({ op: 'auth', client_id: 'a', api_key: 'b', ...bad }, (m) => /^auth_/.test(m.op));
    assert.equal(f.op, 'auth_failed');
    assert.equal(typeof f.reason, 'string');
  }
  await c.close();
});

test('the life of a session: created, token, end, closed', async () => {
  const c = await server.connect({ headers: HEADERS });
  const made = await c.ask({ op: 'create_session' }, 'session_created');
  const { session_id } = made;
  assert.match(session_id, /^sess_/);
  const from = c.mark();
  c.send({ op: 'infer', session_id, prompt: STORY, params: { temp: 0, max_tokens: 5 } });
  const end = await c.wait((m) => m.op === 'end', 'end', from);
  const tokens = c.log.slice(from).filter((m) => m.op === 'token');
  assert.equal(tokens.length, 5);
  assert.ok([...tokens, end].every((m) => m.session_id === session_id));
  for (const k of ['ttft_ms', 'total_ms', 'tokens', 'tps']) assert.equal(typeof end.stats[k], 'number', k);
  assert.equal((await c.ask({ op: 'close_session', session_id }, 'session_closed')).session_id, session_id);
  await c.close();
});

test('abort by session: acknowledged, then the ordinary end', async () => {
  const c = await server.connect();
  const session_id = await c.session();
  c.send({ op: 'infer', session_id, prompt: STORY, params: ENDLESS });
  await c.wait((m) => m.op === 'token', 'a token');
  const ack = await c.ask({ op: 'abort', session_id }, 'abort');
  assert.equal(ack.status, 'aborted');
  assert.equal(ack.session_id, session_id);
  assert.equal((await c.wait((m) => m.op === 'end', 'end')).session_id, session_id);
  assert.equal((await c.ask({ op: 'abort', session_id }, 'abort')).status, 'not_found');
  await c.close();
});

test('its error texts', async () => {
  const c = await server.connect();
  const says = async (m, error) => {
    const e = await c.ask(m, 'error');
    checkError(e);
    assert.match(e.error, error);
  };
  await says({}, /^Missing 'op' field$/);
  await says({ op: 'nonsense' }, /^Unknown operation: nonsense$/);
  await says({ op: 'infer', session_id: 'sess_nope', prompt: 'x' }, /^Session not found or access denied$/);
  await says({ op: 'close_session', session_id: 'sess_nope' }, /^Session not found or access denied$/);
  await says({ op: 'close_session' }, /^Missing session_id$/);
  for (let i = 0; i < 8; i++) await c.session();
  const full = await c.ask({ op: 'create_session' }, 'session_error');
  assert.equal(full.error, 'Failed to create session (limit reached)');
  await c.close();
});

test('the plan’s names: upper case ops and a payload', async () => {
  const c = await server.connect();
  const from = c.mark();
  c.send({ op: 'GENERATE', payload: { id: 'p', prompt: STORY, params: { temp: 0, max_tokens: 5 } } });
  const end = await c.wait((m) => m.op === 'end', 'end', from);
  assert.equal(end.id, 'p');
  assert.equal(c.log.slice(from).filter((m) => m.op === 'token' && 'prob' in m).length, 5);
  c.send({ op: 'Generate', payload: { id: 'q', prompt: STORY, params: ENDLESS } });
  await c.wait((m) => m.op === 'token' && m.id === 'q', 'a token of q');
  assert.equal((await c.ask({ op: 'ABORT' }, 'abort')).status, 'aborted');
  assert.equal((await c.wait((m) => m.op === 'end' && m.id === 'q', 'end of q')).reason, 'abort');
  await c.close();
});

test('metrics: subscribed, one comes, unsubscribed', async () => {
  const c = await server.connect();
  await c.text(STORY, { ...GREEDY, max_tokens: 7 });
  await c.session();
  assert.equal((await c.ask({ op: 'subscribe_metrics' }, 'metrics_subscribed')).message, 'Subscribed to metrics updates');
  const running = c.infer(STORY, ENDLESS);
  await running.first();
  const prom = await server.metrics();
  const m = await c.wait((x) => x.op === 'metrics', 'metrics');
  assert.ok(Math.abs(m.timestamp - Date.now() / 1000) < 600, 'seconds');
  for (const k of ['temp', 'vram_total_mb', 'vram_used_mb', 'vram_free_mb', 'power_watts', 'fan_percent', 'throttling'])
    assert.ok(m.gpu[k] === null || ['number', 'boolean'].includes(typeof m.gpu[k]), k);
  if (!prom.ic_gpu_temperature_celsius) assert.equal(m.gpu.temp, null, 'no GPU: null, not 0');
  const i = m.inference;
  for (const k of ['active_generations', 'total_sessions', 'last_tps', 'last_ttft_ms', 'total_tokens_generated']) assert.equal(typeof i[k], 'number', k);
  assert.ok(i.total_sessions >= 1);
  assert.ok(i.total_tokens_generated >= 7, 'a total, not the last request’s');
  assert.ok(i.last_tps > 0);
  assert.equal((await c.ask({ op: 'unsubscribe_metrics' }, 'metrics_unsubscribed')).message, 'Unsubscribed from metrics updates');
  await c.close();
});

// Its "[run]" failures that no other file here has.

test('é, alone, and 0xFF in a binary frame: an error and no end of the server', async () => {
  const c = await server.connect();
  await c.bad('é', 'bad_request');
  await c.bad(Buffer.from([0xff]), 'bad_request', { binary: true });
  assert.match((await c.bad({ op: 'é"\\\n\u2028' }, 'bad_request')).error, /^Unknown operation: é"\\/);
  await c.close();
});

test('max_tokens and temp are obeyed', async () => {
  const c = await server.connect();
  assert.equal((await c.infer(STORY, { max_tokens: 5 }).done()).tokens.length, 5);
  assert.notEqual(await c.text(STORY, { temp: 0, max_tokens: 60 }), await c.text(STORY, { temp: 5, seed: 1, max_tokens: 60, top_k: 0, top_p: 1, min_p: 0 }));
  await c.close();
});

test('a prompt past the batch size, and past the context', async () => {
  const small = await Server.start(['--batch', '64', '--parallel', '8', '--ctx-size', '2048']);
  const c = await small.connect();
  assert.equal((await c.infer('a b '.repeat(500), { ...GREEDY, max_tokens: 3 }).done()).end.reason, 'length');
  assert.equal((await c.infer('a b '.repeat(5000), GREEDY).refused()).code, 'too_large');
  await small.stop();
});

test('control tokens do not leak into the content, and those in a prompt are text', async () => {
  const c = await server.connect();
  const s = await c.infer(STORY, { temp: 0, max_tokens: 500 }).done();
  assert.doesNotMatch(s.text, /<\/?s>/);
  const spelled = await c.infer('<s></s>', { ...GREEDY, max_tokens: 1 }).done();
  assert.ok(spelled.end.stats.prompt_tokens >= 7, `${spelled.end.stats.prompt_tokens} tokens: spelled, not two control tokens`);
  await c.close();
});

test('27 000 hellos from a client that does read are all answered', async () => {
  const c = await server.connect();
  const from = c.mark();
  for (let i = 0; i < 27; i++) {
    for (let k = 0; k < 1000; k++) c.send('{"op":"ping"}');
    await c.sync();
  }
  assert.equal(c.log.slice(from).filter((m) => m.op === 'hello').length, 27000);
  await c.close();
});

test('two servers cannot share a port', async () => {
  const { run, MODEL } = await import('./lib.mjs');
  const r = await run(['serve', '--model', MODEL, '--port', String(server.port)]);
  assert.equal(r.code, 3);
  assert.match(r.stderr.trim().split('\n').at(-1), /^inference-core: .*in use/);
});

test('the server has survived', () => server.stop());
