// Each allocation in turn finds no memory: whoever asked gets a code or is closed, and never waits for ever or gets an
// answer with a hole; the next one is served as if nothing had been.
import test from 'node:test';
import assert from 'node:assert/strict';
import fs from 'node:fs';
import http from 'node:http';
import path from 'node:path';
import WebSocket from 'ws';
import { GREEDY, Server, tempDir, until, within } from './lib.mjs';

const SHIM = process.env.IC_NOMEMORY;
const LAW = path.join(import.meta.dirname, '../../demo/laws/ginzburg-landau');
const CODES = ['oom', 'too_large']; // the latter: a text for which the bound and the memory end alike

let said; // the last error of an HTTP answer

// Sends `first` on a connection of its own and hands on what comes; {over: …} when `step` says so or the connection ends.
function talk(srv, first, step, where = '/') {
  return new Promise((resolve) => {
    const ws = new WebSocket(`ws://127.0.0.1:${srv.port}${where}`);
    const over = (how) => {
      resolve(how);
      ws.removeAllListeners('message');
      ws.terminate();
    };
    ws.on('open', () => [first].flat().forEach((m) => ws.send(Buffer.isBuffer(m) ? m : JSON.stringify(m))));
    ws.on('error', () => over('closed'));
    ws.on('close', () => over('closed'));
    ws.on('message', (data, binary) => {
      const m = binary ? { op: 'binary', data } : JSON.parse(data);
      if (m.op === 'error' || m.op === 'session_error') return over(m.code);
      const how = step(m, (o) => ws.send(JSON.stringify(o)));
      if (how) over(how);
    });
  });
}

function infer(params) {
  return (srv, want) => {
    let text = '';
    return talk(srv, { op: 'infer', prompt: 'Once upon a time', params }, (m) => {
      if (m.op === 'token') text += m.content;
      if (m.op !== 'end') return null;
      assert.equal(text, want ?? text);
      return { text };
    });
  };
}

// Two turns of one session: the second reads what the first said.
function session(srv, want) {
  const texts = ['', ''];
  let turn = 0;
  const ask = (id) => ({ op: 'infer', session_id: id, messages: [{ role: 'user', content: 'Tell me' }], params: { ...GREEDY, max_tokens: 5 } });
  return talk(srv, { op: 'create_session' }, (m, send) => {
    if (m.op === 'session_created') send(ask(m.session_id));
    if (m.op === 'token') texts[turn] += m.content;
    if (m.op === 'end' && turn++ === 0) send(ask(m.session_id));
    if (turn < 2) return null;
    assert.equal(texts.join('|'), want ?? texts.join('|'));
    return { text: texts.join('|') };
  });
}

function simulation(srv) {
  return talk(srv, { op: 'sim_create', grid: 8, seed: 1, frames: false }, (m, send) => {
    if (m.op === 'sim_created') send({ op: 'sim_run', sim_id: m.sim_id, steps: 2 });
    if (m.op === 'sim_status' && m.step === 2) send({ op: 'sim_close', sim_id: m.sim_id });
    return m.op === 'sim_closed' && { text: '' };
  });
}

const PSI = Buffer.from(Float32Array.from({ length: 8 * 8 * 4 }, (_, i) => Math.sin(i * 1.7)).buffer);

// A state up, a step, and down again.
function state(srv, want) {
  return talk(srv, [{ op: 'sim_create', grid: 8, state: true, frames: false }, PSI], (m, send) => {
    if (m.op === 'sim_created') send({ op: 'sim_step', sim_id: m.sim_id, steps: 1 });
    if (m.op === 'sim_status' && m.step === 1) send({ op: 'sim_state', sim_id: m.sim_id });
    if (m.op !== 'binary') return null;
    const text = m.data.subarray(m.data.readUInt32LE(0) + 4).toString('base64');
    assert.ok(text === (want ?? text), 'another state');
    return { text };
  });
}

// As its client speaks it: load, play, some frames, pause, unload.
function atheria(srv) {
  let frames = 0;
  const inference = (command, args = {}) => ({ scope: 'inference', command, args });
  return talk(srv, inference('load_experiment', { experiment_name: 'ginzburg-landau', grid_size: 8 }), (m, send) => {
    if (m.type === 'notification' && m.payload.status === 'error') return 'oom';
    if (m.op === 'binary' && ++frames === 1) send(inference('play'));
    if (m.op === 'binary' && frames === 3) send(inference('pause'));
    if (m.type !== 'inference_status_update') return null;
    if (m.payload.status === 'paused' && frames >= 3) send(inference('unload'));
    return m.payload.status === 'idle' && { text: '' };
  }, '/ws');
}

// {complete, status, text}; not fetch, which takes an answer that breaks off for a whole one
function exchange(srv, where, body, encoding = 'utf8') {
  return new Promise((resolve) => {
    const got = { complete: false, text: '' };
    const req = http.request({ host: '127.0.0.1', port: srv.port, path: where, method: 'POST', agent: false }, (res) => {
      res.setEncoding(encoding).on('data', (d) => (got.text += d)).on('error', () => {});
      res.on('close', () => resolve({ ...got, complete: res.complete, status: res.statusCode }));
    });
    req.on('error', () => resolve(got));
    req.end(body);
  });
}

