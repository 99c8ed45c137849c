// POST /predict: one step for a caller that keeps its own state, in every form it may come in.
import test, { afterEach } from 'node:test';
import assert from 'node:assert/strict';
import path from 'node:path';
import { rawSocket, tempDir, until } from './lib.mjs';
import { CONVLSTM, LAW, LAW_NAME, SimClient, dropClients, floats, lawServer, readSafetensors, root, stepByHand } from './simlib.mjs';
import { Server } from './lib.mjs';

const server = await Server.start(['--law', `${LAW},${CONVLSTM}`], { model: null });
const MEMORY = (await server.http('/v1/laws')).json.data.find((l) => l.memory).name;

const start = (n, seed = 1) => Buffer.from(Float32Array.from({ length: n }, (_, i) => Math.sin(i * 1.7 + seed) * 0.6).buffer);
const PSI = start(16 * 16 * 4); // of the demo law on 16 x 16

/** One exchange with a binary answer: {status, type, bytes}. */
async function post(target, body, headers = {}) {
  const r = await fetch(`http://127.0.0.1:${server.port}${target}`, { method: 'POST', body, headers });
  return { status: r.status, type: r.headers.get('content-type'), headers: r.headers, bytes: Buffer.from(await r.arrayBuffer()) };
}
const raw = (query, body, headers = {}) => post(`/predict${query}`, body, { 'content-type': 'application/octet-stream', ...headers });
const json = (fields, query = '') => post(`/predict${query}`, JSON.stringify(fields), { 'content-type': 'application/json' });

/** [H,W,d,2] to [2d,H,W] and back. */
function toChw(bytes, cells, d) {
  const v = floats(bytes), out = new Float32Array(v.length);
  for (let i = 0; i < cells; i++) for (let k = 0; k < d; k++) for (let r = 0; r < 2; r++) out[(r * d + k) * cells + i] = v[(i * d + k) * 2 + r];
  return Buffer.from(out.buffer);
}
function fromChw(bytes, cells, d) {
  const v = floats(bytes), out = new Float32Array(v.length);
  for (let i = 0; i < cells; i++) for (let k = 0; k < d; k++) for (let r = 0; r < 2; r++) out[(i * d + k) * 2 + r] = v[(r * d + k) * cells + i];
  return Buffer.from(out.buffer);
}

let want;

afterEach(() => server.exited || dropClients(server));

test('raw hwd2, by query, is the step of `law step`', async (t) => {
  want = await stepByHand(tempDir(t), PSI, [16, 16, 2], 1);
  const r = await raw(`?law=${LAW_NAME}&height=16&width=16`, PSI);
  assert.equal(r.status, 200);
  assert.equal(r.type, 'application/octet-stream');
  assert.deepEqual(r.bytes, want);
  assert.deepEqual((await raw('?grid=16', PSI)).bytes, want, 'the first law, a square grid');
  assert.deepEqual((await raw('?grid=16&layout=hwd2', PSI)).bytes, want);
  assert.deepEqual((await post('/predict?grid=16', PSI)).bytes, want, 'whatever is no JSON is raw');
});

test('raw, by headers', async () => {
  const r = await raw('', PSI, { 'x-ic-law': LAW_NAME, 'x-ic-height': '16', 'x-ic-width': '16' });
  assert.equal(r.status, 200);
  assert.deepEqual(r.bytes, want);
  assert.deepEqual((await raw('?grid=16', PSI, { 'x-ic-grid': '999' })).bytes, want, 'the query comes first');
});

test('chw in, chw out', async () => {
  const r = await raw('?grid=16&layout=chw', toChw(PSI, 256, 2));
  assert.equal(r.status, 200);
  assert.deepEqual(fromChw(r.bytes, 256, 2), want);
  const j = await json({ grid: 16, layout: 'chw', psi: [...floats(toChw(PSI, 256, 2))] });
  const answer = JSON.parse(j.bytes);
  assert.deepEqual(answer.shape, [4, 16, 16]);
  assert.equal(answer.layout, 'chw');
  assert.deepEqual(fromChw(Buffer.from(Float32Array.from(answer.psi).buffer), 256, 2), want);
});

