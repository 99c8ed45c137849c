// The plug-in of laws (--law-plugin): what is named must be right, what is only looked for may be missing; and an
// installation is whole. The plug-in here is src/law/fake_plugin.c, a GPU without a GPU.
import test, { after } from 'node:test';
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { MODEL, run, until, withServer } from './lib.mjs';
import { MLP, MLP_NAME, SimClient, readSafetensors, root, writeSafetensors } from './simlib.mjs';

const { IC_FAKE_PLUGIN: FAKE, IC_FAKE_PLUGIN_ABI: OTHER_ABI, IC_CMAKE: CMAKE, IC_BUILD: BUILD } = process.env;
if (!FAKE) {
  console.log('WIRE_SKIPPED: no IC_FAKE_PLUGIN'); // run by hand, not by ctest
  process.exit(0);
}
const dir = fs.mkdtempSync(path.join(os.tmpdir(), 'ic-plugin-'));
after(() => fs.rmSync(dir, { recursive: true, force: true }));
const laws = ['--law', MLP, '--law-threads', '1'];
const bin = path.join(dir, 'bin/inference-core');
const place = path.join(dir, 'lib/inference-core/libic-law-cuda.so');
// The log is written beside the work: its line may come after the answer.
const logged = (server, text) => until(() => server.log.map((l) => JSON.parse(l).msg).find((m) => m.includes(text)), `a line "${text}"`);

test('an installation is whole: it runs from where it lies', async () => {
  const r = spawnSync(CMAKE, ['--install', BUILD, '--prefix', dir], { encoding: 'utf8' });
  assert.equal(r.status, 0, r.stdout + r.stderr);
  const built = fs.existsSync(path.join(BUILD, 'libic-law-cuda.so'));
  assert.equal(fs.existsSync(place), built, 'the plug-in goes with it where it was built');
  fs.rmSync(place, { force: true });
  const env = { LD_LIBRARY_PATH: '' };
  assert.equal((await run(['version'], { bin, env })).code, 0);
  const plan = await run(['plan', '--model', MODEL], { bin, env }); // finds llama.cpp and its back ends
  assert.equal(plan.code, 0, plan.stderr);
  const maps = spawnSync('ldd', [bin], { encoding: 'utf8', env: {} }).stdout;
  assert.match(maps, new RegExp(`libllama.* => ${fs.realpathSync(dir)}/`), maps);
  assert.ok(fs.existsSync(path.join(dir, 'share/doc/inference-core/operations.md')));
});

