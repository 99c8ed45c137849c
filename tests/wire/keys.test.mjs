// --keys: who may come in, by header, bearer or op, and how many sessions each may have.
import test from 'node:test';
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { GREEDY, Server, run, MODEL, tempDir } from './lib.mjs';

const A = 'alice-key-0123456789abcdef', B = 'bob-key-0123456789abcdefgh';
const dir = fs.mkdtempSync(path.join(os.tmpdir(), 'ic-keys-'));
process.on('exit', () => fs.rmSync(dir, { recursive: true, force: true }));
const file = path.join(dir, 'keys.ini');
fs.writeFileSync(file, `[alice]\nkey = ${A}\nmax_sessions = 2\n[bob]\nkey = ${B}\n`);
const server = await Server.start(['--keys', file, '--sessions', '5']);
const good = { 'X-Client-ID': 'alice', 'X-API-Key': A };

async function refused(headers) {
  const e = await server.connect({ headers }).then(() => assert.fail(`let in with ${JSON.stringify(headers)}`), (x) => x);
  assert.equal(e.status, 401, String(e));
  assert.match(e.headers['content-type'], /^application\/json/);
  const body = JSON.parse(e.body);
  assert.equal(body.error, 'Invalid credentials');
}

test('right headers: in, and told so first', async () => {
  const c = await server.connect({ headers: good });
  assert.equal(c.log[0].op, 'auth_success');
  assert.equal(c.log[0].client_id, 'alice');
  assert.equal(c.log[0].max_sessions, 2);
  assert.equal(c.hello.requires_auth, true);
  assert.equal(c.hello.limits.sessions, 2);
  assert.ok((await c.text('Once', { ...GREEDY, max_tokens: 2 })).length);
  await c.close();
});

test('a bearer alone is enough', async () => {
  const c = await server.connect({ headers: { Authorization: `Bearer ${B}` } });
  assert.equal(c.log[0].op, 'auth_success');
  assert.equal(c.log[0].client_id, 'bob');
  assert.equal(c.log[0].max_sessions, 5);
  await c.close();
});

test('wrong headers: 401 before the upgrade', async () => {
  for (const h of [
    { 'X-Client-ID': 'alice', 'X-API-Key': B },
    { 'X-Client-ID': 'alice', 'X-API-Key': 'x' },
    { 'X-Client-ID': 'alice', 'X-API-Key': A.slice(0, -1) },
    { 'X-Client-ID': 'alice', 'X-API-Key': `${A}x` },
    { 'X-Client-ID': 'alice', 'X-API-Key': A.toUpperCase() },
    { 'X-Client-ID': 'nobody', 'X-API-Key': A },
    { 'X-Client-ID': 'alice', 'X-API-Key': 'x'.repeat(2000) },
    { Authorization: 'Bearer nonsense' },
    { Authorization: `Bearer ${A}${A}` },
  ])
    await refused(h);
});

test('without credentials: connected, but nothing is done until auth', async () => {
  const c = await server.connect();
  assert.equal(c.log[0].op, 'hello');
  assert.equal(c.hello.requires_auth, true);
  for (const m of [{ op: 'infer', id: 'i', prompt: 'x' }, { op: 'abort' }, { op: 'close_session', session_id: 'x' }, { op: 'subscribe_metrics' }, { op: 'unsubscribe_metrics' }]) {
    const e = await c.bad(m, 'unauthorized');
    assert.equal(e.error, 'Not authenticated');
    assert.equal(e.id, m.id);
  }
  const se = await c.ask({ op: 'create_session' }, (m) => /^session_/.test(m.op));
  assert.equal(se.op, 'session_error');
  assert.equal(se.error, 'Not authenticated');
  const fail = async (m, reason) => {
    const f = await c.ask({ op: 'auth', ...m }, (x) => /^auth_/.test(x.op));
    assert.deepEqual([f.op, f.reason], ['auth_failed', reason]);
  };
  await fail({}, 'Missing client_id or api_key');
  await fail({ client_id: 'alice' }, 'Missing client_id or api_key');
  await fail({ client_id: 'alice', api_key: B }, 'Invalid credentials');
  await fail({ client_id: 'bob', api_key: A }, 'Invalid credentials');
  await fail({ client_id: 'alice', api_key: '' }, 'Invalid credentials');
  await c.bad({ op: 'infer', prompt: 'x' }, 'unauthorized');
  const ok = await c.ask({ op: 'auth', client_id: 'alice', api_key: A }, (x) => /^auth_/.test(x.op));
  assert.equal(ok.op, 'auth_success');
  assert.equal(ok.max_sessions, 2);
  assert.ok((await c.text('Once', { ...GREEDY, max_tokens: 2 })).length);
  await c.close();
});

