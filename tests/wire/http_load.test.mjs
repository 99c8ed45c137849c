// HTTP under load, and from clients that are slow: wrk and promtool where they are installed (Debian: wrk, prometheus).
import test from 'node:test';
import assert from 'node:assert/strict';
import fs from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { once } from 'node:events';
import { spawn } from 'node:child_process';
import { ENDLESS, Server, rawSocket, sleep, tempDir, until, within } from './lib.mjs';

const server = await Server.start(['--chat-template', 'chatml', '--ctx-size', '65536', '--request-seconds', '600']);
const PROMPT = 'Once upon a time';
const TEXT = '/v1/completions';

/** Runs a command to its end: {code, out}, or null when it is not installed. */
async function tool(command, args, input = '') {
  const p = spawn(command, args, { stdio: 'pipe' });
  let out = '';
  for (const s of [p.stdout, p.stderr]) s.setEncoding('utf8').on('data', (d) => (out += d));
  p.stdin.on('error', () => {});
  p.stdin.end(input);
  const end = await within(once(p, 'close').catch((e) => [e]), command); // once() throws what 'error' brings
  if (end[0]?.code === 'ENOENT') return null;
  return { code: end[0], out };
}

const SUMMARY = `
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("SUMMARY {\\"requests\\":%d,\\"connect\\":%d,\\"read\\":%d,\\"write\\":%d,\\"status\\":%d,\\"timeout\\":%d}\\n",
    summary.requests, e.connect, e.read, e.write, e.status, e.timeout))
end
`;

/** wrk with a script; its count of requests. Everything but 2xx is a failure. */
async function wrk(t, script, target) {
  const file = path.join(tempDir(t), 'wrk.lua');
  fs.writeFileSync(file, script + SUMMARY);
  const r = await tool('wrk', ['-t1', '-c50', '-d2s', '--timeout', '60s', '-s', file, `http://127.0.0.1:${server.port}${target}`]);
  if (!r) {
    t.skip('wrk is not installed');
    return null;
  }
  assert.equal(r.code, 0, r.out);
  const { requests, ...errors } = JSON.parse(/SUMMARY (.*)/.exec(r.out)[1]);
  assert.deepEqual(errors, { connect: 0, read: 0, write: 0, status: 0, timeout: 0 }, r.out);
  assert.ok(requests > 50, r.out);
  return requests;
}

test('50 connections ask for /health while a client streams', async (t) => {
  const c = await server.connect();
  const want = await c.text(PROMPT, { temp: 0, max_tokens: 400 });
  const endless = c.infer(PROMPT, ENDLESS);
  await endless.first();
  const before = (await server.metrics()).ic_http_requests_total;
  const load = wrk(t, '', '/health');
  const streams = [];
  do {
    const s = c.infer(PROMPT, { temp: 0, max_tokens: 400 });
    streams.push(await s.done());
  } while (streams.length < 2);
  const requests = await load;
  for (const s of streams) {
    assert.equal(s.text, want);
    assert.equal(s.end.stats.tokens, s.tokens.at(-1).index + 1);
  }
  assert.equal(endless.end, null, 'it goes on through all of it');
  if (requests) assert.ok((await server.metrics()).ic_http_requests_total >= before + requests, 'all were counted');
  c.send({ op: 'abort' });
  assert.equal((await endless.finished()).reason, 'abort');
  endless.tokens.forEach((m, i) => assert.equal(m.index, i, 'no token is missing'));
  await c.close();
});

test('50 connections with 8 requests ahead each', async (t) => {
  await wrk(t, 'init = function(args)\n  local r = {}\n  for i = 1, 8 do r[i] = wrk.format("GET", i % 2 == 0 and "/health" or "/v1/models") end\n  all = table.concat(r)\nend\nrequest = function() return all end\n', '/');
});

test('50 connections ask for completions and tokens', async (t) => {
  const body = JSON.stringify({ prompt: PROMPT, max_tokens: 1, temperature: 0 });
  await wrk(t, `wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\nlocal n = 0\nrequest = function()\n  n = n + 1\n  if n % 10 == 0 then return wrk.format("POST", "${TEXT}", nil, '${body}') end\n  return wrk.format("POST", "/tokenize", nil, '{"content":"a dog"}')\nend\n`, '/');
  await server.idle();
});

test('300 requests ahead without reading, then all answers in order', async () => {
  const n = 300;
  const one = (i) => {
    const b = JSON.stringify({ content: 'x'.repeat(i) });
    return `POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: ${b.length}\r\n\r\n${b}`;
  };
  const s = await rawSocket(server);
  s.pause();
  const sizes = await Promise.all(Array.from({ length: n }, async (_, i) => (await server.http('/tokenize', { method: 'POST', body: JSON.stringify({ content: 'x'.repeat(i) }) })).json.tokens.length));
  s.write(Array.from({ length: n }, (_, i) => one(i)).join('') + 'GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n');
  assert.equal((await server.http('/health')).status, 200, 'others are answered');
  s.resume();
  await within(s.ended, 'all answers');
  const lists = [...s.got.toString().matchAll(/"tokens":\[([^\]]*)\]/g)].map((m) => (m[1] ? m[1].split(',').length : 0));
  assert.deepEqual(lists, sizes);
});