test('a plug-in that is named must be there and be one', async () => {
  const text = path.join(root, 'README.md');
  const conf = path.join(dir, 'server.ini');
  fs.writeFileSync(conf, `law-plugin = ${text}\n`);
  const cases = [
    [['--law-plugin', '/nowhere/x.so'], {}, /law plug-in \/nowhere\/x\.so: No such file/],
    [['--law-plugin', text], {}, /README\.md: no shared library \(not ELF\)/],
    [['--law-plugin', OTHER_ABI], {}, /its interface has version 7, this program's has \d/],
    [[], { IC_LAW_PLUGIN: '/nowhere/y.so' }, /law plug-in \/nowhere\/y\.so/],
    [['--config', conf], {}, /not ELF/],
    [['--law-plugin', text, '--law-backend', 'auto'], {}, /not ELF/],
  ];
  for (const [args, env, says] of cases) {
    const r = await run(['serve', '--port', '0', ...laws, ...args], { env });
    assert.match(r.stderr, says);
    assert.equal(r.stderr.trim().split('\n').length, 1, `one line: ${r.stderr}`);
    assert.equal(r.code, 4, args.join(' '));
  }
});

test('where it is only looked for, the CPU does without it', async () => {
  const missing = await run(['serve', '--port', '0', ...laws, '--law-backend', 'cuda'], { bin });
  assert.match(missing.stderr, /law plug-in libic-law-cuda\.so: neither in /);
  assert.equal(missing.code, 4, 'asked for by name');
  const steps = async (level, says) => {
    await withServer([...laws, '--law-backend', 'auto'], async (server) => {
      const c = await SimClient.open(server);
      const { sim_id } = await c.create({ grid: 8 });
      assert.equal((await c.steps(sim_id, 3)).step, 3);
      const lines = server.log.map((l) => JSON.parse(l)).filter((l) => l.msg.includes('laws run on the CPU'));
      assert.equal(lines.length, 1);
      assert.equal(lines[0].level, level);
      assert.match(lines[0].msg, says);
    }, { model: null, bin });
  };
  await steps('info', /neither in /);
  fs.copyFileSync(OTHER_ABI, place);
  await steps('warn', /its interface has version 7/);
});

test('it is found where it was installed, and by name, and steps', async () => {
  fs.copyFileSync(FAKE, place);
  const plan = await run(['law', 'plan', MLP, '--grid', '8', '--precision', 'fp32', '--backend', 'cuda'], { bin });
  assert.equal(plan.code, 0, plan.stderr);
  assert.match(plan.stdout, /fp32 on cuda/);
  const ways = [
    [['--law-backend', 'auto'], { bin }],
    [['--law-backend', 'cuda', '--law-plugin', FAKE], {}],
    [['--law-backend', 'cuda'], { env: { IC_LAW_PLUGIN: FAKE } }],
  ];
  for (const [args, how] of ways) {
    await withServer([...laws, ...args], async (server) => {
      const c = await SimClient.open(server);
      const { sim_id, height, width, d } = await c.create({ law: MLP_NAME, grid: 8 });
      const before = await c.state(sim_id);
      await c.steps(sim_id, 4);
      writeSafetensors(path.join(dir, 'in'), 'psi', [height, width, d, 2], before);
      const words = ['--state', path.join(dir, 'in'), '--steps', '4', '--out', path.join(dir, 'out'), '--backend', 'ref'];
      const r = await run(['law', 'step', '--checkpoint', MLP, ...words]);
      assert.equal(r.code, 0, r.stderr);
      const want = readSafetensors(path.join(dir, 'out')).psi.bytes;
      assert.deepEqual(await c.state(sim_id), Buffer.from(want), 'to the last bit: the fake is the reference');
      assert.ok(!server.log.some((l) => l.includes('runs on the CPU')));
    }, { model: null, ...how });
  }
});

test('without memory on the GPU the CPU goes on; without any the simulations pause and are told', async () => {
  const gpu = ['--law-backend', 'cuda', '--law-plugin', FAKE];
  await withServer([...laws, ...gpu], async (server) => {
    const c = await SimClient.open(server);
    const { sim_id } = await c.create({ grid: 8 });
    assert.equal((await c.steps(sim_id, 6)).step, 6);
    await logged(server, 'the simulations move to the CPU');
    await c.close();
  }, { model: null, env: { FAKE_GPU_OOM: '3' } });

  await withServer([...laws, ...gpu], async (server) => {
    const c = await SimClient.open(server);
    const hit = await c.create({ grid: 8, frames: false });
    const kept = await c.create({ grid: 12, frames: false });
    await c.steps(hit.sim_id, 2);
    const state = await c.state(hit.sim_id);
    const from = c.mark();
    const { id } = await c.sim('sim_run', { sim_id: hit.sim_id }); // the third step
    const e = await c.wait((m) => m.op === 'error', 'the error', from);
    assert.equal(e.code, 'oom');
    assert.equal(e.sim_id, hit.sim_id);
    assert.notEqual(e.id, id, 'it answers nothing');
    const paused = await c.wait((m) => m.op === 'sim_status' && m.sim_id === hit.sim_id && m.status === 'paused', 'its pause', from);
    assert.equal(paused.step, 2);
    assert.deepEqual(await c.state(hit.sim_id), state, 'as it was');
    assert.equal((await c.steps(kept.sim_id, 3)).step, 3, 'the other grid goes on');
    assert.equal((await c.steps(hit.sim_id, 3)).step, 5, 'a new try finds memory on the CPU');
    const m = await server.metrics();
    assert.equal(m.ic_law_simulations, 2);
    assert.equal(m.ic_law_simulations_running, 0);
    await c.close();
  }, { model: null, env: { FAKE_GPU_OOM: '3', IC_FAULT: 'law-oom:1' } });

  await withServer([...laws, ...gpu], async (server) => {
    const body = JSON.stringify({ grid: 8, psi: new Array(8 * 8 * 8 * 2).fill(0.25) });
    const ask = () => server.http('/predict', { method: 'POST', headers: { 'content-type': 'application/json' }, body });
    const failed = await ask();
    assert.equal(failed.status, 507, failed.body);
    assert.equal(failed.json.error.code, 'oom');
    assert.equal((await ask()).status, 200);
    assert.equal((await server.metrics()).ic_law_simulations, 0, 'nothing is left of it');
  }, { model: null, env: { FAKE_GPU_OOM: '1', IC_FAULT: 'law-oom:1' } });
});

// A state stepped by `law step` on the reference.
const reference = async (state, { height, width, d }, steps) => {
  writeSafetensors(path.join(dir, 'in'), 'psi', [height, width, d, 2], state);
  const words = ['--state', path.join(dir, 'in'), '--steps', String(steps), '--out', path.join(dir, 'out'), '--backend', 'ref'];
  const r = await run(['law', 'step', '--checkpoint', MLP, ...words]);
  assert.equal(r.code, 0, r.stderr);
  return Buffer.from(readSafetensors(path.join(dir, 'out')).psi.bytes);
};

test('states stay on the GPU, many steps are one call, and frames are drawn there', async () => {
  const log = path.join(dir, 'gpu.json');
  await withServer([...laws, '--law-backend', 'cuda', '--law-plugin', FAKE], async (server) => {
    const c = await SimClient.open(server);
    const sim = await c.create({ law: MLP_NAME, grid: 8, view: 'density', every: 100 });
    const { sim_id } = sim;
    let state = await c.state(sim_id);
    const last = c.nextFrame(sim_id, (f) => f.step === 400);
    await c.steps(sim_id, 400);
    state = await reference(state, sim, 400);
    assert.deepEqual(await c.state(sim_id), state, 'four hundred steps, to the last bit');
    const frame = (await last).values;
    const psi = new Float32Array(Uint8Array.from(state).buffer);
    for (let i = 0; i < 64; i++) {
      const e = psi.subarray(i * 16, i * 16 + 16).reduce((sum, x) => sum + x * x, 0);
      assert.ok(Math.abs(frame[i] - Math.trunc(Math.min(1, e) * 255)) <= 1, `cell ${i} of the frame: ${frame[i]} for ${e}`);
    }
    await c.sim('sim_tool', { sim_id, tool: 'vortex', x: 4, y: 4, radius: 2 });
    state = await c.state(sim_id);
    await c.steps(sim_id, 3);
    assert.deepEqual(await c.state(sim_id), await reference(state, sim, 3), 'what a tool did is stepped');
    await c.close();
  }, { model: null, env: { FAKE_GPU_LOG: log } });
  const gpu = JSON.parse(fs.readFileSync(log));
  assert.ok(gpu.runs < 150, `${gpu.runs} calls for 403 steps`);
  assert.equal(gpu.puts, 2, 'at the beginning, and after the tool');
  assert.ok(gpu.gets < 10, `${gpu.gets} states read back`);
  assert.ok(gpu.frames >= 4, `${gpu.frames} frames`);
  assert.equal(gpu.held, 0, 'all memory is given back');
});

test('a GPU that is lost: simulations go back to their copies, are told, and make their steps again', async () => {
  await withServer([...laws, '--law-backend', 'cuda', '--law-plugin', FAKE], async (server) => {
    const c = await SimClient.open(server);
    const sim = await c.create({ law: MLP_NAME, grid: 8, view: 'density', every: 10 });
    const state = await c.state(sim.sim_id);
    const from = c.mark();
    const over = await c.steps(sim.sim_id, 100);
    assert.equal(over.step, 100);
    const e = await c.wait((m) => m.op === 'error', 'the error', from);
    assert.equal(e.code, 'unavailable');
    assert.equal(e.sim_id, sim.sim_id);
    const lost = Number(/with it (\d+) steps/.exec(e.message)[1]);
    const back = await c.wait((m) => m.op === 'sim_status' && m.sim_id === sim.sim_id && !m.id && m.steps_left > 0, 'where it goes on', from);
    assert.ok(lost > 0 && back.step + back.steps_left === 100, JSON.stringify(back));
    const got = new Float32Array(Uint8Array.from(await c.state(sim.sim_id)).buffer);
    const want = new Float32Array(Uint8Array.from(await reference(state, sim, 100)).buffer);
    assert.ok(got.every((x, i) => Math.abs(x - want[i]) < 1e-3), 'where it would have been');
    await logged(server, 'the simulations move to the CPU');
    await c.close();
  }, { model: null, env: { FAKE_GPU_LOST: '5' } });
});

test('--law-max-batch auto counts the memory of the GPU, and says so', async () => {
  const batch = async (mib, more = []) => {
    let found;
    const args = [...laws, '--law-backend', 'cuda', '--law-plugin', FAKE, '--law-max-batch', 'auto', '--vram-margin', '4M', ...more];
    await withServer(args, async (server) => {
      const c = await SimClient.open(server);
      await c.create({ grid: 64 });
      const line = await logged(server, 'a batch of');
      found = { n: Number(/a batch of (\d+) at most/.exec(line)[1]), line };
      await c.close();
    }, { model: null, env: { FAKE_GPU_MIB: String(mib) } });
    return found;
  };
  const [small, large] = [await batch(40), await batch(76)];
  assert.match(small.line, /half of what the GPU has to give is 1[78] MiB/); // (40 - 4 - weights) / 2
  assert.ok(small.n > 1 && large.n > 1.9 * small.n && large.n < 2.2 * small.n, `${small.line} ${large.line}`);
  const half = await batch(76, ['--vram', '40M']);
  assert.equal(half.n, small.n, 'of the GPU, --vram may be used');
  const host = await batch(4096, ['--law-memory', '16M']);
  assert.match(host.line, /half of the host memory that is left is [78] MiB/);
  assert.ok(host.n < large.n, host.line);
  const none = await batch(4); // the margin is all there is
  assert.match(none.line, /on the CPU/);
  assert.ok(none.n > 1, none.line);

  const plan = async (...args) => {
    const words = ['law', 'plan', MLP, '--grid', '64', '--backend', 'cuda', '--law-plugin', FAKE, '--batch', 'auto', ...args];
    const r = await run(words, { env: { FAKE_GPU_MIB: '1024' } });
    assert.equal(r.code, 0, r.stderr);
    return [...r.stdout.matchAll(/largest batch in \d+ MiB of host memory and (\d+) MiB of the device's.*: (\d+) \((.*)\)/g)];
  };
  const vram = await plan('--vram', '18');
  assert.equal(vram.length, 4, 'a line for each precision');
  assert.ok(vram.every(([, mib, n, why]) => mib === '17' && Math.abs(n - small.n) <= 1 && why === "bound by the device's memory"), String(vram));
  const free = await plan();
  assert.ok(free.every(([, mib]) => mib > 500 && mib < 512), String(free)); // what is free, less a margin of 512
  assert.match((await run(['law', 'plan', MLP, '--grid', '64', '--memory', '64'])).stdout, /largest batch in 64 MiB: \d+ \(bound by host memory\)/);
});
