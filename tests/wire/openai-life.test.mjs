// Requests over HTTP that meet something: a full queue, a client that leaves or reads slowly, the end of the server, each other.
import test from 'node:test';
import assert from 'node:assert/strict';
import fs from 'node:fs';
import http from 'node:http';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { ENDLESS, Server, deferred, rawSocket, sleep, tempDir, until, withServer, within } from './lib.mjs';

const OpenAI = await import('openai').then(
  (m) => m.default,
  () => {
    console.log('WIRE_SKIPPED: the npm package openai is missing (npm ci --prefix tests)');
    process.exit(0);
  },
);
const LAW = path.join(path.dirname(fileURLToPath(import.meta.url)), '../../demo/laws/ginzburg-landau');
const PROMPT = 'Once upon a time';
const CHAT = '/v1/chat/completions';
const TEXT = '/v1/completions';
const LONG = ['--ctx-size', '65536', '--kv-size', '131072', '--chat-template', 'chatml'];
const messages = [{ role: 'user', content: 'Tell me a story.' }];
const endless = { prompt: PROMPT, messages, ...ENDLESS, max_tokens: -1 };
const json = (body, headers = {}) => ({ method: 'POST', headers: { 'Content-Type': 'application/json', ...headers }, body: JSON.stringify(body) });
const sdk = (s, more) => new OpenAI({ baseURL: `http://127.0.0.1:${s.port}/v1`, apiKey: 'any', maxRetries: 0, timeout: 600_000, ...more });

/** A request whose answer is read as it comes: {status, headers, text, first, done, destroy()}. */
function open(server, target, body, { agent = false } = {}) {
  const x = { text: '', first: deferred(), done: deferred() };
  const req = http.request({ host: '127.0.0.1', port: server.port, path: target, method: 'POST', headers: { 'Content-Type': 'application/json' }, agent }, (res) => {
    Object.assign(x, { res, status: res.statusCode, headers: res.headers });
    res.setEncoding('utf8').on('data', (d) => {
      x.text += d;
      x.first.resolve();
    });
    res.on('end', () => x.done.resolve(x));
    res.on('error', x.done.reject);
  });
  req.on('error', (e) => [x.done, x.first].forEach((d) => d.reject(e)));
  req.end(JSON.stringify(body));
  x.destroy = () => req.destroy();
  x.begun = () => within(x.first.promise, `the first bytes of ${target}`);
  x.end = () => within(x.done.promise, `the end of ${target}`);
  return x;
}
const events = (text) => text.split('\n\n').filter(Boolean).map((e) => e.slice(6));
const running = (s, n) => until(async () => (await s.metrics()).ic_text_requests_running === n, `${n} requests to run`);
const waiting = (s, n) => until(async () => (await s.metrics()).ic_text_requests_waiting === n, `${n} requests to wait`);

/** A server that the test itself sends away. */
async function leaving(args, fn) {
  const s = await Server.start(args);
  try {
    await fn(s);
    assert.deepEqual(await within(s.exit, 'the server to end'), { code: 0, signal: null }, s.log.slice(-40).join('\n'));
  } finally {
    await s.kill();
  }
}