test('bodies that come byte by byte, in chunks, or after 100-continue', async () => {
  const body = JSON.stringify({ prompt: PROMPT, max_tokens: 4, temperature: 0, grammar: 'root ::= "é" [a-z]*' });
  const bytes = Buffer.from(body);
  const want = (await server.http(TEXT, { method: 'POST', body })).json.choices[0].text;
  const head = (extra) => `POST ${TEXT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n${extra}\r\n`;
  const answer = async (s) => {
    await within(s.ended, 'an answer');
    const text = s.got.toString();
    assert.match(text, /HTTP\/1\.1 200 OK\r\n/, text);
    assert.equal(JSON.parse(text.slice(text.lastIndexOf('\r\n\r\n') + 4)).choices[0].text, want);
    return text;
  };
  const slowly = async (data, step) => {
    const s = await rawSocket(server);
    s.setNoDelay(true);
    for (let at = 0; at < data.length; at += step) {
      s.write(data.subarray(at, at + step));
      await sleep(1);
    }
    return answer(s);
  };
  const plain = Buffer.concat([Buffer.from(head(`Content-Length: ${bytes.length}\r\n`)), bytes]);
  const chunk = (b) => Buffer.concat([Buffer.from(`${b.length.toString(16)}\r\n`), b, Buffer.from('\r\n')]);
  const chunked = Buffer.concat([Buffer.from(head('Transfer-Encoding: chunked\r\n')), ...Array.from(bytes, (_, i) => chunk(bytes.subarray(i, i + 1))), Buffer.from('0\r\n\r\n')]);
  await Promise.all([slowly(plain, 1), slowly(plain, 7), slowly(chunked, 3), slowly(chunked, 1000)]);

  const s = await rawSocket(server, head(`Content-Length: ${bytes.length}\r\nExpect: 100-continue\r\n`));
  await until(() => s.got.includes('HTTP/1.1 100 Continue\r\n\r\n'), '100 Continue');
  s.write(bytes);
  assert.match(await answer(s), /^HTTP\/1\.1 100 Continue\r\n\r\nHTTP\/1\.1 200 OK/);
});

test('100 bodies that never end hold up nobody', async () => {
  const slow = await Promise.all(Array.from({ length: 100 }, (_, i) => rawSocket(server, `POST ${TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n${'{'.repeat(i)}`)));
  const c = await server.connect();
  assert.ok((await c.text(PROMPT, { temp: 0, max_tokens: 50 })).length > 0);
  assert.equal((await server.http('/health')).status, 200);
  assert.equal((await server.http(TEXT, { method: 'POST', body: JSON.stringify({ prompt: PROMPT, max_tokens: 3 }) })).status, 200);
  assert.ok(slow.every((s) => s.got.length === 0 && !s.destroyed));
  slow.forEach((s) => s.destroy());
  await c.close();
});

test('a body that takes longer than --request-seconds is told 408', async () => {
  const s = await Server.start(['--request-seconds', '1']);
  const slow = await rawSocket(s, `POST ${TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{`);
  await within(slow.ended, '408');
  assert.match(slow.got.toString(), /^HTTP\/1\.1 408 /);
  assert.equal(JSON.parse(slow.got.toString().split('\r\n\r\n')[1]).error.code, 'deadline');
  await s.stop();
});

test('promtool takes /metrics', async (t) => {
  const { body, headers } = await server.http('/metrics');
  assert.equal(headers['content-type'], 'text/plain; version=0.0.4; charset=utf-8');
  const r = await tool('promtool', ['check', 'metrics'], body);
  if (!r) return t.skip('promtool is not installed');
  assert.equal(r.code, 0, r.out);
  assert.equal(r.out.trim(), '', r.out);
});

test('connections come and go by the thousand', async () => {
  const before = (await server.metrics()).ic_ws_connections;
  for (let round = 0; round < 20; round++)
    await Promise.all(
      Array.from({ length: 50 }, async (_, i) => {
        const s = net.connect(server.port, '127.0.0.1');
        s.on('error', () => {});
        await within(once(s, 'connect'), 'a connection');
        if (i % 3) s.write(i % 2 ? 'GET /health HTTP/1.1\r\nHost: x\r\n\r\n' : `POST ${TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: 33\r\n\r\n{"prompt":"a dog","max_tokens":2}`);
        if (i % 5 === 0) await sleep(1);
        i % 4 ? s.destroy() : s.resetAndDestroy();
      }),
    );
  await server.idle();
  await until(async () => (await server.metrics()).ic_ws_connections === before, 'the connections to be gone');
});

test('places are free again in whatever order they are left, those in the lobby too', async () => {
  const s = await Server.start(['--connections', '4']);
  for (let round = 0; round < 5; round++) {
    const all = [];
    while (all.length < 3) all.push(await rawSocket(s));
    assert.equal((await s.http('/health')).status, 200); // the fourth place is free
    while (all.length < 6) all.push(await rawSocket(s));
    assert.equal((await s.http('/health')).status, 503);
    for (const c of all) c.destroy();
    await until(async () => (await s.http('/health').catch(() => ({}))).status === 200, 'a free place');
    const c = await s.connect();
    assert.equal((await s.http(TEXT, { method: 'POST', body: '{"prompt":"a dog","max_tokens":2}' })).status, 200);
    await c.close();
  }
  await s.stop();
});

test('the server has survived', () => server.stop());
