// Start and end of the process: signals, exit codes, options, a model that is none, `ask`.
import test from 'node:test';
import assert from 'node:assert/strict';
import fs from 'node:fs';
import http from 'node:http';
import net from 'node:net';
import os from 'node:os';
import { once } from 'node:events';
import path from 'node:path';
import { parse, u32, write } from './gguflib.mjs';
import { BIN, ENDLESS, GREEDY, MODEL, Server, freePort, run, sleep, tempDir, until, withServer, within } from './lib.mjs';

const STORY = 'Once upon a time';

// One line on stderr, of ours, and the exit code.
function failed(r, code, text) {
  assert.equal(r.code, code, `${r.signal ?? ''} ${r.stderr}`);
  const lines = r.stderr.trimEnd().split('\n').filter((l) => !l.startsWith('{')); // log lines are JSON
  assert.equal(lines.length, 1, r.stderr);
  assert.match(lines[0], /^inference-core: /);
  if (text) assert.match(lines[0], text);
}

test('SIGTERM and SIGINT: what runs is finished, then close 1001 and exit 0', async () => {
  for (const sig of ['SIGTERM', 'SIGINT']) {
    const srv = await Server.start();
    const c = await srv.connect();
    const s = c.infer(STORY, { ...ENDLESS, max_tokens: 300 });
    await s.first();
    srv.signal(sig);
    await s.done();
    assert.equal(s.end.stats.tokens, 300, 'to its end');
    assert.equal(s.end.reason, 'length');
    assert.equal((await within(c.closed.promise, 'the close')).code, 1001);
    assert.deepEqual(await within(srv.exit, 'the exit'), { code: 0, signal: null });
  }
});

test('many more threads than processors: as many as there are compute, and the log says so', async (t) => {
  if (os.cpus().length > 128) return t.skip('skipped: so many processors');
  const srv = await Server.start(['--threads', '256']);
  const c = await srv.connect();
  assert.notEqual(await c.text(STORY, { ...GREEDY, max_tokens: 20 }), '');
  assert.ok(srv.log.some((l) => /instead of the 256 threads asked for/.test(l)), srv.log.join('\n'));
  await srv.stop();
});

test('while draining: no new requests, no new connections, /ready 503, /health 200', async () => {
  const srv = await Server.start(['--ctx-size', '65536', '--drain-seconds', '600']);
  const c = await srv.connect();
  const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
  assert.equal((await srv.http('/ready', { agent })).status, 200);
  const s = c.infer(STORY, ENDLESS);
  await s.first();
  srv.signal('SIGTERM');
  await until(() => srv.log.some((l) => l.includes('draining')), 'the drain');
  const r = await srv.http('/ready', { agent });
  assert.equal(r.status, 503);
  assert.equal(r.json.reason, 'draining');
  assert.equal((await c.infer(STORY, GREEDY).refused()).code, 'unavailable');
  assert.equal((await c.ask({ op: 'hello' }, 'hello')).status, 'draining');
  await assert.rejects(srv.connect(), 'nobody new comes in');
  const had = s.tokens.length;
  await until(() => s.tokens.length > had, 'the running one to go on');
  await c.ask({ op: 'abort' }, 'abort');
  await s.finished();
  assert.equal((await within(c.closed.promise, 'the close')).code, 1001);
  agent.destroy();
  assert.deepEqual(await within(srv.exit, 'the exit'), { code: 0, signal: null });
});

// 2 s are also the grace of CANCELLING: it is counted from its beginning, not from the signal
test('--drain-seconds over: error unavailable, end, close 1001, exit 0', async () => {
  const srv = await Server.start(['--ctx-size', '131072', '--parallel', '1', '--drain-seconds', '2']);
  const c = await srv.connect();
  const running = c.infer(STORY, ENDLESS);
  await running.first();
  const waiting = c.infer(STORY, GREEDY);
  await c.wait((m) => m.op === 'queued', 'queued');
  srv.signal('SIGTERM');
  for (const s of [running, waiting]) {
    assert.equal((await s.finished()).reason, 'error');
    assert.equal(s.error.code, 'unavailable');
  }
  assert.equal((await within(c.closed.promise, 'the close')).code, 1001);
  assert.deepEqual(await within(srv.exit, 'the exit'), { code: 0, signal: null });
});