test('a full queue: 429 with Retry-After, and nobody else suffers', () =>
  withServer([...LONG, '--parallel', '1', '--queue', '2'], async (s) => {
    const hog = open(s, TEXT, { ...endless, stream: true });
    await hog.begun();
    const queued = [open(s, CHAT, { messages, temperature: 0, max_tokens: 3 }), open(s, TEXT, { prompt: PROMPT, temperature: 0, max_tokens: 3, stream: true })];
    await waiting(s, 2);
    for (const [target, stream] of [[CHAT, true], [CHAT, false], [TEXT, true], [TEXT, false]]) {
      const r = await s.http(target, json({ prompt: PROMPT, messages, max_tokens: 1, stream }));
      assert.equal(r.status, 429, r.body);
      assert.match(r.headers['retry-after'], /^\d+$/);
      assert.equal(r.json.error.code, 'busy');
      assert.equal(r.json.error.type, 'invalid_request_error');
    }
    await assert.rejects(sdk(s).completions.create({ model: 'x', prompt: PROMPT }), OpenAI.RateLimitError);
    assert.equal((await s.http('/ready')).status, 503);
    assert.equal((await s.http('/health')).status, 200);
    // The client of its own accord tries again until there is room.
    const patient = sdk(s, { maxRetries: 100 }).completions.create({ model: 'x', prompt: PROMPT, temperature: 0, max_tokens: 3 });
    hog.destroy();
    const [a, b] = await Promise.all(queued.map((q) => q.end()));
    assert.equal(JSON.parse(a.text).usage.completion_tokens, 3);
    assert.equal(events(b.text).at(-1), '[DONE]');
    assert.equal((await within(patient, 'the patient client')).usage.completion_tokens, 3);
    await s.idle();
  }));

test('keys: Bearer, X-API-Key; without one 401', (t) => {
  const file = path.join(tempDir(t), 'keys.ini');
  fs.writeFileSync(file, '[alice]\nkey = alice-secret-1\n[bob]\nkey = bob-secret-22\n');
  return withServer(['--keys', file, '--chat-template', 'chatml'], async (s) => {
    const body = { model: 'x', prompt: PROMPT, max_tokens: 2 };
    for (const apiKey of ['alice-secret-1', 'bob-secret-22']) {
      const c = sdk(s, { apiKey });
      assert.equal((await c.completions.create(body)).usage.completion_tokens, 2);
      assert.equal((await c.models.list()).data.length, 1);
      let n = 0;
      for await (const _ of await c.chat.completions.create({ model: 'x', messages, max_tokens: 2, stream: true })) n++;
      assert.ok(n > 0);
    }
    const c = sdk(s, { apiKey: 'alice-secret-2' });
    for (const ask of [() => c.completions.create(body), () => c.models.list(), () => c.chat.completions.create({ model: 'x', messages, stream: true })]) {
      const e = await ask().then(assert.fail, (x) => x);
      assert.ok(e instanceof OpenAI.AuthenticationError, String(e));
      assert.equal(e.code, 'unauthorized');
    }
    for (const target of [CHAT, TEXT, '/tokenize', '/detokenize', '/predict']) {
      for (const headers of [{}, { Authorization: 'Bearer ' }, { Authorization: 'Basic YWxpY2U6YWxpY2Utc2VjcmV0LTE=' }, { 'X-API-Key': 'nope-nope' }, { 'X-Client-ID': 'bob', 'X-API-Key': 'alice-secret-1' },
        { 'X-Client-ID': 'bob', Authorization: 'Bearer alice-secret-1' }, { Authorization: 'Bearer alice-secret-1x' }]) {
        const r = await s.http(target, json({ nonsense: 1 }, headers));
        assert.equal(r.status, 401, `${target} ${JSON.stringify(headers)}`);
        assert.equal(r.headers['www-authenticate'], 'Bearer');
        assert.equal(r.json.error.code, 'unauthorized');
      }
      assert.equal((await s.http(target)).status, 405, 'the method is told to everybody');
    }
    for (const headers of [{ Authorization: 'bearer alice-secret-1' }, { 'X-API-Key': 'bob-secret-22' }, { 'X-Client-ID': 'bob', 'X-API-Key': 'bob-secret-22' }])
      assert.equal((await s.http('/tokenize', json({ content: 'a' }, headers))).status, 200);
    for (const target of ['/health', '/ready', '/metrics', '/']) assert.equal((await s.http(target)).status, 200);
  });
});

