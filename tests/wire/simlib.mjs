// What the tests of simulations share: clients that read binary messages in both dialects, safetensors, the demo law.
import assert from 'node:assert/strict';
import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { Client, Server, checkError, run, until } from './lib.mjs';

export const root = path.join(path.dirname(fileURLToPath(import.meta.url)), '../..');
export const LAW = path.join(root, 'demo/laws/ginzburg-landau');
export const LAW_NAME = 'ginzburg-landau';
export const MLP = path.join(root, 'tests/golden/mlp-d8-b32'); // a hundred times cheaper a step: for tests that need many frames
export const MLP_NAME = 'mlp-d8-b32';
export const CONVLSTM = path.join(root, 'tests/golden/unet_convlstm-d4-b8');

/** A server with the demo law and no text model. */
export const lawServer = (args = [], options = {}) => Server.start(['--law', `${LAW},${MLP}`, ...args], { model: null, ...options });

export const VIEWS = {
  density: 1, phase: 1, phase_hsv: 3, real: 1, imag: 1, fields: 3, physics: 1, flow: 3, entropy: 1, coherence: 1,
  channel_activity: 1, gradient: 1, spectral: 1, energy: 1,
};

/** One binary message taken apart, every promise of docs/protocol.md about its layout checked. */
export function parseBinary(data) {
  const n = data.readUInt32LE(0);
  assert.ok(n > 0 && 4 + n <= data.length, `a header of ${n} bytes in a message of ${data.length}`);
  assert.equal((4 + n) % 8, 0, 'the array begins at a multiple of 8 bytes');
  const m = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(data.subarray(4, 4 + n)));
  const size = { u8: 1, f32: 4 }[m.dtype];
  assert.ok(size, `dtype ${m.dtype}`);
  const memory = m.memory_shape ? m.memory_shape.reduce((a, b) => a * b, size) : 0; // h and c behind psi
  assert.equal(data.length - 4 - n, m.shape.reduce((a, b) => a * b, size) + memory, 'shape and dtype give the bytes that follow');
  m.bytes = Buffer.from(data.subarray(4 + n));
  Object.defineProperty(m, 'values', {
    get: () => (m.dtype === 'u8' ? Uint8Array.from(m.bytes) : new Float32Array(Uint8Array.from(m.bytes).buffer)),
  });
  return m;
}

let ids = 0;

export class SimClient extends Client {
  static async open(server, options) {
    const c = Object.setPrototypeOf(await Client.open(server, options), SimClient.prototype);
    c.frames = []; // the last ones
    c.frameCount = 0;
    return c;
  }

  take(data, binary) {
    if (!binary) return super.take(data, binary);
    let m;
    try {
      m = parseBinary(data);
      assert.ok(m.op === 'frame' || m.op === 'state', `a binary message ${m.op}`);
      if (m.op === 'frame') {
        this.frameCount++;
        this.frames.push(m);
        if (this.frames.length > 300) this.frames.shift();
      }
    } catch (e) {
      this.failure = e;
      this.gone(0, String(e));
      this.ws.terminate();
      return;
    }
    this.waiting = this.waiting.filter((w) => !(w.pred(m) && (w.d.resolve(m), true)));
  }

  /** Sends a sim_ message and returns its answer, which must carry the id; an error throws. */
  async sim(op, fields = {}) {
    const id = `s${++ids}`;
    const m = await this.ask({ op, id, ...fields }, (x) => x.id === id);
    if (m.op === 'error') {
      checkError(m);
      throw Object.assign(new Error(`${op}: ${m.code} ${m.message}`), { code: m.code });
    }
    const want = { sim_create: 'sim_created', sim_close: 'sim_closed', sim_state: 'state' }[op] ?? 'sim_status';
    assert.equal(m.op, want, JSON.stringify(m));
    return m;
  }

  async refused(op, fields, code) {
    const id = `s${++ids}`;
    const m = await this.ask({ op, id, ...fields }, (x) => x.id === id);
    assert.equal(m.op, 'error', `${op} ${JSON.stringify(fields)} should have been refused, got ${JSON.stringify(m)}`);
    checkError(m);
    assert.equal(m.code, code, `${op} ${JSON.stringify(fields)} → ${m.message}`);
    return m;
  }

  create(fields = {}) {
    return this.sim('sim_create', { grid: 16, seed: 1, ...fields });
  }

  /** Runs exactly n steps and waits for the end of the run. */
  async steps(sim_id, n, fields = {}) {
    const over = this.wait((m) => m.op === 'sim_status' && m.sim_id === sim_id && !m.id && m.steps_left === 0, `the end of ${n} steps`, this.mark());
    await this.sim('sim_step', { sim_id, steps: n, ...fields });
    return over;
  }

  /** psi as raw bytes. */
  async state(sim_id) {
    return (await this.sim('sim_state', { sim_id })).bytes;
  }

  /** A simulation that begins with this state. */
  async upload(bytes, fields = {}) {
    const id = `s${++ids}`;
    const made = this.ask({ op: 'sim_create', id, grid: 16, state: true, ...fields }, (x) => x.id === id);
    this.send(bytes, { binary: true });
    return made;
  }

  nextFrame(sim_id, pred = () => true) {
    return this.wait((m) => m.op === 'frame' && m.sim_id === sim_id && pred(m), `a frame of ${sim_id}`, this.mark());
  }
}