function post(where, body) {
  return async (srv, want) => {
    const all = await exchange(srv, where, JSON.stringify(body));
    if (!all.complete || all.text === '') return 'closed'; // 500 without a body: there was no memory for one
    if (all.status !== 200) return (said = JSON.parse(all.text).error).code;
    const sse = all.text.split('\n').filter((l) => l.startsWith('data: {')).map((l) => JSON.parse(l.slice(6)));
    const failed = sse.find((e) => e.error);
    if (failed) return (said = failed.error).code;
    if (body.stream) assert.match(all.text, /data: \[DONE\]\n\n$/);
    const o = body.stream ? null : JSON.parse(all.text);
    const text = o ? JSON.stringify(o.choices ?? o.data?.length ?? o) : sse.map((e) => e.choices[0]?.delta.content ?? '').join('');
    if (want !== undefined) assert.equal(text, want);
    return { text };
  };
}

// One step of a state, raw
async function predict(srv, want) {
  const all = await exchange(srv, '/predict?grid=8&layout=chw', PSI, 'latin1');
  if (!all.complete || all.text === '') return 'closed';
  if (all.status !== 200) return (said = JSON.parse(all.text).error).code;
  assert.ok(all.text === (want ?? all.text), 'another state');
  return { text: all.text };
}

const messages = [{ role: 'user', content: 'Hello' }];
const kinds = {
  infer: infer({ ...GREEDY, max_tokens: 6, logprobs: 2, stop: ['zzz'] }),
  session,
  simulation,
  state,
  atheria,
  predict,
  predict_json: post('/predict', { grid: 8, psi: [...new Float32Array(PSI.buffer, PSI.byteOffset, PSI.length / 4)] }),
  chat: post('/v1/chat/completions', { messages, temperature: 0, max_tokens: 6 }),
  stream: post('/v1/chat/completions', { messages, stream: true, temperature: 0, max_tokens: 6, response_format: { type: 'json_schema', json_schema: { name: 'x', schema: { type: 'object', properties: { a: { type: 'integer' } }, required: ['a'] } } } }),
  embeddings: post('/v1/embeddings', { input: ['once', 'upon'] }),
  tokenize: post('/tokenize', { content: 'Once upon a time', with_pieces: true }),
  detokenize: post('/detokenize', { tokens: [300, 301, 302] }),
};

const skip = !SHIM && 'skipped: no IC_NOMEMORY (not under the sanitizers)';

// {arm(n), left(), env}: the n-th allocation from now on fails; how many it takes until then
function fuse(t) {
  const file = path.join(tempDir(t), 'left');
  fs.writeFileSync(file, Buffer.alloc(8));
  const fd = fs.openSync(file, 'r+');
  const arm = (n) => {
    const b = Buffer.alloc(8);
    b.writeBigInt64LE(BigInt(n));
    fs.writeSync(fd, b, 0, 8, 0);
  };
  const left = () => {
    const b = Buffer.alloc(8);
    fs.readSync(fd, b, 0, 8, 0);
    return Number(b.readBigInt64LE());
  };
  t.after(() => fs.closeSync(fd));
  return { arm, left, env: { LD_PRELOAD: SHIM, NOMEMORY_FILE: file } };
}

test('no memory for the n-th allocation', { skip }, async (t) => {
  const { arm, left, env } = fuse(t);
  const srv = await Server.start(['--pooling', 'mean', '--chat-template', 'chatml', '--law', LAW], { env });
  for (const [kind, ask] of Object.entries(kinds)) {
    await ask(srv); // what is kept for the next one is there then
    const { text } = await ask(srv);
    let failed = 0;
    for (let n = 1; ; n++) {
      arm(n);
      const how = await within(ask(srv, text), `${kind}, allocation ${n}`);
      const hit = left() === 0;
      arm(0);
      if (!hit) break;
      if (typeof how !== 'string') continue; // it can do without that one
      assert.ok(how === 'closed' || CODES.includes(how), `${kind}, allocation ${n}: ${how} ${said?.message}`);
      failed++;
    }
    assert.ok(failed > 3, `${kind}: the allocations of ${failed} were asked for`);
    assert.equal((await within(ask(srv, text), `${kind} afterwards`)).text, text);
    await until(async () => (await srv.metrics()).ic_law_simulations === 0, `the simulations of ${kind} to end`);
  }
  await srv.stop();
});

// A supervisor asks for less after a 5, and for good takes a 2 or 3 for what another start does not mend.
test('no memory for the n-th allocation of a start: it can do without, or ends with 5 and one line', { skip }, async (t) => {
  const { arm, left, env } = fuse(t);
  const dir = tempDir(t);
  const [config, keys] = ['config.ini', 'keys.ini'].map((f) => path.join(dir, f));
  fs.writeFileSync(config, '[server]\nhost = 127.0.0.1\nlog-level = info\n');
  fs.writeFileSync(keys, '[alice]\nkey = 0123456789abcdef\n[bob]\nkey = 123456789abcdef0\n');
  let failed = 0;
  for (let n = 1; ; n++) {
    arm(n);
    const srv = await Server.start(['--config', config, '--keys', keys, '--cache-disk', dir], { env }).catch((e) => e);
    const hit = left() === 0;
    arm(0);
    if (srv instanceof Server) {
      await srv.stop();
    } else {
      const [, end, said] = /^the server ended \((.*)\):\n([^]*)$/.exec(srv.message) ?? assert.fail(`allocation ${n}: ${srv.message}`);
      assert.equal(end, '{"code":5,"signal":null}', `allocation ${n}: ${said}`);
      assert.equal(said.match(/^inference-core: .*(memory|thread)/gm)?.length, 1, `allocation ${n}: ${said}`);
      failed++;
    }
    if (!hit) break;
  }
  assert.ok(failed > 15, `${failed} ended it`);
});