test('clients that leave at any point free what they had', () =>
  withServer([...LONG, '--parallel', '4'], async (s) => {
    for (let round = 0; round < 3; round++) {
      const xs = [];
      for (let i = 0; i < 8; i++) xs.push(open(s, i % 2 ? TEXT : CHAT, { ...endless, seed: i, stream: i % 4 < 2, logprobs: i === 5 ? 3 : undefined }));
      const streamed = xs.filter((_, i) => i % 4 < 2);
      await Promise.race(streamed.map((x) => x.begun()));
      await running(s, 4); // and four wait
      await waiting(s, 4);
      if (round) await sleep(20 * round); // at another point
      for (const x of xs) x.destroy();
      await s.idle();
    }
    // Half a request, and a connection that is reset under the answer.
    const half = await rawSocket(s, `POST ${TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"prompt":`);
    half.destroy();
    const body = JSON.stringify({ ...endless, stream: true });
    const reset = await rawSocket(s, `POST ${TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: ${body.length}\r\n\r\n${body}`);
    await until(() => reset.got.includes('data: '), 'a stream');
    reset.resetAndDestroy();
    // One that closes its half while it waits counts as gone, too, and so does one that has sent more behind it.
    const closing = await rawSocket(s, `POST ${TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: ${body.length}\r\n\r\n${body}GET /health HTTP/1.1\r\nHost: x\r\n\r\n`);
    await until(() => closing.got.includes('data: '), 'a stream');
    closing.end();
    await within(closing.ended, 'the connection to end');
    await s.idle();
    const ended = (await s.metrics())['ic_text_requests_ended_total{reason="abort"}'];
    assert.equal(ended, 3 * 8 + 2);
  }));

test('a stream that is not read is cut off, told why, and nobody else notices', () =>
  withServer([...LONG, '--outbox', '64K'], async (s) => {
    const c = await s.connect();
    const want = await c.text(PROMPT, { temp: 0, max_tokens: 300 });
    const slow = [open(s, CHAT, { ...endless, stream: true, logprobs: true, top_logprobs: 20 }), open(s, TEXT, { ...endless, stream: true, logprobs: 20 })];
    for (const x of slow) {
      await x.begun();
      x.res.pause();
    }
    const others = Array.from({ length: 4 }, () => c.infer(PROMPT, { temp: 0, max_tokens: 300 }));
    const whole = open(s, TEXT, { prompt: PROMPT, temperature: 0, max_tokens: 300 });
    await until(async () => (await s.metrics()).ic_slow_clients_closed_total >= 2, 'the slow ones to be cut off');
    for (const o of others) assert.equal((await o.done()).text, want);
    assert.equal(JSON.parse((await whole.end()).text).choices[0].text, want);
    await s.idle();
    for (const x of slow) {
      x.res.resume();
      const { text } = await x.end();
      const all = events(text);
      const last = JSON.parse(all.pop()).error;
      assert.equal(last.code, 'busy', 'the last event tells why');
      assert.match(last.message, /outbox of 65536 bytes/);
      assert.ok(all.length > 10);
      all.forEach((e) => assert.equal(JSON.parse(e).choices[0].finish_reason, null));
    }
    assert.equal((await s.metrics()).ic_slow_clients_closed_total, 2, 'each counts once');
    await c.close();
  }));

test("a client of OpenAI's that is cut off gets an error, not a short answer", () =>
  withServer([...LONG, '--outbox', '64K'], async (s) => {
    const stream = await sdk(s).chat.completions.create({ model: 'x', ...endless, stream: true, logprobs: true, top_logprobs: 20 });
    const it = stream[Symbol.asyncIterator]();
    assert.equal((await it.next()).done, false);
    await until(async () => (await s.metrics()).ic_slow_clients_closed_total === 1, 'it to be cut off');
    const e = await (async () => {
      while (!(await within(it.next(), 'an event')).done);
      return null;
    })().catch((x) => x);
    assert.ok(e instanceof OpenAI.APIError, `an error, not ${e}`);
    assert.equal(e.code, 'busy');
  }));

