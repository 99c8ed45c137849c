// A client of the soak: checks every message it gets against what it asked for, and throws at the first that is wrong.
// Nothing in it grows with the length of a run.
import http from 'node:http';
import { createRequire } from 'node:module';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

export const ROOT = path.join(path.dirname(fileURLToPath(import.meta.url)), '../..');
export const GIVE_UP_MS = 90_000; // an answer that has not come by then never will; not a measurement

let WebSocket;
try {
  WebSocket = createRequire(path.join(ROOT, 'tests/package.json'))('ws');
} catch {
  console.log('WIRE_SKIPPED: the npm package ws is missing (npm ci --prefix tests)'); // ctest looks for it
  process.exit(1);
}

export const sleep = (ms) => new Promise((r) => setTimeout(r, ms));

export class Wrong extends Error {}
export function must(ok, what) {
  if (!ok) throw new Wrong(what);
}

export function within(promise, what, ms = GIVE_UP_MS) {
  let timer;
  const late = new Promise((_, no) => {
    timer = setTimeout(() => no(new Wrong(`no ${what} within ${ms / 1000} s`)), ms);
  });
  const either = Promise.race([promise, late]).finally(() => clearTimeout(timer));
  either.catch(() => {}); // what is asked for before something else is awaited can fail first: no crash, whoever awaits it sees it
  return either;
}

const short = (v) => (typeof v === 'string' ? v : JSON.stringify(v))?.slice(0, 160);

function deferred() {
  const d = {};
  d.promise = new Promise((yes, no) => Object.assign(d, { resolve: yes, reject: no }));
  d.promise.catch(() => {}); // whoever awaits it sees it
  return d;
}

/** One generation: its tokens as [content, index], then its end or its error, once. */
class Stream {
  tokens = [];
  margins = []; // where logprobs were asked for: of the most probable token over the next
  end = null;
  error = null;
  over = deferred();
  marks = []; // [count, deferred]: somebody waits for so many tokens

  take(m) {
    must(!this.end, `${m.op} of ${m.id} after its end`);
    if (m.op === 'token') {
      must(!this.error, `a token of ${m.id} after its error`);
      must(!this.acknowledged, `a token of ${m.id} after its abort was acknowledged`);
      must(typeof m.content === 'string' && Number.isInteger(m.index), `a token without content or index: ${short(m)}`);
      must(m.index > (this.tokens.at(-1)?.[1] ?? -1), `index ${m.index} after ${this.tokens.at(-1)?.[1]}`);
      must(m.prob >= 0 && m.prob <= 1.0001, `a probability of ${m.prob}`);
      this.tokens.push([m.content, m.index]);
      this.margins.push(m.logprobs?.length > 1 ? m.logprobs[0].logprob - m.logprobs[1].logprob : NaN);
      this.wake();
    } else if (m.op === 'error') {
      must(!this.error, `a second error of ${m.id}`);
      this.error = m;
    } else if (m.op === 'end') {
      must(!this.error || m.reason === 'error', `an end with reason ${m.reason} after an error`);
      this.end = m;
      this.over.resolve(this);
      this.wake();
    }
  }
  wake() {
    this.marks = this.marks.filter(([n, d]) => !((this.tokens.length >= n || this.end) && (d.resolve(this), true)));
  }
  /** The n-th token has come, or the end. */
  reached(n) {
    const d = deferred();
    this.marks.push([n, d]);
    this.wake();
    return within(Promise.race([d.promise, this.over.promise]), `token ${n}`);
  }
  done() {
    return within(this.over.promise, 'end of a generation');
  }
}

let ids = 0;

/** One WebSocket. */
export class Peer {
  streams = new Map();
  waiting = [];
  frameSteps = new Map(); // sim_id: step of its last frame
  resets = new Set(); // sim_ids that may begin anew
  header = null; // Atheria's dialect: of a frame whose body comes next
  closed = deferred();
  failure = null;

  static async open(port, at = '/') {
    const p = new Peer();
    p.ws = new WebSocket(`ws://127.0.0.1:${port}${at}`, { perMessageDeflate: false });
    p.native = at === '/';
    p.ws.on('message', (data, binary) => p.take(data, binary));
    p.ws.on('close', (code) => p.gone(code));
    p.ws.on('error', () => {}); // a close follows
    const hello = p.wait((m) => m.op === 'hello' || m.type === 'initial_state', 'greeting');
    await within(new Promise((yes, no) => (p.ws.once('open', yes), p.closed.promise.then((c) => no(new Wrong(`no handshake (${c})`))))), 'handshake');
    p.hello = await hello;
    return p;
  }