test('--drain-seconds 0 does not wait', async () => {
  const srv = await Server.start(['--ctx-size', '131072', '--drain-seconds', '0']);
  const c = await srv.connect();
  const s = c.infer(STORY, ENDLESS);
  await s.first();
  srv.signal('SIGTERM');
  assert.equal((await s.finished()).reason, 'error');
  assert.deepEqual(await within(srv.exit, 'the exit'), { code: 0, signal: null });
});

test('a second signal ends at once', async () => {
  for (const [first, second, code] of [['SIGTERM', 'SIGTERM', 143], ['SIGINT', 'SIGINT', 130], ['SIGTERM', 'SIGINT', 130]]) {
    const srv = await Server.start(['--ctx-size', '131072', '--drain-seconds', '600']);
    const c = await srv.connect();
    const s = c.infer(STORY, ENDLESS);
    await s.first();
    srv.signal(first);
    await until(() => srv.log.some((l) => l.includes('draining')), 'the drain');
    srv.signal(second);
    const end = await within(srv.exit, 'the exit');
    assert.deepEqual(end, { code, signal: null });
  }
});

test('a client that does not answer the close frame does not hold the server up', async () => {
  const srv = await Server.start();
  const s = net.connect(srv.port, '127.0.0.1');
  await once(s, 'connect');
  s.write('GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n');
  await once(s, 'data');
  s.pause();
  s.on('error', () => {});
  srv.signal('SIGTERM');
  assert.deepEqual(await within(srv.exit, 'the exit'), { code: 0, signal: null });
  s.destroy();
});

test('signals during the start', async () => {
  for (const ms of [0, 1, 3, 10, 30]) {
    const { BIN } = await import('./lib.mjs');
    const { spawn } = await import('node:child_process');
    const p = spawn(BIN, ['serve', '--model', MODEL, '--port', '0', '--threads', '1'], { stdio: 'ignore' });
    await sleep(ms);
    p.kill('SIGTERM');
    const [code, signal] = await within(once(p, 'close'), 'the exit');
    assert.ok(code === 0 || signal === 'SIGTERM', `after ${ms} ms: ${code} ${signal}`);
  }
});

test('the port is in use: exit 3', async () => {
  const taken = net.createServer().listen(0, '127.0.0.1');
  await once(taken, 'listening');
  const port = String(taken.address().port);
  failed(await run(['serve', '--model', MODEL, '--port', port]), 3, new RegExp(`${port}.*in use|in use.*${port}`));
  taken.close();
  failed(await run(['serve', '--model', MODEL, '--port', '0', '--host', '203.0.113.1']), 3);
  failed(await run(['serve', '--model', MODEL, '--port', '0', '--host', 'no.such.host.invalid']), 3);
});

test('no model, or one that is broken: exit 4 and one line', async (t) => {
  const dir = tempDir(t);
  const file = (name, data) => (fs.writeFileSync(path.join(dir, name), data), path.join(dir, name));
  const gguf = fs.readFileSync(MODEL);
  const bad = [path.join(dir, 'missing.gguf'), dir, file('empty.gguf', ''), file('text.gguf', 'this is no model\n'), file('zeros.gguf', Buffer.alloc(100000)), '/dev/null'];
  for (const n of [1, 4, 8, 24, 100, 1000, 8000, 20000, gguf.length >> 1, gguf.length - 1]) bad.push(file(`cut-${n}.gguf`, gguf.subarray(0, n)));
  const noise = Buffer.from(gguf);
  for (let i = 24; i < 4000; i += 3) noise[i] = (i * 2654435761) >>> 24;
  bad.push(file('noise.gguf', noise));
  const counts = Buffer.from(gguf);
  counts.writeBigUInt64LE(2n ** 62n, 8);
  bad.push(file('tensors.gguf', counts));
  const kv = Buffer.from(gguf);
  kv.writeBigUInt64LE(2n ** 40n, 16);
  bad.push(file('pairs.gguf', kv));
  const version = Buffer.from(gguf);
  version.writeUInt32LE(99, 4);
  bad.push(file('version.gguf', version));
  for (const [name, spoil] of [ // llama.cpp asserts what these deny
    ['twice.gguf', (tokens) => tokens.value.map((b, i) => (i > 400 ? tokens.value[400] : b))],
    ['words.gguf', (tokens, type) => ((type.value = Buffer.concat([u32(4), u32(0), Buffer.from('bert')])), tokens.value)],
  ]) {
    const g = parse(MODEL);
    const key = (k) => g.keys.find((x) => x.key === `tokenizer.ggml.${k}`);
    key('tokens').value = spoil(key('tokens'), key('model'));
    bad.push(write(path.join(dir, name), g));
  }
  for (const eps of [NaN, -1]) { // or does in the first decode
    const g = parse(MODEL);
    g.keys.find((x) => x.key.endsWith('layer_norm_rms_epsilon')).value = Buffer.from(Float32Array.of(eps).buffer);
    bad.push(write(path.join(dir, `eps${eps}.gguf`), g));
  }
  for (const model of bad) {
    const r = await run(['serve', '--model', model, '--port', '0', '--threads', '1', '--log-level', 'error']);
    assert.doesNotThrow(() => failed(r, 4), `${path.basename(model)}: ${r.code} ${r.signal}\n${r.stderr}`);
  }
});