test('draining: what runs ends well, what is new gets 503, then the server leaves', () =>
  leaving([...LONG, '--drain-seconds', '600'], async (s) => {
    const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
    const kept = { ...json({ prompt: PROMPT, messages, max_tokens: 2 }), agent };
    assert.equal((await s.http(TEXT, kept)).status, 200); // a connection that stays
    const hog = open(s, CHAT, { ...endless, stream: true });
    await hog.begun();
    const finite = [open(s, TEXT, { ...endless, max_tokens: 200, stream: true }), open(s, CHAT, { ...endless, max_tokens: 200 })];
    await until(async () => (await s.metrics()).ic_text_requests_total === 4, 'all to be taken');
    s.signal('SIGTERM');
    await until(async () => (await s.http('/ready', { agent })).json.reason === 'draining', 'draining to begin');
    for (const target of [TEXT, CHAT, TEXT]) {
      const r = await s.http(target, kept);
      assert.equal(r.status, 503, r.body);
      assert.equal(r.headers['retry-after'], '1');
      assert.equal(r.json.error.code, 'unavailable');
      assert.equal(r.json.error.type, 'server_error');
    }
    await assert.rejects(s.http('/health'), 'no new connections');
    const [a, b] = await Promise.all(finite.map((x) => x.end()));
    assert.equal(events(a.text).at(-1), '[DONE]');
    assert.equal(JSON.parse(events(a.text).at(-2)).choices[0].finish_reason, 'length');
    assert.equal(JSON.parse(b.text).usage.completion_tokens, 200);
    hog.destroy();
    await within(s.exit, 'the server to end');
    agent.destroy();
  }));

test('when the drain time is over, what is left is ended: an event in a stream, 503 for a whole answer', () =>
  leaving([...LONG, '--drain-seconds', '0', '--law', LAW], async (s) => {
    const streamed = open(s, CHAT, { ...endless, stream: true });
    await streamed.begun();
    const whole = open(s, TEXT, endless);
    await running(s, 2);
    s.signal('SIGINT');
    const a = await streamed.end();
    const error = JSON.parse(events(a.text).at(-1)).error;
    assert.equal(error.code, 'unavailable');
    assert.equal(error.type, 'server_error');
    const b = await whole.end();
    assert.equal(b.status, 503);
    assert.equal(b.headers['retry-after'], '1');
    assert.equal(JSON.parse(b.text).error.code, 'unavailable');
  }));

test('a server without a text model says so', () =>
  withServer(['--law', LAW], async (s) => {
    for (const [target, body] of [[CHAT, { messages }], [TEXT, { prompt: PROMPT, stream: true }], ['/tokenize', { content: 'a' }], ['/detokenize', { tokens: [1] }]]) {
      const r = await s.http(target, json(body));
      assert.equal(r.status, 503, target);
      assert.equal(r.json.error.code, 'unavailable');
      assert.equal(r.headers['retry-after'], '1', target);
    }
    assert.deepEqual((await s.http('/v1/models')).json, { object: 'list', data: [] });
  }, { model: null }));