  take(data, binary) {
    try {
      const m = binary && this.native ? parseBinary(data) : binary ? { op: 'pair', header: this.header, bytes: data.length } : JSON.parse(data.toString());
      if (!this.native) {
        must(binary === !!this.header && (!binary || data.length === this.header.size), `header ${short(this.header)}, then ${binary ? data.length + ' bytes' : short(m)}`);
        this.header = m.type === 'simulation_frame_binary' ? m : null;
      }
      if (m.op === 'frame') {
        must(m.step >= (this.frameSteps.get(m.sim_id) ?? 0) || (m.step === 0 && this.resets.has(m.sim_id)), `a frame of step ${m.step} after ${this.frameSteps.get(m.sim_id)}`);
        this.frameSteps.set(m.sim_id, m.step);
      }
      if (m.op === 'abort' && m.status === 'aborted' && this.streams.has(m.id)) this.streams.get(m.id).acknowledged = true;
      if (m.op === 'token' || m.op === 'end') must(this.streams.has(m.id), `${m.op} of a request that is not this client's: ${short(m)}`);
      if (m.op === 'token' || m.op === 'end' || (m.op === 'error' && this.streams.has(m.id))) this.streams.get(m.id).take(m);
      this.waiting = this.waiting.filter((w) => !(w.pred(m) && (w.d.resolve(m), true)));
    } catch (e) {
      this.fail(e);
    }
  }

  fail(e) {
    this.failure ??= e;
    this.gone(0);
    this.ws.terminate();
  }

  gone(code) {
    const why = this.failure ?? new Wrong(`the connection closed with ${code}`);
    this.closed.resolve(code);
    for (const w of this.waiting) w.d.reject(why);
    this.waiting = [];
    for (const s of this.streams.values()) {
      s.over.reject(why);
      for (const [, d] of s.marks) d.reject(why);
    }
  }

  wait(pred, what) {
    const d = deferred();
    this.waiting.push({ pred, d });
    return within(d.promise, what);
  }

  send(m) {
    this.ws.send(typeof m === 'string' || m instanceof Uint8Array ? m : JSON.stringify(m));
  }

  ask(m, pred) {
    const answer = this.wait(pred, `answer to ${short(m)}`);
    this.send(m);
    return answer;
  }

  infer(prompt, params, more = {}) {
    const s = new Stream();
    s.id = `r${++ids}`;
    this.streams.set(s.id, s);
    this.send({ op: 'infer', id: s.id, prompt, params: { temp: 0, ...params }, ...more });
    return s;
  }

  /** The answer to something with an id: `op` or an error of that code. */
  async call(op, fields, want, code) {
    const id = `c${++ids}`;
    const m = await this.ask({ op, id, ...fields }, (x) => x.id === id);
    must(m.op === want && (!code || m.code === code), `${op} was answered with ${short(m)}`);
    return m;
  }

  /** What must be refused, with its code. */
  async bad(m, ...codes) {
    const e = await this.ask(m, (x) => x.op === 'error');
    must(codes.includes(e.code) && e.message && e.error === e.message, `${short(m)} was answered with ${short(e)}`);
  }

  async abort(s) {
    const ack = await this.ask({ op: 'abort', id: s.id }, (m) => m.op === 'abort' && m.id === s.id);
    must(['aborted', 'not_found'].includes(ack.status), `abort: ${short(ack)}`);
    await s.done();
    must(ack.status === 'not_found' || s.end.reason === 'abort', `aborted, but ended with ${short(s.end)}`);
    must(ack.status === 'aborted' || s.end.reason !== 'abort', `nothing aborted, but ended with ${short(s.end)}`);
  }

  async close() {
    if (this.failure) throw this.failure;
    this.ws.close();
    const code = await within(this.closed.promise, 'close');
    if (this.failure) throw this.failure;
    must(code === 1000 || code === 1005, `closed with ${code}`);
  }
}

/** A binary message: its header, with `body` beside. */
export function parseBinary(data) {
  const n = data.readUInt32LE(0);
  must(n > 0 && 4 + n <= data.length && (4 + n) % 8 === 0, `a header of ${n} bytes in a message of ${data.length}`);
  const m = JSON.parse(data.subarray(4, 4 + n).toString());
  must(['frame', 'state'].includes(m.op), `a binary message ${m.op}`);
  must(data.length - 4 - n === m.shape.reduce((a, b) => a * b, { u8: 1, f32: 4 }[m.dtype]), `shape ${m.shape} and ${data.length - 4 - n} bytes`);
  if (m.op === 'frame') must(Number.isFinite(m.min) && Number.isFinite(m.max) && m.min <= m.max, `a frame from ${m.min} to ${m.max}`);
  return Object.assign(m, { body: data.subarray(4 + n) });
}

/** One HTTP exchange on a connection of its own: {status, body}. */
export function fetchText(port, target, { method = 'GET', body, headers = {} } = {}) {
  const answer = new Promise((yes, no) => {
    const req = http.request({ host: '127.0.0.1', port, path: target, method, headers, agent: false }, (res) => {
      let text = '';
      res.setEncoding('utf8');
      res.on('data', (d) => (text += d));
      res.on('error', no);
      res.on('end', () => yes({ status: res.statusCode, body: text }));
    });
    req.on('error', no);
    req.end(body);
  });
  return within(answer, `${method} ${target}`);
}
