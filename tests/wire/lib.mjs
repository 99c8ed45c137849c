// What the wire tests share: a server of their own on a free port, clients, and a way to wait that is never a
// measurement. Nothing here passes or fails by time: waits give up after GIVE_UP_MS, which is generous.
//
// IC_BIN: the server's binary. IC_MODEL: another small model. IC_VERBOSE=1: the server's log on stderr.
// IC_WIRE_GIVE_UP_S: give up sooner, for writing tests.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import assert from 'node:assert/strict';
import fs from 'node:fs';
import http from 'node:http';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { after } from 'node:test';
import { fileURLToPath } from 'node:url';

const here = path.dirname(fileURLToPath(import.meta.url));

function skipAll(why) {
  console.log(`WIRE_SKIPPED: ${why}`); // ctest looks for it
  process.exit(0);
}

export const BIN = process.env.IC_BIN ?? path.join(here, '../../build/inference-core');
export const MODEL = process.env.IC_MODEL ?? path.join(here, '../../demo/models/stories260K-f32.gguf');
export const GIVE_UP_MS = 1000 * Number(process.env.IC_WIRE_GIVE_UP_S ?? 90);
const WebSocket = await import('ws').then(
  (m) => m.default,
  () => skipAll('the npm package ws is missing (npm ci --prefix tests)'),
);
if (!fs.existsSync(BIN)) throw new Error(`no server binary at ${BIN}: set IC_BIN`);

export const GREEDY = { temp: 0 };
// Text without end: no token that ends the answer is ever allowed. With a large --ctx-size it lasts as long as wanted.
export const ENDLESS = { temp: 1, seed: 1, grammar: 'root ::= [a-zA-Z .,\\n] root' };

// The text that the same prompt got alone (with logprobs: 2). What stands beside a row in a batch, and whether a cell was computed in a
// prompt or one by one, may change the last bits of a logit (other kernels, another order of sums), and a greedy
// answer turns where two tokens are as good as equal. So a difference is allowed only there.
export function same(got, want) {
  const at = got.tokens.findIndex((t, i) => t.content !== want.tokens[i]?.content || t.index !== want.tokens[i]?.index);
  if (at < 0) return assert.equal(got.tokens.length, want.tokens.length);
  const [a, b] = want.tokens[at].logprobs;
  const where = `token ${at}: ${JSON.stringify(got.tokens[at])}, alone ${JSON.stringify(want.tokens[at])}`;
  assert.ok(a.logprob - b.logprob < 0.05, `another text than alone, and no tie. ${where}`);
  assert.equal(got.tokens[at].content, b.token, `at a tie the other one is taken. ${where}`);
}

// Two answers to one question, logprobs and all: everything alike but for the last bits of the numbers, for the same reason.
export function alike(got, want, what = 'answer') {
  const number = (a, b, where) => assert.ok(Math.abs(a - b) < 0.05, `${where}: ${a}, not ${b}`);
  const walk = (a, b, where) => {
    if (typeof a === 'number' && typeof b === 'number') return number(a, b, where);
    if (a === null || b === null || typeof a !== 'object' || typeof b !== 'object') return assert.deepEqual(a, b, where);
    assert.deepEqual(Object.keys(a).sort(), Object.keys(b).sort(), where);
    for (const k of Object.keys(a)) walk(a[k], b[k], `${where}.${k}`);
  };
  walk(got, want, what);
}

export function deferred() {
  let resolve, reject;
  const promise = new Promise((a, b) => ((resolve = a), (reject = b)));
  promise.catch(() => {}); // whoever awaits it sees the failure; nobody must
  return { promise, resolve, reject };
}

