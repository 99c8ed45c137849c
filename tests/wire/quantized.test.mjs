// Laws in fewer bits: a quantised file is served as it is, one law in several precisions, and what is refused at the start.
import test, { afterEach } from 'node:test';
import assert from 'node:assert/strict';
import fs from 'node:fs';
import path from 'node:path';
import { Server, run, tempDir } from './lib.mjs';
import { LAW, LAW_NAME, MLP, MLP_NAME, SimClient, dropClients, floats, stepByHand } from './simlib.mjs';

const dir = fs.mkdtempSync('/tmp/ic-quantized-');
process.on('exit', () => fs.rmSync(dir, { recursive: true, force: true }));
const file = path.join(dir, 'four-bits.safetensors');
const made = await run(['law', 'quantize', LAW, file, '--precision', 'nf4dq']);
assert.equal(made.code, 0, made.stderr);

// The law in float32, in bf16 and in NF4; the MLP in fp16 alone. And the quantised file, which needs no config.json.
const server = await Server.start(
  ['--law', `${LAW},${MLP}`, '--precision', `fp32,bf16,nf4,${MLP_NAME}=fp16`, '--law-max-batch', 'auto'], { model: null });
const quantised = await Server.start(['--law', file], { model: null });

afterEach(async () => {
  for (const s of [server, quantised]) if (!s.exited) await dropClients(s);
});

const norm = (a, b) => Math.sqrt(floats(a).reduce((s, x, i) => s + (x - floats(b)[i]) ** 2, 0) / floats(a).length);

test('a quantised file is served, and a client steps it as `law step` does', async (t) => {
  const c = await SimClient.open(quantised);
  const laws = (await quantised.http('/v1/laws')).json.data;
  assert.equal(laws.length, 1);
  assert.equal(laws[0].name, LAW_NAME);
  assert.equal(laws[0].precision, 'nf4');
  assert.ok(laws[0].weight_bytes < 4 * laws[0].parameters / 5, `${laws[0].weight_bytes} bytes of weights`);
  const s = await c.create({ grid: 16, seed: 5, init: 'random' });
  assert.equal(s.precision, 'nf4');
  const start = await c.state(s.sim_id);
  await c.steps(s.sim_id, 9);
  assert.deepEqual(await c.state(s.sim_id), await stepByHand(tempDir(t), start, [16, 16, 2], 9, [], file));
  await c.close();
});

test('one law in several precisions: by name, or by `precision`', async () => {
  const c = await SimClient.open(server);
  const laws = (await server.http('/v1/laws')).json.data;
  assert.deepEqual(laws.map((l) => [l.name, l.precision]),
    [[LAW_NAME, 'fp32'], [`${LAW_NAME}@bf16`, 'bf16'], [`${LAW_NAME}@nf4`, 'nf4'], [MLP_NAME, 'fp16']]);
  assert.ok(laws[2].weight_bytes < laws[1].weight_bytes && laws[1].weight_bytes < laws[0].weight_bytes);
  const states = {};
  for (const precision of ['fp32', 'bf16', 'nf4']) {
    const s = await c.create({ law: LAW_NAME, precision, grid: 16, seed: 3, init: 'random' });
    assert.equal(s.precision, precision);
    const byName = await c.create({ law: precision === 'fp32' ? LAW_NAME : `${LAW_NAME}@${precision}`, grid: 16, seed: 3, init: 'random' });
    await Promise.all([c.steps(s.sim_id, 3), c.steps(byName.sim_id, 3)]);
    states[precision] = await c.state(s.sim_id);
    assert.deepEqual(await c.state(byName.sim_id), states[precision]);
    await c.sim('sim_close', { sim_id: s.sim_id });
    await c.sim('sim_close', { sim_id: byName.sim_id });
  }
  for (const precision of ['bf16', 'nf4']) {
    const d = norm(states[precision], states.fp32);
    assert.ok(d > 1e-7 && d < 0.05, `${precision} is ${d} from fp32 after three steps`);
  }
  const m = await c.create({ law: MLP_NAME, grid: 16 });
  assert.equal(m.precision, 'fp16');
  await c.refused('sim_create', { law: MLP_NAME, grid: 16, precision: 'nf4' }, 'bad_request');
  await c.refused('sim_create', { law: LAW_NAME, grid: 16, precision: 'fp16' }, 'bad_request');
  await c.close();
});

test('with --law-max-batch auto the batch is what memory holds', async () => {
  const c = await SimClient.open(server);
  const ids = await Promise.all(Array.from({ length: 12 }, (_, i) => c.create({ law: MLP_NAME, grid: 8, seed: i })));
  await Promise.all(ids.map((s) => c.steps(s.sim_id, 5)));
  assert.ok(server.log.some((l) => l.includes('8 x 8: a batch of 1024 at most')), 'the log says how many');
  await c.close();
});

test('what makes no sense is refused at the start, by name', async () => {
  const torn = path.join(dir, 'torn.safetensors');
  const bytes = fs.readFileSync(file);
  const at = bytes.indexOf('nf4 block 64');
  bytes.write('nf4 block 16', at);
  fs.writeFileSync(torn, bytes);
  const cases = [
    [['--law', LAW, '--precision', 'int4'], 2, 'int4'],
    [['--law', LAW, '--precision', 'nf4', '--law-policy', 'bot'], 2, 'bot'],
    [['--law', LAW, '--law-max-batch', 'many'], 2, 'many'],
    [['--law', LAW, '--precision', 'nobody=nf4'], 4, 'nobody=nf4'],
    [['--law', LAW, '--precision', 'nf4', '--law-policy', 'attic=fp32'], 4, 'attic'],
    [['--law', file, '--precision', 'bf16'], 4, 'is stored as'],
    [['--law', torn], 4, 'has the layout "nf4 block 16'],
  ];
  for (const [args, code, says] of cases) {
    const r = await run(['serve', '--port', '0', ...args]);
    assert.ok(r.stderr.includes(says), `${args.join(' ')}: ${r.stderr}`);
    assert.equal(r.code, code, args.join(' '));
  }
});

test('the servers have survived', async () => {
  for (const s of [server, quantised]) {
    s.exited = true;
    await s.stop();
  }
});