test('text and laws in turn on one connection, pipelined, and left in the middle', () =>
  withServer(['--law', LAW, '--chat-template', 'chatml'], async (s) => {
    const [{ d_state: d }] = (await s.http('/v1/laws')).json.data;
    const psi = Buffer.alloc(16 * 16 * d * 2 * 4);
    for (let i = 0; i < psi.length; i += 4) psi.writeFloatLE(Math.sin(i), i);
    const predict = Buffer.concat([Buffer.from(`POST /predict?grid=16 HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\nContent-Length: ${psi.length}\r\n\r\n`), psi]);
    const text = (body) => {
      const b = JSON.stringify(body);
      return Buffer.from(`POST ${TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: ${b.length}\r\n\r\n${b}`);
    };
    const round = [predict, text({ prompt: PROMPT, grammar: 'root ::= "one"' }), predict, text({ prompt: PROMPT, grammar: 'root ::= "two"', stream: true }), text({ prompt: 5 }), predict];
    const c = await rawSocket(s, Buffer.concat([...round, ...round, Buffer.from('GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n')]));
    await within(c.ended, 'all answers');
    const got = c.got.toString('latin1');
    assert.equal(got.match(/HTTP\/1\.1 200 OK/g).length, 11);
    assert.equal(got.match(/HTTP\/1\.1 400 Bad Request/g).length, 2);
    assert.equal(got.match(/Content-Type: application\/octet-stream/g).length, 6);
    assert.equal([...got.matchAll(/"text":"([^"]*)"/g)].map((m) => m[1]).join(''), 'onetwoonetwo');
    for (let i = 0; i < 30; i++) {
      const x = await rawSocket(s, Buffer.concat(round.slice(i % 6)));
      if (i % 3) await sleep(i); // somewhere
      if (i % 2) x.destroy();
      else x.resetAndDestroy();
    }
    await s.idle();
  }));

test('an answer for somebody who has left is not given to who took the place', () =>
  withServer(['--law', LAW], async (s) => {
    const [{ d_state: d }] = (await s.http('/v1/laws')).json.data;
    const state = (f) => Buffer.from(Float32Array.from({ length: 16 * 16 * d * 2 }, (_, i) => f(i)).buffer);
    const [mine, theirs] = [state(Math.sin), state(Math.cos)];
    const predict = (body) => Buffer.concat([Buffer.from(`POST /predict?grid=16 HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: ${body.length}\r\n\r\n`), body]);
    const ask = async (body) => {
      const c = await rawSocket(s, predict(body));
      await within(c.ended, 'an answer');
      assert.match(c.got.toString('latin1'), /^HTTP\/1\.1 200 OK\r\n/);
      return c.got.subarray(c.got.indexOf('\r\n\r\n') + 4);
    };
    const want = await ask(mine);
    assert.notDeepEqual(await ask(theirs), want);
    for (let i = 0; i < 30; i++) {
      const c = await rawSocket(s, predict(theirs));
      await sleep(i % 5); // at different points
      c.destroy();
      assert.deepEqual(await ask(mine), want);
    }
    const b = JSON.stringify({ prompt: PROMPT, grammar: 'root ::= "mine"' });
    for (let i = 0; i < 15; i++) {
      const c = await rawSocket(s, predict(theirs));
      await sleep(i % 5);
      c.destroy();
      assert.equal((await s.http(TEXT, { method: 'POST', body: b })).json.choices[0].text, 'mine');
    }
  }));

test('32 at once, of every kind, all come to their end', () =>
  withServer([...LONG, '--parallel', '16'], async (s) => {
    const c = await s.connect();
    const client = sdk(s);
    const prompts = ['Once upon a time', 'The dog', 'A little girl', 'One day'];
    const want = [];
    for (const prompt of prompts) want.push(await c.text(prompt, { temp: 0, max_tokens: 60 }));
    const kinds = [
      async (prompt) => (await client.completions.create({ model: 'x', prompt, temperature: 0, max_tokens: 60 })).choices[0].text,
      async (prompt) => {
        let text = '';
        for await (const e of await client.completions.create({ model: 'x', prompt, temperature: 0, max_tokens: 60, stream: true })) text += e.choices[0].text;
        return text;
      },
      async (prompt) => c.text(prompt, { temp: 0, max_tokens: 60 }),
      async (prompt) => {
        const r = await client.chat.completions.create({ model: 'x', messages: [{ role: 'user', content: prompt }], temperature: 0, max_tokens: 60 });
        assert.ok(['stop', 'length'].includes(r.choices[0].finish_reason));
        return null;
      },
    ];
    const jobs = Array.from({ length: 32 }, async (_, i) => [i % 4, await kinds[(i >> 2) % 4](prompts[i % 4])]);
    for (const [i, text] of await within(Promise.all(jobs), '32 answers')) if (text !== null) assert.equal(text, want[i]);
    await s.idle();
    await c.close();
  }));
