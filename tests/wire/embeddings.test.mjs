// POST /v1/embeddings: vectors that depend on their text alone, their two forms, what is refused, and hang-ups.
import test from 'node:test';
import assert from 'node:assert/strict';
import { ENDLESS, MODEL, Server, rawSocket, run, until, withServer } from './lib.mjs';

const PATH = '/v1/embeddings';
const N_EMBD = 64; // of the 1 MB model
// Batches of another shape, and cells of the f16 cache in another order, round otherwise: up to 2.7e-4 seen, where the nearest
// two of the texts here are 1.1e-3 apart.
const NEAR = 5e-4;
const FAR = 1e-2;
const TEXT = 'Once upon a time there was a little girl who liked to play in the park';
const headers = { 'Content-Type': 'application/json' };

const server = await Server.start(['--pooling', 'mean', '--ctx-size', '512']);
const post = (body, s = server) => s.http(PATH, { method: 'POST', headers, body: typeof body === 'string' ? body : JSON.stringify(body) });
const apart = (a, b) => Math.max(...a.map((v, i) => Math.abs(v - b[i])));
const norm = (v) => Math.hypot(...v);

async function vectors(input, more = {}, s = server) {
  const r = await post({ input, ...more }, s);
  assert.equal(r.status, 200, r.body);
  assert.deepEqual(Object.keys(r.json), ['object', 'data', 'model', 'usage']);
  r.json.data.forEach((d, i) => {
    assert.deepEqual(Object.keys(d), ['object', 'index', 'embedding']);
    assert.equal(d.object, 'embedding');
    assert.equal(d.index, i);
  });
  return r.json.data.map((d) => d.embedding);
}
const vector = async (text, more, s) => (await vectors(text, more, s))[0];

async function refused(body, status, code, why, s = server) {
  const r = await post(body, s);
  const where = `${JSON.stringify(body).slice(0, 200)} → ${r.status} ${r.body.slice(0, 300)}`;
  assert.equal(r.status, status, where);
  assert.equal(r.json.error.code, code, where);
  assert.match(r.json.error.message, why, where);
}

test('a vector has the length of the model, the norm 1, and its tokens are counted', async () => {
  const r = await post({ input: TEXT, model: 'whatever', user: 'u' });
  assert.equal(r.status, 200, r.body);
  assert.equal(r.json.object, 'list');
  assert.equal(r.json.model, 'stories260K-f32');
  assert.equal(r.json.data.length, 1);
  const v = r.json.data[0].embedding;
  assert.equal(v.length, N_EMBD);
  assert.ok(Math.abs(norm(v) - 1) < 1e-5, `norm ${norm(v)}`);
  const t = await server.http('/tokenize', { method: 'POST', headers, body: JSON.stringify({ content: TEXT, add_special: true }) });
  assert.deepEqual(r.json.usage, { prompt_tokens: t.json.tokens.length, total_tokens: t.json.tokens.length });
});

test('base64 holds the same numbers, to the bit', async () => {
  const plain = Float32Array.from(await vector(TEXT, { encoding_format: 'float' }));
  const bytes = Buffer.from(await vector(TEXT, { encoding_format: 'base64' }), 'base64');
  assert.equal(bytes.length, 4 * N_EMBD);
  const packed = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
  assert.deepEqual(packed, plain);
});

test('in a list each has its place and is what it is alone, however many there are', async () => {
  const texts = Array.from({ length: 100 }, (_, i) => `${'Tom and Anna went to the sea. '.repeat(1 + (i % 5))}It was day ${i}.`);
  const [all, first, last] = [await vectors(texts), await vector(texts[0]), await vector(texts[99])];
  assert.equal(all.length, 100);
  assert.ok(apart(all[0], first) < NEAR, `${apart(all[0], first)}`);
  assert.ok(apart(all[99], last) < NEAR, `${apart(all[99], last)}`);
  const again = await vectors([...texts].reverse());
  all.forEach((v, i) => assert.ok(apart(v, again[99 - i]) < NEAR, `text ${i}: ${apart(v, again[99 - i])}`));
  for (let i = 1; i < 100; i++) assert.ok(apart(all[i], all[i - 1]) > NEAR, `texts ${i - 1} and ${i} are two`);
});

test('beside streams and other requests it is the same, and they go on', async () => {
  const alone = await vector(TEXT);
  const c = await server.connect();
  const streams = [1, 2, 3].map((seed) => c.infer('Once', { ...ENDLESS, seed, max_tokens: 200 }));
  await streams[0].first();
  const beside = await Promise.all(Array.from({ length: 8 }, (_, i) => (i % 2 ? vectors([TEXT, `${i}`]) : vectors([`${i}`, TEXT]))));
  beside.forEach((v, i) => assert.ok(apart(v[i % 2 ? 0 : 1], alone) < NEAR));
  for (const s of streams) assert.equal((await s.done()).end.reason, 'length');
  c.close();
});

test('the same prompt in the cache of a generation does not change it', async () => {
  const text = `${TEXT} and then she saw a big dog`;
  const before = await vector(text);
  const r = await server.http('/v1/completions', { method: 'POST', headers, body: JSON.stringify({ prompt: text, max_tokens: 1 }) });
  assert.equal(r.status, 200);
  assert.ok(r.json.usage.prompt_tokens_details.cached_tokens > 0, 'a generation may use what was computed for a vector');
  assert.ok(apart(await vector(text), before) < NEAR);
});