/** Fails when the server has grown by more than this since `rss`; the sanitizers' own memory says nothing. */
export function checkGrowth(server, rss, most) {
  if (/lib[at]san/.test(fs.readFileSync(`/proc/${server.process.pid}/maps`, 'utf8'))) return;
  assert.ok(server.rss() - rss < most, `memory stays bounded: ${(server.rss() - rss) >> 20} MiB more`);
}

/** After each test: what a failed one has left behind must not fail the next. */
export function dropClients(server) {
  server.clients.forEach((c) => c.terminate());
  server.clients.clear();
  return until(async () => (await server.metrics()).ic_law_simulations === 0, 'the simulations of clients that have gone to go');
}

/** The native answer of /v1/sims. */
export const sims = async (server) => (await server.http('/v1/sims')).json.data;

// ---- Atheria's dialect ----------------------------------------------------------------------------------------

/** `decode` is that of @msgpack/msgpack. Headers and bodies must come in pairs, always. */
export class AtheriaClient extends Client {
  static async open(server, decode, options = {}) {
    const c = Object.setPrototypeOf(await Client.open(server, { path: '/ws', hello: false, ...options }), AtheriaClient.prototype);
    c.decode = decode;
    c.frames = [];
    c.frameCount = 0;
    c.header = null;
    c.loads = 0; // experiments loaded so far
    c.initial = await c.type('initial_state', 0);
    return c;
  }

  take(data, binary) {
    try {
      if (!binary) {
        const m = JSON.parse(data.toString());
        assert.equal(this.header, null, `${m.type} between a header and its body`);
        if (m.type === 'simulation_frame_binary') {
          assert.deepEqual(Object.keys(m).sort(), ['format', 'size', 'type']);
          assert.equal(m.format, 'msgpack');
          this.header = m;
          return;
        }
        if (m.op !== 'error') assert.equal(typeof m.payload, 'object', 'type and payload');
        if (m.type === 'notification' && m.payload.status === 'success') this.loads++;
      } else {
        assert.ok(this.header, 'a body without a header');
        assert.equal(data.length, this.header.size);
        this.header = null;
        const m = { frame: this.decode(data) };
        this.frameCount++;
        this.frames.push(m.frame);
        if (this.frames.length > 200) this.frames.shift();
        this.waiting = this.waiting.filter((w) => !(w.pred(m) && (w.d.resolve(m), true)));
        return;
      }
    } catch (e) {
      this.failure = e;
      this.gone(0, String(e));
      this.ws.terminate();
      return;
    }
    super.take(data, binary);
  }

  cmd(scope, command, args = {}) {
    this.send({ scope, command, args });
  }

  /** The next message of a type. */
  async type(type, from = this.mark()) {
    return (await this.wait((m) => m.type === type, type, from)).payload;
  }

  async answer(scope, command, args, type) {
    const from = this.mark();
    this.cmd(scope, command, args);
    return this.type(type, from);
  }

  async frame(pred = () => true) {
    return (await this.wait((m) => m.frame && pred(m.frame), 'a frame', this.mark())).frame;
  }

  async load(args = {}) {
    const from = this.mark();
    const before = this.loads;
    const first = this.frame(() => this.loads > before); // not a late one of another experiment
    this.cmd('inference', 'load_experiment', { experiment_name: LAW_NAME, grid_size: 16, ...args });
    const n = await this.wait((m) => m.type === 'notification' && ['success', 'error'].includes(m.payload.status), 'the load', from);
    assert.equal(n.payload.status, 'success', n.payload.message);
    return first;
  }
}

// ---- safetensors ------------------------------------------------------------------------------------------------

export function writeSafetensors(file, name, shape, bytes) {
  let head = JSON.stringify({ [name]: { dtype: 'F32', shape, data_offsets: [0, bytes.length] } });
  head += ' '.repeat((8 - (head.length % 8)) % 8);
  const n = Buffer.alloc(8);
  n.writeBigUInt64LE(BigInt(head.length));
  fs.writeFileSync(file, Buffer.concat([n, Buffer.from(head), bytes]));
}

export function readSafetensors(file) {
  const data = fs.readFileSync(file);
  const n = Number(data.readBigUInt64LE(0));
  const head = JSON.parse(data.subarray(8, 8 + n));
  return Object.fromEntries(
    Object.entries(head)
      .filter(([k]) => k !== '__metadata__')
      .map(([k, t]) => [k, { shape: t.shape, dtype: t.dtype, bytes: data.subarray(8 + n + t.data_offsets[0], 8 + n + t.data_offsets[1]) }]),
  );
}

export const floats = (bytes) => new Float32Array(Uint8Array.from(bytes).buffer);

/** What `inference-core law step` makes of a state. */
export async function stepByHand(dir, bytes, [h, w, d], steps, more = [], checkpoint = path.join(LAW, fs.readdirSync(LAW).find((f) => f.endsWith('.pth')))) {
  const [a, b] = [path.join(dir, 'in.safetensors'), path.join(dir, 'out.safetensors')];
  writeSafetensors(a, 'psi', [h, w, d, 2], bytes);
  const r = await run(['law', 'step', '--checkpoint', checkpoint, '--state', a, '--steps', String(steps), '--out', b, '--backend', 'cpu', ...more]);
  assert.equal(r.code, 0, r.stderr);
  return readSafetensors(b).psi.bytes;
}
