// The HTTP side of the port: state, metrics, models, errors.
import test from 'node:test';
import assert from 'node:assert/strict';
import http from 'node:http';
import { spawnSync } from 'node:child_process';
import { ENDLESS, GREEDY, Server, rawSocket, until, within } from './lib.mjs';

const server = await Server.start(['--request-seconds', '1']);

function isError(r, status, code) {
  assert.equal(r.status, status, r.body);
  assert.match(r.headers['content-type'], /^application\/json/);
  const e = r.json.error;
  assert.deepEqual(Object.keys(e).sort(), ['code', 'message', 'param', 'type']);
  assert.equal(e.code, code);
  assert.ok(e.message.length > 0);
  assert.ok(e.type.length > 0);
}

test('/health and /ready', async () => {
  for (const [p, word] of [['/health', 'ok'], ['/ready', 'ready']]) {
    const r = await server.http(p);
    assert.equal(r.status, 200);
    assert.match(r.headers['content-type'], /^application\/json/);
    assert.equal(r.json.status, word);
    assert.ok(Number.isInteger(r.json.uptime_seconds));
  }
});

test('/health answers while the engine is busy', async () => {
  const c = await server.connect();
  const s = Array.from({ length: 8 }, () => c.infer('Once upon a time', ENDLESS));
  await Promise.all(s.map((x) => x.first()));
  for (let i = 0; i < 20; i++) assert.equal((await server.http('/health')).status, 200);
  await c.close();
});

const NAME = '[a-zA-Z_:][a-zA-Z0-9_:]*', LABELS = '\\{[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\\\\n]|\\\\.)*"(?:,[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\\\\n]|\\\\.)*")*,?\\}';
const SAMPLE = new RegExp(`^(${NAME})(${LABELS})? ([-+]?(?:[0-9.]+(?:e[-+]?[0-9]+)?|Inf|NaN))( [0-9]+)?$`, 'i');

test('/metrics is well-formed Prometheus text', async () => {
  const c = await server.connect();
  await c.text('Once upon a time', { ...GREEDY, max_tokens: 20 });
  const r = await server.http('/metrics');
  assert.equal(r.status, 200);
  assert.match(r.headers['content-type'], /^text\/plain; version=0\.0\.4/);
  assert.ok(r.body.endsWith('\n'));
  const types = new Map(), help = new Set(), seen = new Set(), values = new Map();
  let family = null;
  for (const line of r.body.trimEnd().split('\n')) {
    const meta = new RegExp(`^# (HELP|TYPE) (${NAME}) (.+)$`).exec(line);
    if (meta) {
      const [, kind, name, rest] = meta;
      if (kind === 'HELP') {
        assert.ok(!help.has(name), `a second HELP of ${name}`);
        help.add(name);
      } else {
        assert.ok(!types.has(name), `a second TYPE of ${name}`);
        assert.match(rest, /^(counter|gauge|histogram|summary|untyped)$/);
        types.set(name, rest);
      }
      family = name;
      continue;
    }
    const m = SAMPLE.exec(line);
    assert.ok(m, `not a sample: ${line}`);
    const base = types.get(family) === 'histogram' ? m[1].replace(/_(bucket|sum|count)$/, '') : m[1];
    assert.equal(base, family, `${line} stands under its own TYPE`);
    assert.ok(!seen.has(m[1] + (m[2] ?? '')), `${line} twice`);
    seen.add(m[1] + (m[2] ?? ''));
    values.set(m[1] + (m[2] ?? ''), Number(m[3].replace('+Inf', 'Infinity')));
    if (types.get(family) === 'counter') assert.match(m[1], /_total$/, 'a counter ends in _total');
  }
  for (const [name, type] of types) {
    assert.ok(help.has(name), `HELP of ${name}`);
    if (type !== 'histogram') continue;
    const buckets = [...values].filter(([k]) => k.startsWith(`${name}_bucket{`));
    for (let i = 1; i < buckets.length; i++) assert.ok(buckets[i][1] >= buckets[i - 1][1], `${name}: buckets are cumulative`);
    assert.match(buckets.at(-1)[0], /le="\+Inf"/);
    assert.equal(buckets.at(-1)[1], values.get(`${name}_count`));
    assert.ok(values.has(`${name}_sum`));
  }
  assert.ok(values.get('ic_text_tokens_total') >= 20);
  assert.equal(values.get('ic_ready'), 1);
  assert.ok(values.get('ic_token_write_seconds_count') >= 20, 'every token written is measured');
  assert.ok(values.get('process_resident_memory_bytes') > 1e6);
  const tool = spawnSync('promtool', ['check', 'metrics'], { input: r.body, encoding: 'utf8' });
  if (!tool.error) assert.equal(tool.status, 0, tool.stdout + tool.stderr);
  await c.close();
});