test('what is not a list of texts is refused by name', async () => {
  const bad = [
    ['{', 400, /./],
    [{}, 400, /input must be a string/],
    [{ input: null }, 400, /input must be a string/],
    [{ input: 5 }, 400, /input must be a string/],
    [{ input: [1, 2, 3] }, 400, /lists of tokens are not supported/],
    [{ input: [['a']] }, 400, /input must be a string/],
    [{ input: [] }, 400, /input is empty/],
    [{ input: '' }, 400, /input 0 is empty/],
    [{ input: ['a', ''] }, 400, /input 1 is empty/],
    [{ input: 'a', encoding_format: 'hex' }, 400, /encoding_format must be float or base64/],
    [{ input: 'a', encoding_format: 7 }, 400, /encoding_format/],
    [{ input: 'a', dimensions: 8 }, 400, /dimensions is not supported/],
    [{ input: 'a', cache_salt: 7 }, 400, /cache_salt/],
  ];
  for (const [body, status, why] of bad) await refused(body, status, 'bad_request', why);
  assert.equal((await server.http(PATH)).status, 405);
  assert.equal((await vectors(['a'], { encoding_format: null, dimensions: null })).length, 1);
});

test('what is too much is refused, and one that is too long ends all of its list', async () => {
  const long = 'word '.repeat(2000);
  await refused({ input: long }, 413, 'too_large', /^the prompt has .* at most 511/);
  await refused({ input: ['a', 'b', long, 'c'] }, 413, 'too_large', /^input 2: the prompt has/);
  await refused({ input: Array(2049).fill('a') }, 413, 'too_large', /2049 texts, at most 2048/);
  await server.idle();
});

test('a full queue only slows a list down; a queue that others fill refuses it', async () => {
  await withServer(['--pooling', 'last', '--parallel', '1', '--queue', '2', '--ctx-size', '65536'], async (s) => {
    assert.equal((await vectors(Array.from({ length: 40 }, (_, i) => `text ${i}`), {}, s)).length, 40);
    const c = await s.connect();
    const streams = [c.infer('Once', { ...ENDLESS, seed: 1 })];
    await streams[0].first(); // it runs: until then it would count as one of those that wait
    streams.push(...[2, 3].map((seed) => c.infer('Once', { ...ENDLESS, seed })));
    await until(async () => (await s.metrics()).ic_text_requests_waiting === 2, 'a full queue');
    await refused({ input: 'a' }, 429, 'busy', /queue is full/, s);
    const ends = Promise.allSettled(streams.map((x) => x.finished()));
    await c.close();
    await ends;
  });
  await withServer(['--pooling', 'last', '--parallel', '1', '--queue-max-per-client', '1'], async (s) => {
    assert.equal((await vectors(Array.from({ length: 40 }, (_, i) => `text ${i}`), {}, s)).length, 40);
  });
});

test('whoever hangs up leaves nothing behind', async () => {
  await withServer(['--pooling', 'mean', '--ctx-size', '2048', '--parallel', '4'], async (s) => {
    const body = JSON.stringify({ input: Array.from({ length: 400 }, (_, i) => `${i} ${'a long text '.repeat(100)}`) });
    for (let i = 0; i < 3; i++) {
      const raw = await rawSocket(s, `POST ${PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: ${body.length}\r\n\r\n${body}`);
      await until(async () => (await s.metrics()).ic_text_requests_running > 0, 'the list to be under way');
      raw.destroy();
      await s.idle();
    }
    assert.equal((await vectors('still there', {}, s)).length, 1);
  });
});

test('mean, cls and last are three things', async () => {
  const of = {};
  for (const kind of ['mean', 'cls', 'last'])
    await withServer(['--pooling', kind], async (s) => {
      of[kind] = await vector(TEXT, {}, s);
      assert.ok(Math.abs(norm(of[kind]) - 1) < 1e-5);
      assert.ok(apart(await vector(TEXT, {}, s), of[kind]) < NEAR, 'and the same when asked again');
    });
  assert.ok(apart(of.mean, of.cls) > FAR && apart(of.mean, of.last) > FAR && apart(of.cls, of.last) > FAR);
  assert.ok(apart(of.mean, await vector(TEXT)) < NEAR);
});

test('they come back with the model after an idle unload', async () => {
  await withServer(['--pooling', 'mean', '--idle-unload', '1'], async (s) => {
    const before = await vector(TEXT, {}, s);
    await until(async () => (await s.metrics())['ic_engine_unloaded_total{engine="text"}'] > 0, 'the model to leave');
    assert.ok(apart(await vector(TEXT, {}, s), before) < NEAR);
  });
});

test('without --pooling the answer says how to have them; nonsense in it is refused', async () => {
  await withServer([], (s) => refused({ input: 'a' }, 400, 'bad_request', /--pooling mean, cls or last/, s));
  const r = await run(['serve', '--port', '0', '--model', MODEL, '--pooling', 'max']);
  assert.equal(r.code, 2, r.stderr);
  assert.match(r.stderr, /--pooling takes none, mean, cls or last, not "max"/);
});

test('the server has survived', () => server.stop());