export function within(promise, what, ms = GIVE_UP_MS) {
  let timer;
  const late = new Promise((_, no) => {
    timer = setTimeout(() => no(new Error(`gave up waiting for ${what}`)), ms);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

export const sleep = (ms) => new Promise((r) => setTimeout(r, ms));

/** Asks again and again until `fn` gives something true, and returns that. */
export async function until(fn, what) {
  for (const give_up = Date.now() + GIVE_UP_MS; ; await sleep(10)) {
    const got = await fn();
    if (got) return got;
    if (Date.now() > give_up) throw new Error(`gave up waiting for ${what}`);
  }
}

export async function freePort() {
  const s = net.createServer().listen(0, '127.0.0.1');
  await once(s, 'listening');
  const { port } = s.address();
  s.close();
  await once(s, 'close');
  return port;
}

export function tempDir(t) {
  const dir = fs.mkdtempSync(path.join(os.tmpdir(), 'ic-wire-'));
  t.after(() => fs.rmSync(dir, { recursive: true, force: true }));
  return dir;
}

// ---- the server ------------------------------------------------------------------------------------------------

const living = new Set();
const killAll = () => living.forEach((p) => p.kill('SIGKILL'));
process.on('exit', killAll);
after(killAll); // a test that failed may have left its server, and that would keep this process alive
for (const s of ['SIGTERM', 'SIGINT', 'SIGHUP']) process.on(s, () => process.exit(1));

// Where util-linux is there, a server also goes with a test that was killed by force (by ctest, at its time limit).
const SETPRIV = ['/usr/bin/setpriv', '/bin/setpriv'].find((f) => fs.existsSync(f));
function launch(args, options, bin = BIN) {
  return SETPRIV ? spawn(SETPRIV, ['--pdeathsig', 'KILL', '--', bin, ...args], options) : spawn(bin, args, options);
}

// The parent's own IC_ settings must not reach the server.
function serverEnv(extra) {
  const env = Object.fromEntries(Object.entries(process.env).filter(([k]) => !k.startsWith('IC_')));
  return { ...env, ...extra };
}

/** Runs the binary to its end: {code, signal, stdout, stderr}. */
export async function run(args, { env = {}, input = '', bin } = {}) {
  const p = launch(args, { env: serverEnv(env), stdio: 'pipe' }, bin);
  const out = { stdout: '', stderr: '' };
  living.add(p);
  p.stdin.on('error', () => {});
  p.stdin.end(input);
  for (const s of ['stdout', 'stderr']) p[s].setEncoding('utf8').on('data', (d) => (out[s] += d));
  const [code, signal] = await within(once(p, 'close'), `${args.join(' ')} to end`);
  living.delete(p);
  return { ...out, code, signal };
}

export class Server {
  // logFile: where the server's log goes with --log-file; before: words of the command line in front of "serve"; port:
  // that one, and it is /ready that tells, not a line of the log; bin: another binary than BIN.
  static async start(args = [], { model = MODEL, env = {}, logFile, before = [], port = 0, bin } = {}) {
    const s = new Server();
    const all = [...before, 'serve', '--port', String(port), '--threads', process.env.IC_THREADS ?? '1', ...(model ? ['--model', model] : []), ...args];
    s.process = launch(all, { env: serverEnv(env), stdio: ['ignore', 'ignore', 'pipe'] }, bin);
    living.add(s.process);
    s.log = [];
    s.clients = new Set();
    s.exit = once(s.process, 'close').then(([code, signal]) => {
      living.delete(s.process);
      return { code, signal };
    });
    const ready = deferred();
    let rest = '';
    s.process.stderr.setEncoding('utf8').on('data', (d) => {
      const lines = (rest + d).split('\n');
      rest = lines.pop();
      for (const line of lines) {
        s.log.push(line);
        if (process.env.IC_VERBOSE) console.error(line);
        const at = /ready on wss?:\/\/.*:(\d+)"/.exec(line);
        if (at) ready.resolve(Number(at[1]));
      }
    });
    if (port) {
      s.port = port;
      until(() => s.ready(), 'the server to be ready').then(() => ready.resolve(port), ready.reject);
    }
    if (logFile) {
      const read = () => (fs.existsSync(logFile) ? /ready on wss?:\/\/.*:(\d+)"/.exec(fs.readFileSync(logFile, 'utf8')) : null);
      until(read, 'the server to be ready').then((at) => ready.resolve(Number(at[1])), ready.reject);
    }
    s.exit.then((e) => ready.reject(new Error(`the server ended (${JSON.stringify(e)}):\n${s.log.join('\n')}`)));
    s.port = await within(ready.promise, 'the server to be ready');
    return s;
  }

  ready() {
    return this.http('/ready').then((r) => r.status === 200, () => false);
  }

  connect(options) {
    return Client.open(this, options);
  }

  /** One HTTP exchange: {status, headers, body, json}. */
  async http(target, { method = 'GET', headers = {}, body, agent = false } = {}) {
    const answer = deferred();
    const req = http.request({ host: '127.0.0.1', port: this.port, path: target, method, headers, agent }, answer.resolve);
    req.on('error', answer.reject);
    req.end(body);
    const res = await within(answer.promise, `${method} ${target}`);
    res.setEncoding('utf8');
    let text = '';
    for await (const d of res) text += d;
    return {
      status: res.statusCode,
      headers: res.headers,
      body: text,
      get json() {
        return JSON.parse(text);
      },
    };
  }

  /** /metrics as an object: name or name{labels} → number. */
  async metrics() {
    const { body } = await this.http('/metrics');
    return Object.fromEntries(
      body.split('\n').filter((l) => l && l[0] !== '#').map((l) => [l.slice(0, l.lastIndexOf(' ')), Number(l.slice(l.lastIndexOf(' ')))]),
    );
  }

  idle() {
    return until(async () => {
      const m = await this.metrics();
      return m.ic_text_requests_running === 0 && m.ic_text_requests_waiting === 0;
    }, 'the server to be idle');
  }

  rss() {
    const status = fs.readFileSync(`/proc/${this.process.pid}/status`, 'utf8');
    return Number(/VmRSS:\s+(\d+) kB/.exec(status)[1]) * 1024;
  }

  /** Resident memory has grown by less than `bytes` since it was `before`. The sanitizers keep what was freed, so
   * under them it says nothing. */
  grownLessThan(bytes, before) {
    if (/lib[at]san\.so/.test(fs.readFileSync(`/proc/${this.process.pid}/maps`, 'utf8'))) return;
    const grown = this.rss() - before;
    assert.ok(grown < bytes, `resident memory grew by ${grown} bytes`);
  }

  signal(sig) {
    assert.ok(this.process.kill(sig), `the server is there to get ${sig}`);
  }

  /** The last word of every test file: the server has survived, answers, and leaves cleanly. Under the sanitizers a
   * leak, a race or a memory error shows here as another exit code. */
  async stop() {
    const dead = await Promise.race([this.exit, this.http('/health').then(() => null, (e) => e)]);
    assert.equal(dead, null, `the server has not survived: ${JSON.stringify(dead)} ${dead}\n${this.log.slice(-40).join('\n')}`);
    this.clients.forEach((c) => c.close());
    this.signal('SIGTERM');
    const end = await within(this.exit, 'the server to end');
    assert.deepEqual(end, { code: 0, signal: null }, this.log.slice(-60).join('\n'));
    for (const line of this.log) assert.doesNotThrow(() => JSON.parse(line), `a log line that is not JSON: ${line}`);
  }

  kill() {
    this.process.kill('SIGKILL');
    return this.exit;
  }
}

/** A server for one test, stopped and checked at its end. */
export async function withServer(args, fn, options) {
  const s = await Server.start(args, options);
  try {
    await fn(s);
  } catch (e) {
    s.clients.forEach((c) => c.terminate());
    await s.kill();
    throw e;
  }
  await s.stop();
}

// ---- a WebSocket client -----------------------------------------------------------------------------------------

/** One request as its client sees it. */
class Stream {
  constructor(id) {
    this.id = id;
    this.tokens = []; // token messages
    this.queued = [];
    this.error = null;
    this.end = null;
    this.endAt = deferred();
    this.errorAt = deferred();
    this.firstAt = deferred();
  }
  get text() {
    return this.tokens.map((t) => t.content).join('');
  }
  take(m) {
    if (m.op === 'token') {
      assert.equal(this.end, null, `a token of ${this.id} after its end`);
      this.tokens.push(m);
      this.firstAt.resolve(m);
    } else if (m.op === 'queued') {
      this.queued.push(m);
    } else if (m.op === 'error') {
      this.error = m;
      this.errorAt.resolve(m);
      this.firstAt.reject(new Error(`${this.id}: ${m.code} ${m.message}`));
    } else if (m.op === 'end') {
      assert.equal(this.end, null, `a second end of ${this.id}`);
      this.end = m;
      this.endAt.resolve(m);
      this.firstAt.resolve(null);
    }
  }
  lost(why) {
    for (const d of [this.endAt, this.errorAt, this.firstAt]) d.reject(new Error(`${this.id}: ${why}`));
  }
  /** The first token, or null when it ended without one. */
  first() {
    return within(this.firstAt.promise, `a token of ${this.id}`);
  }
  /** Its end; an error that comes instead throws. */
  async done() {
    await within(Promise.race([this.endAt.promise, this.errorAt.promise]), `the end of ${this.id}`);
    if (this.error && !this.end) throw new Error(`${this.id}: ${this.error.code} ${this.error.message}`);
    return this;
  }
  /** The error that it must get. */
  async refused() {
    await within(Promise.race([this.endAt.promise, this.errorAt.promise]), `the error of ${this.id}`);
    assert.ok(this.error, `${this.id} should have got an error; it ended with ${JSON.stringify(this.end)}`);
    checkError(this.error);
    return this.error;
  }
  /** What comes last, whatever it is. */
  finished() {
    return within(this.endAt.promise, `the end of ${this.id}`);
  }
}

const CODES = ['bad_request', 'too_large', 'unauthorized', 'forbidden', 'not_found', 'busy', 'oom', 'deadline', 'unavailable', 'internal'];

export function checkError(m) {
  assert.equal(m.op, 'error');
  assert.ok(CODES.includes(m.code), `the code ${m.code} is one of protocol.md`);
  assert.equal(typeof m.message, 'string');
  assert.ok(m.message.length > 0);
  assert.equal(m.error, m.message, 'message and error carry the same text');
}

let ids = 0;

export class Client {
  static async open(server, { headers = {}, path: at = '/', agent, hello = true } = {}) {
    const c = new Client();
    c.server = server;
    c.log = []; // every message, as parsed
    c.streams = new Map();
    c.waiting = [];
    c.closed = deferred(); // {code, reason}
    c.isOpen = true;
    c.ws = new WebSocket(`ws://127.0.0.1:${server.port}${at}`, { headers, agent, perMessageDeflate: false });
    server.clients.add(c);
    c.ws.on('message', (data, binary) => c.take(data, binary)); // ws itself checks that text is UTF-8
    c.ws.on('close', (code, reason) => c.gone(code, reason.toString()));
    const opened = deferred();
    c.ws.on('open', opened.resolve);
    c.ws.on('unexpected-response', (req, res) => {
      let body = '';
      res.on('data', (d) => (body += d));
      res.on('end', () => opened.reject(Object.assign(new Error(`HTTP ${res.statusCode}`), { status: res.statusCode, body, headers: res.headers })));
    });
    c.ws.on('error', (e) => {
      c.failure = e;
      opened.reject(e);
    });
    await within(opened.promise, 'the WebSocket handshake');
    if (hello) c.hello = await c.wait((m) => m.op === 'hello', 'hello');
    return c;
  }

  take(data, binary) {
    let m;
    try {
      assert.ok(!binary, 'a binary message where JSON text was expected');
      m = JSON.parse(data.toString());
      this.log.push(m);
      const s = this.streams.get(m.id);
      if (s && m.op !== 'abort') s.take(m);
      this.onmessage?.(m);
      this.waiting = this.waiting.filter((w) => !(w.pred(m) && (w.d.resolve(m), true)));
    } catch (e) {
      this.failure = e;
      this.gone(0, String(e));
      this.ws.terminate();
    }
  }

  gone(code, reason) {
    this.isOpen = false;
    this.closed.resolve({ code, reason });
    for (const w of this.waiting) w.d.reject(new Error(`the connection closed (${code} ${reason}) before ${w.what}`));
    this.waiting = [];
    this.streams.forEach((s) => s.lost(`the connection closed (${code} ${reason})`));
  }

  mark() {
    return this.log.length;
  }

  /** The first message from `from` on that pleases `pred`. */
  wait(pred, what = String(pred), from = 0) {
    const had = this.log.slice(from).find(pred);
    if (had) return Promise.resolve(had);
    if (!this.isOpen) return Promise.reject(this.failure ?? new Error(`the connection is closed; no ${what}`));
    const d = deferred();
    this.waiting.push({ pred, what, d });
    return within(d.promise, what);
  }

  send(m, options) {
    this.ws.send(typeof m === 'string' || m instanceof Uint8Array ? m : JSON.stringify(m), options);
  }

  /** Sends and waits for the first later message that pleases `pred` (or has that op). */
  ask(m, pred, options) {
    const from = this.mark();
    this.send(m, options);
    const test = typeof pred === 'string' ? (x) => x.op === pred : pred;
    return this.wait(test, `the answer to ${JSON.stringify(m)?.slice(0, 100)}`, from);
  }

  /** Sends what must be refused and returns the error. */
  async bad(m, code, options) {
    const e = await this.ask(m, 'error', options);
    checkError(e);
    if (code) assert.equal(e.code, code, `${JSON.stringify(m)?.slice(0, 200)} → ${e.message}`);
    return e;
  }

  /** Everything sent before has been read and answered by the protocol layer. */
  async sync() {
    const id = `sync-${++ids}`;
    await this.ask({ op: 'abort', id }, (m) => m.op === 'abort' && m.id === id);
  }

  infer(prompt, params = GREEDY, more = {}) {
    const s = new Stream(more.id ?? `t${++ids}`);
    assert.ok(!this.streams.get(s.id) || this.streams.get(s.id).end || this.streams.get(s.id).error, 'the test reuses a live id');
    this.streams.set(s.id, s);
    this.send({ op: 'infer', id: s.id, ...(typeof prompt === 'string' ? { prompt } : { messages: prompt }), params, ...more });
    return s;
  }

  async text(prompt, params, more) {
    return (await this.infer(prompt, params, more).done()).text;
  }

  async session() {
    return (await this.ask({ op: 'create_session' }, (m) => m.op === 'session_created' || m.op === 'session_error')).session_id;
  }

  close() {
    this.ws.close();
    return within(this.closed.promise, 'the connection to close');
  }
  terminate() {
    this.ws.terminate();
  }
}

/** A bare TCP connection that has asked for the upgrade; `data` collects what comes. */
export async function rawSocket(server, text = '') {
  const s = net.connect(server.port, '127.0.0.1');
  s.got = Buffer.alloc(0);
  s.on('data', (d) => (s.got = Buffer.concat([s.got, d])));
  s.on('error', () => {});
  s.ended = once(s, 'close');
  await within(once(s, 'connect'), 'TCP connect');
  if (text) s.write(text);
  return s;
}

export const UPGRADE =
  'GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n' +
  'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n';

/** A masked client frame. */
export function frame(opcode, payload, { fin = true } = {}) {
  const p = Buffer.from(payload);
  const head = p.length < 126 ? [p.length] : p.length < 65536 ? [126, p.length >> 8, p.length & 255] : null;
  assert.ok(head, 'small frames only');
  head[0] |= 0x80;
  const mask = Buffer.from([1, 2, 3, 4]);
  return Buffer.concat([Buffer.from([(fin ? 0x80 : 0) | opcode, ...head]), mask, Buffer.from(p.map((b, i) => b ^ mask[i & 3]))]);
}