test('a model that computes nothing but NaN: the log says so, whoever asks is told', async (t) => {
  const g = parse(MODEL);
  const norm = g.tensors.find((x) => x.name === 'output_norm.weight');
  norm.data = Buffer.from(new Float32Array(norm.bytes / 4).fill(NaN).buffer);
  await withServer([], async (s) => {
    assert.match(s.log.join('\n'), /no usable logits: .*nan\.gguf/);
    const c = await s.connect();
    const e = await c.infer('x').refused();
    assert.ok(e.code === 'internal' && /no usable logits/.test(e.message), JSON.stringify(e));
    await c.close();
  }, { model: write(path.join(tempDir(t), 'nan.gguf'), g) });
});

test('files of the network that are missing or broken: exit 4, not that of a port in use', async () => {
  for (const args of [
    ['--web-root', '/nonexistent'], ['--web-root', MODEL],
    ['--tls-cert', '/nonexistent', '--tls-key', MODEL], ['--tls-cert', MODEL, '--tls-key', MODEL],
  ]) failed(await run(['serve', '--model', MODEL, '--port', '0', ...args]), 4);
});

test('options that are none, or wrong: exit 2', async () => {
  const cases = [
    [['serve'], /--model/],
    [['serve', '--nonsense'], /--nonsense/],
    [['serve', '--model', MODEL, '--nonsense', '1'], /--nonsense/],
    [['serve', '--model', MODEL, '--port'], /--port/],
    [['serve', '--model', MODEL, '--port', 'x'], /port/],
    [['serve', '--model', MODEL, '--port', '70000'], /port/],
    [['serve', '--model', MODEL, '--port', '-1'], /port/],
    [['serve', '--model', MODEL, '--port', '1.5'], /port/],
    [['serve', '--model', MODEL, '--port', '99999999999999999999'], /port/],
    [['serve', '--model', MODEL, '--parallel', '0'], /parallel/],
    [['serve', '--model', MODEL, '--log-level', 'loud'], /log-level/],
    [['serve', '--model', MODEL, '--tls-cert', 'x'], /tls/],
    [['serve', '--model', MODEL, '--origins', 'https://a.example,b.example'], /"b\.example"/],
    [['serve', '--model', MODEL, 'stray'], /stray/],
    [['serve', '--model', MODEL, '--config', '/nonexistent.ini'], /nonexistent/],
    [['nonsense'], /nonsense/],
    [['ask'], null],
    [['ask', '--nonsense', 'x', 'y'], null],
  ];
  for (const [args, text] of cases) failed(await run(args), 2, text);
  const none = await run([]);
  assert.equal(none.code, 2);
});