test('JSON, flat and nested, exact to the last bit', async () => {
  const flat = [...floats(PSI)];
  const nested = Array.from({ length: 16 }, (_, y) => Array.from({ length: 16 }, (_, x) => [0, 1].map((k) => flat.slice(((y * 16 + x) * 2 + k) * 2, ((y * 16 + x) * 2 + k) * 2 + 2))));
  for (const psi of [flat, nested, [flat]]) {
    const r = await json({ law: LAW_NAME, height: 16, width: 16, psi });
    assert.equal(r.status, 200);
    assert.equal(r.type, 'application/json');
    const a = JSON.parse(r.bytes);
    assert.equal(a.law, LAW_NAME);
    assert.equal(a.layout, 'hwd2');
    assert.deepEqual(a.shape, [16, 16, 2, 2]);
    assert.deepEqual(Buffer.from(Float32Array.from(a.psi).buffer), want);
  }
  const mixed = await json({ psi: flat }, '?grid=16');
  assert.equal(mixed.status, 200, 'what the JSON does not say may stand in the query');
});

test('gamma is the caller’s own', async (t) => {
  for (const g of ['0', '0.37']) {
    const by = await stepByHand(tempDir(t), PSI, [16, 16, 2], 1, ['--gamma', g]);
    assert.notDeepEqual(by, want);
    assert.deepEqual((await raw(`?grid=16&gamma=${g}`, PSI)).bytes, by);
    assert.deepEqual((await raw('?grid=16', PSI, { 'x-ic-gamma': g })).bytes, by);
    assert.deepEqual(Buffer.from(Float32Array.from(JSON.parse((await json({ grid: 16, gamma: Number(g), psi: [...floats(PSI)] })).bytes).psi).buffer), by);
  }
});

test('one step is PyTorch’s', async () => {
  for (const [law, dir] of [[LAW_NAME, 'ginzburg-landau'], [MEMORY, 'unet_convlstm-d4-b8']]) {
    const g = readSafetensors(path.join(root, 'tests/golden', dir, 'golden.safetensors'));
    const [h, w] = g.psi_0.shape;
    const r = await raw(`?law=${law}&height=${h}&width=${w}`, g.psi_0.bytes);
    assert.equal(r.status, 200);
    const b = new Float64Array(Uint8Array.from(g['psi_1.f64'].bytes).buffer);
    const got = floats(r.bytes);
    assert.ok(got.length >= b.length);
    let worst = 0;
    b.forEach((x, i) => (worst = Math.max(worst, Math.abs(x - got[i]))));
    assert.ok(worst <= 1e-5, `${law}: ${worst}`);
  }
});

test('a law with memory: h and c follow psi, and go back the same way', async () => {
  const g = readSafetensors(path.join(root, 'tests/golden/unet_convlstm-d4-b8/golden.safetensors'));
  const [h, w, d] = g.psi_0.shape;
  const psiBytes = h * w * d * 8, memory = 2 * 4 * 8 * (h / 4) * (w / 4) * 4;
  let state = g.psi_0.bytes, forgetful = g.psi_0.bytes;
  for (let i = 0; i < 10; i++) {
    const r = await raw(`?law=${MEMORY}&height=${h}&width=${w}`, state);
    assert.equal(r.status, 200);
    assert.equal(r.bytes.length, psiBytes + memory);
    state = r.bytes;
    forgetful = (await raw(`?law=${MEMORY}&height=${h}&width=${w}`, forgetful)).bytes.subarray(0, psiBytes);
  }
  const b = new Float64Array(Uint8Array.from(g['psi_10.f64'].bytes).buffer);
  const distance = (bytes) => floats(bytes.subarray(0, psiBytes)).reduce((m, x, i) => Math.max(m, Math.abs(x - b[i])), 0);
  assert.ok(distance(state) < 2e-4, `ten steps with their memory are PyTorch’s ten steps: ${distance(state)}`);
  assert.ok(distance(forgetful) > 10 * distance(state) + 1e-6, 'and without it they are not');
  // the same through chw (psi only is turned; h and c are as they are) and JSON
  const one = await raw(`?law=${MEMORY}&height=${h}&width=${w}`, state);
  const chw = await raw(`?law=${MEMORY}&height=${h}&width=${w}&layout=chw`, Buffer.concat([toChw(state.subarray(0, psiBytes), h * w, d), state.subarray(psiBytes)]));
  assert.deepEqual(Buffer.concat([fromChw(chw.bytes.subarray(0, psiBytes), h * w, d), chw.bytes.subarray(psiBytes)]), one.bytes);
  const j = JSON.parse((await json({ law: MEMORY, height: h, width: w, psi: [...floats(state)] })).bytes);
  assert.deepEqual(Buffer.from(Float32Array.from(j.psi).buffer), one.bytes);
  // a simulation keeps it, too
  const c = await SimClient.open(server);
  const { sim_id } = await c.upload(g.psi_0.bytes, { law: MEMORY, grid: undefined, height: h, width: w, frames: false });
  await c.steps(sim_id, 10);
  assert.ok(distance(await c.state(sim_id)) < 2e-4);
  await c.close();
});