test('the counters count', async () => {
  const before = await server.metrics();
  const c = await server.connect();
  await c.text('Once upon a time', { ...GREEDY, max_tokens: 20 });
  await c.infer('Once', { ...GREEDY, grammar: 'root ::= "x"' }).done();
  await c.bad({ op: 'nonsense' });
  let after;
  const d = (k) => after[k] - before[k];
  // An end is counted just after it has been sent.
  await until(async () => (after = await server.metrics()) && d('ic_text_requests_ended_total{reason="length"}') + d('ic_text_requests_ended_total{reason="stop"}') === 2, 'two ends');
  assert.equal(d('ic_text_tokens_total'), 21);
  assert.equal(d('ic_text_requests_total'), 2);
  assert.equal(d('ic_text_requests_ended_total{reason="length"}'), 1);
  assert.equal(d('ic_text_requests_ended_total{reason="stop"}'), 1);
  assert.equal(d('ic_errors_total'), 1);
  assert.equal(d('ic_ws_connections_total'), 1);
  assert.ok(after.ic_ws_connections >= 1);
  await c.close();
  await until(async () => (await server.metrics()).ic_ws_connections === before.ic_ws_connections, 'the client to be gone');
});

test('/v1/models', async () => {
  const r = await server.http('/v1/models');
  assert.equal(r.status, 200);
  assert.equal(r.json.object, 'list');
  const [m] = r.json.data;
  assert.equal(r.json.data.length, 1);
  assert.equal(m.id, 'stories260K-f32');
  assert.equal(m.object, 'model');
  assert.ok(m.created > 1e9);
  assert.equal(typeof m.owned_by, 'string');
});

test('nothing there: 404 in OpenAI’s form', async () => {
  for (const p of ['/nonsense', '/health/', '/HEALTH', '/v1', '/../etc/passwd', '/%2e%2e/%2e%2e/etc/passwd', '/v1/laws/x/y', '//', '/a%00b'])
    for (const method of ['GET', 'POST']) {
      const r = await server.http(p, { method });
      assert.ok([400, 404].includes(r.status), `${method} ${p}: ${r.status}`);
      if (r.status === 404) isError(r, 404, 'not_found');
    }
});

test('another method: 405 with Allow', async () => {
  for (const method of ['POST', 'PUT', 'DELETE', 'PATCH']) {
    const r = await server.http('/health', { method });
    isError(r, 405, 'bad_request');
    assert.match(r.headers.allow, /\bGET\b/);
    assert.match(r.headers.allow, /\bHEAD\b/);
  }
});

test('HEAD is GET without a body', async () => {
  for (const p of ['/health', '/ready', '/metrics', '/v1/models']) {
    const [head, get] = [await server.http(p, { method: 'HEAD' }), await server.http(p)];
    assert.equal(head.status, 200);
    assert.equal(head.body, '');
    assert.equal(head.headers['content-type'], get.headers['content-type']);
    assert.ok(Number(head.headers['content-length']) > 0, p);
  }
});

test('one connection serves many requests, a query does not matter', async () => {
  const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
  const before = (await server.metrics()).ic_http_requests_total;
  for (let i = 0; i < 50; i++) assert.equal((await server.http(`/health?n=${i}`, { agent })).status, 200);
  assert.equal((await server.metrics()).ic_http_requests_total, before + 51);
  agent.destroy();
});

test('garbage instead of HTTP', async () => {
  for (const text of ['nonsense\r\n\r\n', 'GET /health\r\n\r\n', 'GET / HTTP/9.9\r\n\r\n', '\x16\x03\x01\x02\x00\x01\x00', `GET /${'a'.repeat(100000)} HTTP/1.1\r\n\r\n`, `GET / HTTP/1.1\r\nX: ${'a'.repeat(100000)}\r\n\r\n`, 'POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n', 'POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n']) {
    const s = await rawSocket(server, text);
    await within(Promise.race([s.ended, until(() => s.got.includes('HTTP/1.1 4') || s.got.includes('HTTP/1.1 5'), 'an answer')]), 'an answer or the end');
    s.destroy();
  }
  assert.equal((await server.http('/health')).status, 200);
});

test('an upgrade that is none', async () => {
  const up = (more, method = 'GET') => `${method} / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n${more}\r\n`;
  const key = 'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n';
  for (const [text, status] of [
    [up(`${key}Sec-WebSocket-Version: 8\r\n`), 426],
    [up('Sec-WebSocket-Version: 13\r\n'), 400],
    [up('Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: short\r\n'), 400],
    [up(`${key}Sec-WebSocket-Version: 13\r\n`, 'POST'), 400],
  ]) {
    const s = await rawSocket(server, text);
    await until(() => s.got.includes(`HTTP/1.1 ${status}`), `status ${status}`);
    s.destroy();
  }
});

test('the limit of connections is kept, and a place that is left is free again', async () => {
  const few = await Server.start(['--connections', '4']);
  const held = [];
  for (let i = 0; i < 4; i++) held.push(await few.connect());
  await assert.rejects(few.connect());
  await held.pop().close();
  await until(async () => few.http('/health').then((r) => r.status === 200, () => false), 'a place');
  await Promise.all(held.map((c) => c.close()));
  await until(async () => few.http('/health').then((r) => r.status === 200, () => false), 'a place');
  await few.stop();
});

test('the server has survived', () => server.stop());