test('help and version', async () => {
  for (const args of [['help'], ['--help'], ['serve', '--help'], ['-h']]) {
    const r = await run(args);
    assert.equal(r.code, 0, args.join(' '));
    assert.equal(r.stderr, '');
    for (const o of ['--model', '--port', '--kv-size', '--drain-seconds', '--keys', '--config', 'default 3000']) assert.ok(r.stdout.includes(o), o);
  }
  for (const args of [['version'], ['--version']]) assert.match((await run(args)).stdout, /^inference-core \d+\.\d+\.\d+\n$/);
  const lost = await run(['-c', 'exec "$0" version >/dev/full', BIN], { bin: '/bin/sh' });
  assert.equal(lost.code, 1, 'what could not be printed was not printed');
  assert.match(lost.stderr, /stdout/);
});

test('closed stdin, stdout and stderr are not given to anybody', async () => {
  const before = ['-c', 'exec "$0" "$@" <&- >&- 2>&-', BIN];
  const s = await Server.start([], { bin: '/bin/sh', before, port: await freePort() });
  for (const fd of [0, 1, 2]) assert.equal(fs.readlinkSync(`/proc/${s.process.pid}/fd/${fd}`), '/dev/null');
  await s.stop();
});

test('configuration file, environment and command line: later wins', async (t) => {
  const dir = tempDir(t);
  const ini = path.join(dir, 'ic.ini');
  fs.writeFileSync(ini, `; a comment\n[server]\nsessions = 11\nqueue = 12\nrequests = 13\nmessage-max = 64K\nmodel = ${MODEL}\n`);
  const limits = async (args, env, model = null) => {
    const srv = await Server.start(args, { env, model });
    const c = await srv.connect();
    const l = c.hello.limits;
    await srv.stop();
    return [l.sessions, l.queue, l.requests_per_connection, l.message_bytes];
  };
  assert.deepEqual(await limits([], {}, MODEL), [8, 256, 64, 1 << 20], 'the defaults');
  assert.deepEqual(await limits(['--config', ini], {}), [11, 12, 13, 65536], 'the file');
  assert.deepEqual(await limits([], { IC_CONFIG: ini }), [11, 12, 13, 65536], 'the file, named by the environment');
  assert.deepEqual(await limits(['--config', ini], { IC_SESSIONS: '21', IC_QUEUE: '22' }), [21, 22, 13, 65536], 'the environment over the file');
  assert.deepEqual(await limits(['--config', ini, '--sessions', '31'], { IC_SESSIONS: '21', IC_QUEUE: '22' }), [31, 22, 13, 65536], 'the command line over both');
  assert.deepEqual(await limits(['--sessions=31', '--message-max=2M'], { IC_MODEL: MODEL }), [31, 256, 64, 2 << 20], 'with an equals sign');
});

test('a bad configuration or environment: exit 2', async (t) => {
  const dir = tempDir(t);
  const ini = path.join(dir, 'ic.ini');
  for (const text of ['nonsense = 1\n', 'port = x\n', 'port = 70000\n', '[other]\nport = 1\n', 'garbage\n', 'config = other.ini\n']) {
    fs.writeFileSync(ini, text);
    failed(await run(['serve', '--model', MODEL, '--config', ini]), 2);
  }
  failed(await run(['serve', '--model', MODEL, '--config', dir]), 2);
  failed(await run(['serve', '--model', MODEL], { env: { IC_PORT: 'x' } }), 2, /port/);
  failed(await run(['serve', '--model', MODEL], { env: { IC_QUEUE: '0' } }), 2, /queue/);
});

test('ask streams an answer to stdout', async () => {
  const srv = await Server.start();
  const port = String(srv.port);
  const c = await srv.connect();
  const r = await run(['ask', '--port', port, '--raw', '--max-tokens', '12', STORY]);
  assert.equal(r.code, 0, r.stderr);
  assert.ok(r.stdout.endsWith('\n'));
  assert.ok(r.stdout.length > 10);
  assert.equal((await srv.metrics()).ic_text_tokens_total, 12);
  assert.equal((await run(['ask', '--port', port, '--raw', '--max-tokens', '5', 'é😀 "quoted" \\ \n'])).code, 0);
  const no = await run(['ask', '--port', port, 'Hello']); // a user's message: this model has no template
  failed(no, 1, /template/);
  failed(await run(['ask', '--port', port, '--raw', 'x '.repeat(2000)]), 1, /tokens/);
  await c.close();
  await srv.stop();
  failed(await run(['ask', '--port', port, '--raw', 'x']), 1);
});