test('many callers at once get what one alone gets, in batches', async () => {
  const states = Array.from({ length: 8 }, (_, i) => start(1024, i));
  const alone = [];
  for (const s of states) alone.push((await raw('?grid=16', s)).bytes);
  const before = await server.metrics();
  let rounds = 0, after;
  do { // until two have met: on a busy machine the engine may be done with each before the next has come
    (await Promise.all(states.map((s) => raw('?grid=16', s)))).forEach((r, i) => assert.deepEqual(r.bytes, alone[i]));
    rounds++;
    after = await server.metrics();
  } while (rounds < 5 || (rounds < 200 && after.ic_law_batched_steps_total === before.ic_law_batched_steps_total));
  assert.equal(after.ic_law_predictions_total - before.ic_law_predictions_total, 8 * rounds);
  assert.ok(after.ic_law_batched_steps_total > before.ic_law_batched_steps_total, 'they were stepped together');
  await until(async () => (await server.metrics()).ic_law_simulations === 0, 'the last one to be forgotten');
});

function checkHttpError(r, status, code, what) {
  assert.equal(r.status, status, `${what}: ${r.bytes}`);
  assert.equal(r.type, 'application/json');
  const { error } = JSON.parse(r.bytes);
  assert.equal(error.code, code, what);
  assert.ok(error.message.length > 0);
  assert.equal(error.type, status >= 500 ? 'server_error' : 'invalid_request_error');
  assert.equal(error.param, null);
}