test('sessions are counted over all connections of a client', async () => {
  const [a, b, other] = [await server.connect({ headers: good }), await server.connect({ headers: good }), await server.connect({ headers: { Authorization: `Bearer ${B}` } })];
  assert.ok(await a.session());
  assert.ok(await b.session());
  assert.equal((await b.ask({ op: 'create_session' }, (m) => /^session_/.test(m.op))).op, 'session_error');
  for (let i = 0; i < 5; i++) assert.ok(await other.session(), 'another client has its own');
  await Promise.all([a.close(), b.close(), other.close()]);
});

test('HTTP: what tells the state is open, the rest needs a key', async () => {
  for (const p of ['/health', '/ready', '/metrics']) assert.equal((await server.http(p)).status, 200, p);
  const no = await server.http('/v1/models');
  assert.equal(no.status, 401);
  assert.equal(no.json.error.code, 'unauthorized');
  assert.match(no.headers['www-authenticate'], /Bearer/);
  assert.equal((await server.http('/v1/models', { headers: { Authorization: 'Bearer nonsense' } })).status, 401);
  assert.equal((await server.http('/v1/models', { headers: { Authorization: `Bearer ${A}` } })).status, 200);
  assert.equal((await server.http('/v1/models', { headers: good })).status, 200);
});

test('ask --key', async () => {
  const with_key = await run(['ask', '--port', String(server.port), '--raw', '--max-tokens', '3', '--key', A, 'Once']);
  assert.equal(with_key.code, 0, with_key.stderr);
  assert.ok(with_key.stdout.trim().length > 0);
  for (const more of [[], ['--key', 'wrong']]) {
    const r = await run(['ask', '--port', String(server.port), '--raw', ...more, 'Once']);
    assert.equal(r.code, 1);
    assert.match(r.stderr, /^inference-core: [^\n]+\n$/);
  }
});

test('a keys file that makes no sense: exit 2 and one line', async (t) => {
  const d = tempDir(t);
  for (const text of ['', 'key = x\n', '[a]\n', '[a]\nkey = short\n', `[a]\nkey = ${A}\nmax_sessions = 0\n`, `[a]\nkey = ${A}\nmax_sessions = x\n`, `[a]\nkey = ${A}\nnonsense = 1\n`, 'garbage\n', `[a]\nkey = ${'k'.repeat(3000)}\n`]) {
    const f = path.join(d, 'k.ini');
    fs.writeFileSync(f, text);
    const r = await run(['serve', '--model', MODEL, '--port', '0', '--keys', f]);
    assert.equal(r.code, 2, `${JSON.stringify(text.slice(0, 60))}: ${r.stderr}`);
    assert.match(r.stderr, /^inference-core: [^\n]+\n$/);
    assert.ok(!r.stderr.includes(A), 'no key in a message');
  }
  const r = await run(['serve', '--model', MODEL, '--port', '0', '--keys', path.join(d, 'none')]);
  assert.equal(r.code, 2);
});

test('the server has survived, and no key is in its log', async () => {
  assert.ok(!server.log.join('\n').includes('key-0123456789'));
  await server.stop();
});