test('what is wrong is refused with the fitting status', async () => {
  const flat = [...floats(PSI)];
  const cases = [
    [raw('', PSI), 400, 'bad_request'],
    [raw('?height=16', PSI), 400, 'bad_request'],
    [raw('?grid=16', PSI.subarray(4)), 400, 'bad_request'],
    [raw('?grid=16', PSI.subarray(1)), 400, 'bad_request'],
    [raw('?grid=16', Buffer.concat([PSI, PSI])), 400, 'bad_request'],
    [raw('?grid=16', Buffer.alloc(0)), 400, 'bad_request'],
    [raw('?grid=18', start(18 * 18 * 4)), 400, 'bad_request'],
    [raw('?grid=16.5', PSI), 400, 'bad_request'],
    [raw('?grid=-16', PSI), 400, 'bad_request'],
    [raw('?grid=0', PSI), 400, 'bad_request'],
    [raw('?grid=abc', PSI), 400, 'bad_request'],
    [raw('?grid=nan', PSI), 400, 'bad_request'],
    [raw('?grid=1e300', PSI), 400, 'bad_request'],
    [raw('?grid=4096', PSI), 413, 'too_large'],
    [raw('?grid=16&law=other', PSI), 404, 'not_found'],
    [raw('?grid=16&law=%ff%fe', PSI), 404, 'not_found'],
    [raw(`?grid=16&law=${'x'.repeat(5000)}`, PSI), 404, 'not_found'],
    [raw('?grid=16&layout=cwh', PSI), 400, 'bad_request'],
    [raw('?grid=16&gamma=much', PSI), 400, 'bad_request'],
    [raw('?grid=16&gamma=1e9', PSI), 400, 'bad_request'],
    [raw(`?law=${MEMORY}&grid=16`, start(16 * 16 * 8 + 7)), 400, 'bad_request'],
    [json({ grid: 16 }), 400, 'bad_request'],
    [json({ grid: 16, psi: flat.slice(1) }), 400, 'bad_request'],
    [json({ grid: 16, psi: [...flat, 0] }), 400, 'bad_request'],
    [json({ grid: 16, psi: 'text' }), 400, 'bad_request'],
    [json({ grid: 16, psi: null }), 400, 'bad_request'],
    [json({ grid: 16, psi: [...flat.slice(1), 'x'] }), 400, 'bad_request'],
    [json({ grid: 16, psi: [...flat.slice(1), null] }), 400, 'bad_request'],
    [json({ grid: 16, psi: [...flat.slice(1), 1e39] }), 400, 'bad_request'],
    [json({ grid: '16', psi: flat }), 400, 'bad_request'],
    [json({ grid: 16, law: 7, psi: flat }), 400, 'bad_request'],
    [json({ grid: 100000, psi: [] }), 413, 'too_large'],
    [json({ grid: 1024, psi: [1] }), 400, 'bad_request'],
    [json([1, 2, 3]), 400, 'bad_request'],
    [post('/predict?grid=16', '{"psi":[1,', { 'content-type': 'application/json' }), 400, 'bad_request'],
    [post('/predict?grid=16', `{"psi":${'['.repeat(2000)}`, { 'content-type': 'application/json' }), 400, 'bad_request'],
    [raw('?grid=16', Buffer.alloc(2 << 20)), 413, null],
  ];
  for (const [i, [r, status, code]] of cases.entries()) {
    const got = await r;
    if (code) checkHttpError(got, status, code, `case ${i}`);
    else assert.equal(got.status, status, `case ${i}`);
  }
  const get = await server.http('/predict');
  assert.equal(get.status, 405);
  assert.equal(get.headers.allow, 'POST');
  assert.deepEqual((await raw('?grid=16', PSI)).bytes, want, 'and all goes on');
  await until(async () => (await server.metrics()).ic_law_simulations === 0, 'the last one to be gone'); // after its answer
});

test('fields of other messages are ignored, null is none, and no NUL hides the end of a value', async () => {
  const psi = Array.from(floats(PSI));
  const plain = (await json({ grid: 16, psi })).bytes;
  for (const [fields, query] of [[{ grid: 16, view: 5, steps: 0, seed: -1, roi: 7, fps: 'x' }], [{ grid: null, law: null }, '?grid=16']]) {
    const r = await json({ ...fields, psi }, query);
    assert.equal(r.status, 200, `${JSON.stringify(fields)}: ${r.bytes}`);
    assert.deepEqual(r.bytes, plain);
  }
  assert.equal((await raw('?grid=16%00x', PSI)).status, 400);
  assert.equal((await raw(`?grid=16&law=${LAW_NAME}%00x`, PSI)).status, 404);
});

test('callers that hang up before their answer leave nothing behind', async () => {
  for (let i = 0; i < 60; i++) {
    const s = await rawSocket(server, `POST /predict?grid=16 HTTP/1.1\r\nHost: x\r\nContent-Length: ${PSI.length}\r\n\r\n`);
    s.write(i % 3 ? PSI : PSI.subarray(0, 100));
    if (i % 2) await new Promise((r) => setImmediate(r));
    s.destroy();
  }
  await until(async () => (await server.metrics()).ic_law_simulations === 0, 'all to go');
  assert.deepEqual((await raw('?grid=16', PSI)).bytes, want);
});

test('a server without laws says so', async () => {
  const none = await Server.start([]);
  const r = await none.http('/predict?grid=16', { method: 'POST', body: PSI });
  assert.equal(r.status, 503);
  assert.equal(r.json.error.code, 'unavailable');
  assert.deepEqual((await none.http('/v1/laws')).json.data, []);
  assert.deepEqual((await none.http('/v1/sims')).json.data, []);
  const c = await SimClient.open(none);
  await c.refused('sim_create', { grid: 16 }, 'unavailable');
  await none.stop();
});

test('the server has survived', async () => {
  await server.stop();
  server.exited = true;
});
