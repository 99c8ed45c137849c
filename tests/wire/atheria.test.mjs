// Atheria's dialect at /ws, as its own web client speaks it (law-m.md 4): decoded with the library that client uses.
import test, { afterEach } from 'node:test';
import assert from 'node:assert/strict';
import zlib from 'node:zlib';
import { until } from './lib.mjs';
import { AtheriaClient, LAW_NAME, MLP_NAME, SimClient, dropClients, lawServer, sims } from './simlib.mjs';

const decode = await import('@msgpack/msgpack').then(
  (m) => m.decode,
  () => {
    console.log('WIRE_SKIPPED: the npm package @msgpack/msgpack is missing (npm ci --prefix tests)');
    process.exit(0);
  },
);
const server = await lawServer(['--grid-max', '256', '--idle-seconds', '3600']);
const open = (s = server) => AtheriaClient.open(s, decode);

function checkRows(map, h, w, channels = 1) {
  assert.equal(map.length, h);
  for (const row of map) {
    assert.equal(row.length, w);
    for (const v of row.flat()) assert.ok(v >= 0 && v <= 1, `${v} is within [0, 1]`);
    if (channels > 1) assert.ok(row.every((c) => c.length === channels));
  }
}

/** A map however it travels, as [h][w]. */
function unpack(map) {
  if (Array.isArray(map)) return map;
  assert.equal(map.compressed, true);
  assert.equal(map.dtype, 'float32');
  const raw = zlib.inflateSync(Buffer.from(map.data, 'base64'));
  const v = new Float32Array(raw.buffer.slice(raw.byteOffset, raw.byteOffset + raw.length));
  assert.equal(v.length, map.shape[0] * map.shape[1]);
  return Array.from({ length: map.shape[0] }, (_, y) => [...v.subarray(y * map.shape[1], (y + 1) * map.shape[1])]);
}

afterEach(() => server.exited || dropClients(server));

test('initial_state tells the experiments', async () => {
  const c = await open();
  const s = c.initial;
  assert.equal(s.training_status, 'idle');
  assert.equal(s.inference_status, 'paused');
  assert.equal(s.active_experiment, null);
  assert.equal(typeof s.compile_status.is_compiled, 'boolean');
  assert.deepEqual(s.experiments.map((e) => e.name), [LAW_NAME, MLP_NAME]);
  const e = s.experiments[0];
  assert.equal(e.name, LAW_NAME);
  assert.equal(e.model_architecture, 'UNET');
  assert.equal(e.grid_size_training, 64);
  assert.equal(e.has_checkpoint, true);
  assert.equal(e.config.MODEL_PARAMS.d_state, 2);
  assert.equal(e.config.GAMMA_DECAY > 0, true);
  const again = await c.answer('experiment', 'refresh_experiments', {}, 'experiments_updated');
  assert.deepEqual(again.experiments, s.experiments);
  await c.close();
});

test('load, play, draw, pause, go on, unload', async () => {
  const c = await open();
  const first = await c.load();
  checkRows(first.map_data, 16, 16);
  assert.equal(first.simulation_info.is_paused, true);
  const begin = first.step;
  const status = await c.answer('inference', 'play', {}, 'inference_status_update');
  assert.equal(status.status, 'running');
  const f = await c.frame((x) => x.step >= begin + 5);
  checkRows(f.map_data, 16, 16);
  assert.deepEqual(f.hist_data, {});
  for (const k of ['poincare_coords', 'phase_attractor', 'flow_data', 'phase_hsv_data', 'complex_3d_data']) assert.equal(f[k], null, k);
  const i = f.simulation_info;
  assert.equal(i.step, f.step);
  assert.equal(i.is_paused, false);
  assert.equal(i.live_feed_enabled, true);
  assert.equal(i.initial_step, begin);
  assert.equal(i.training_grid_size, 64);
  assert.equal(i.inference_grid_size, 16);
  assert.ok(Math.abs(i.epoch_metrics.energy - 256) < 1);
  assert.ok(i.epoch_metrics.symmetry > 0);
  assert.ok([1, 2].includes(i.epoch));
  assert.equal(typeof i.fps, 'number');
  const times = c.frames.map((x) => x.timestamp);
  assert.ok(times.every((t, k) => !k || t > times[k - 1]), 'timestamps only grow, else the client drops frames');
  const paused = await c.answer('inference', 'pause', {}, 'inference_status_update');
  assert.equal(paused.status, 'paused');
  assert.equal(paused.simulation_info.is_paused, true);
  const again = await c.answer('inference', 'pause', {}, 'inference_status_update');
  assert.equal(again.step, paused.step);
  c.cmd('inference', 'play');
  await c.frame((x) => x.step > paused.step + 3);
  const idle = await c.answer('inference', 'unload', {}, 'inference_status_update');
  assert.equal(idle.status, 'idle');
  await until(async () => (await server.metrics()).ic_law_simulations === 0, 'the simulation to go');
  assert.deepEqual(await sims(server), []);
  const n = await c.answer('inference', 'play', {}, 'notification');
  assert.equal(n.status, 'warning');
  await c.load(); // and it can be loaded again
  await c.load({ experiment_name: undefined, grid_size: 8 }); // a load in place of a load
  assert.equal((await sims(server)).length, 1);
  await c.close();
});

// Every name in the menu of Atheria's web client, and one that is not.
const MENU = ['density', 'phase', 'phase_hsv', 'energy', 'real', 'imag', 'gradient', 'spectral', 'physics', 'entropy', 'coherence',
  'channel_activity', 'holographic', 'history_3d', 'complex_3d', 'poincare', 'poincare_3d', 'flow', 'phase_attractor', 'phase_space',
  'fields', 'holographic_bulk', 'no such picture'];

test('every picture of the menu, while it runs and while it is paused', async () => {
  const c = await open();
  await c.load({ grid_size: 12 });
  c.cmd('inference', 'play');
  await c.frame((f) => f.step > 2 && f.simulation_info.is_paused === false);
  for (const [n, viz_type] of MENU.entries()) {
    if (n === 12) await c.answer('inference', 'pause', {}, 'inference_status_update');
    const scope = n % 2 ? 'inference' : 'simulation';
    const extra = { phase_hsv: 'phase_hsv_data', complex_3d: 'complex_3d_data', poincare: 'poincare_coords', poincare_3d: 'poincare_coords',
      flow: 'flow_data', phase_attractor: 'phase_attractor' }[viz_type];
    const f_ = c.frame((x) => (n < 12 || x.simulation_info.is_paused) && (extra ? x[extra] !== null : Array.isArray(x.map_data[0][0]) === (viz_type === 'fields')));
    c.cmd(scope, n % 3 || scope === 'inference' ? 'set_viz' : 'update_visualization', { viz_type });
    const f = await f_.catch((e) => assert.fail(`${viz_type}: ${e.message}`));
    checkRows(f.map_data, 12, 12, viz_type === 'fields' ? 3 : 1);
    if (viz_type === 'phase_hsv') for (const k of ['hue', 'value']) checkRows(f.phase_hsv_data[k], 12, 12);
    if (viz_type === 'complex_3d') for (const k of ['real', 'imag']) assert.equal(f.complex_3d_data[k].length, 12);
    if (viz_type === 'flow') for (const k of ['dx', 'dy', 'magnitude']) assert.ok(f.flow_data[k].flat().every((v) => Math.abs(v) <= 1));
    if (viz_type.startsWith('poincare')) assert.ok(f.poincare_coords.length === 144 && f.poincare_coords.every((p) => p.length === 2));
    if (viz_type === 'phase_attractor') assert.ok(Math.abs(Math.hypot(f.phase_attractor.channel_0.real, f.phase_attractor.channel_0.imag) - f.phase_attractor.channel_0.abs) < 1e-5);
  }
  const e = await c.answer('inference', 'set_viz', {}, 'notification');
  assert.equal(e.status, 'error');
  assert.equal((await c.answer('inference', 'set_viz', { viz_type: 7 }, 'notification')).status, 'error');
  assert.equal((await c.answer('inference', 'set_viz', { viz_type: 'x'.repeat(5000) }, 'notification')).status, 'error');
  await c.close();
});

test('speed, fps, frame skip, live feed and interval', async () => {
  const c = await open();
  await c.load();
  assert.equal((await c.answer('simulation', 'set_speed', { speed: 2 }, 'simulation_speed_update')).speed, 2);
  assert.equal((await c.answer('simulation', 'set_speed', { speed: 1e9 }, 'simulation_speed_update')).speed, 100, 'clamped');
  assert.equal((await c.answer('simulation', 'set_speed', { speed: -3 }, 'simulation_speed_update')).speed, 0.1);
  assert.equal((await c.answer('simulation', 'set_speed', { speed: 'x' }, 'notification')).status, 'error');
  assert.equal((await c.answer('simulation', 'set_fps', { fps: 60 }, 'simulation_fps_update')).fps, 60);
  assert.equal((await c.answer('simulation', 'set_fps', { fps: 1e9 }, 'simulation_fps_update')).fps, 120);
  await c.answer('simulation', 'set_speed', { speed: 100 }, 'simulation_speed_update');
  assert.equal((await c.answer('simulation', 'set_frame_skip', { skip: 3 }, 'simulation_frame_skip_update')).skip, 3);
  assert.equal((await c.answer('simulation', 'set_frame_skip', { skip: 11 }, 'notification')).status, 'error');
  c.cmd('inference', 'play');
  const skipped = await c.frame((f) => !f.simulation_info.is_paused);
  const next = await c.frame();
  assert.equal((next.step - skipped.step) % 4, 0, 'each fourth step');
  assert.equal((await c.answer('simulation', 'set_steps_interval', { interval: 10 }, 'steps_interval_update')).interval, 10);
  const begin = (await c.frame()).simulation_info.initial_step;
  assert.equal((await c.frame((f) => !f.simulation_info.is_paused)).step % 10, begin % 10);
  assert.equal((await c.answer('simulation', 'set_live_feed', { enabled: false }, 'live_feed_status_update')).enabled, false);
  await c.answer('inference', 'reset', {}, 'inference_status_update');
  const had = c.frameCount;
  const a = await c.answer('inference', 'set_config', { gamma_decay: 0.2 }, 'inference_status_update');
  await until(async () => (await sims(server))[0].step !== a.step || true, 'a while');
  await c.answer('inference', 'set_config', { gamma_decay: 0.1 }, 'inference_status_update');
  assert.equal(c.frameCount, had, 'no frames without a live feed');
  assert.equal((await c.answer('simulation', 'set_live_feed', { enabled: true }, 'live_feed_status_update')).enabled, true);
  await c.frame();
  assert.equal((await c.answer('simulation', 'set_steps_interval', { interval: -1 }, 'steps_interval_update')).interval, -1, 'full speed, no frames');
  assert.equal((await c.answer('simulation', 'set_steps_interval', { interval: 0 }, 'steps_interval_update')).interval, 0);
  await c.frame();
  assert.equal((await c.answer('simulation', 'set_steps_interval', { interval: -2 }, 'notification')).status, 'error');
  assert.equal((await c.answer('simulation', 'set_downsample', { factor: 2 }, 'downsample_status_update')).factor, 1);
  await c.close();
});

test('a region', async () => {
  const c = await open();
  assert.equal((await c.answer('simulation', 'set_roi', { x: 0, y: 0, width: 4, height: 4 }, 'notification')).status, 'warning');
  await c.load({ grid_size: 32 });
  const r = await c.answer('simulation', 'set_roi', { enabled: true, x: 4, y: 8, width: 16, height: 12 }, 'roi_status_update');
  assert.deepEqual(r, { enabled: true, x: 4, y: 8, width: 16, height: 12, area: 192, total_area: 1024, reduction_ratio: 1 - 192 / 1024 });
  c.cmd('inference', 'play');
  checkRows((await c.frame((f) => f.map_data.length === 12)).map_data, 12, 16);
  for (const bad of [{ x: 20, y: 0, width: 16, height: 4 }, { x: -1, y: 0, width: 4, height: 4 }, { x: 0, y: 0, width: 4 }, { x: 'a', y: 0, width: 4, height: 4 }])
    assert.equal((await c.answer('simulation', 'set_roi', bad, 'notification')).status, 'error', JSON.stringify(bad));
  const off = await c.answer('simulation', 'set_roi', { enabled: false }, 'roi_status_update');
  assert.equal(off.enabled, false);
  assert.equal(off.width, 32);
  checkRows((await c.frame((f) => f.map_data.length === 32)).map_data, 32, 32);
  await c.close();
});

test('a large map goes compressed, unless the client says otherwise', async () => {
  const c = await open();
  const plain = await c.load({ grid_size: 220 }); // 48400 values: plain
  checkRows(plain.map_data, 220, 220);
  c.cmd('simulation', 'set_viz', { viz_type: 'phase' });
  const f = await c.load({ grid_size: 228 });
  assert.equal(Array.isArray(f.map_data), false);
  assert.deepEqual(f.map_data.shape, [228, 228]);
  const map = unpack(f.map_data);
  checkRows(map, 228, 228);
  assert.ok(new Set(map.flat()).size > 1000);
  assert.equal((await c.answer('simulation', 'set_compression', { enabled: false }, 'compression_status_update')).enabled, false);
  const same = c.frame();
  c.cmd('simulation', 'set_viz', { viz_type: 'phase' });
  assert.deepEqual((await same).map_data, map, 'the same picture, the same numbers');
  await c.close();
});

test('a picture that does not fit into the outbox is told, and never half sent', async () => {
  const small = await lawServer(['--outbox', '262144', '--grid-max', '512']);
  const c = await open(small); // whose take() fails on a header without a body
  await c.load({ grid_size: 128 });
  const word = c.wait((m) => m.type === 'notification' && m.payload.status === 'warning', 'a word about it', c.mark());
  c.cmd('simulation', 'set_viz', { viz_type: 'fields' }); // 16384 cells of 3 values and an array each
  assert.match((await word).payload.message, /region/);
  c.cmd('inference', 'play');
  await c.answer('inference', 'pause', {}, 'inference_status_update');
  const part = c.frame((f) => f.map_data.length === 64);
  await c.answer('simulation', 'set_roi', { x: 0, y: 0, width: 64, height: 64 }, 'roi_status_update');
  checkRows((await part).map_data, 64, 64, 3);
  c.cmd('simulation', 'set_viz', { viz_type: 'phase' });
  // a grid whose picture would not fit begins with a region in its middle
  const from = c.mark();
  const f = await c.load({ grid_size: 300 });
  const roi = await c.type('roi_status_update', from);
  assert.deepEqual([roi.enabled, roi.x, roi.y, roi.width, roi.height], [true, 86, 86, 128, 128]);
  checkRows(unpack(f.map_data), 128, 128);
  await c.close();
  await small.stop();
});

test('reset, tools and injected energy change the picture', async () => {
  const c = await open();
  await c.answer('inference', 'set_config', { initial_state_mode: 'zeros' }, 'inference_config_update');
  c.cmd('simulation', 'set_viz', { viz_type: 'density' });
  const zero = await c.load();
  assert.ok(zero.map_data.flat().every((v) => v === 0));
  let last = zero.map_data;
  const act = async (scope, command, args) => {
    const f = c.frame();
    await c.answer(scope, command, args, 'inference_status_update');
    const now = (await f).map_data;
    assert.notDeepEqual(now, last, command);
    last = now;
  };
  await act('inference', 'tool_action', { action: 'vortex', params: { x: 8, y: 8, radius: 5 } });
  await act('inference', 'apply_tool', { action: 'wave', params: { kx: 2 } });
  await act('inference', 'inject_energy', { type: 'dense_monolith' });
  await act('inference', 'inject_energy', { type: 'primordial_soup' });
  await act('inference', 'tool_action', { action: 'collapse', params: { intensity: 1 } });
  const f = c.frame();
  await c.answer('inference', 'reset', {}, 'inference_status_update');
  assert.deepEqual((await f).map_data, zero.map_data);
  for (const [cmd, args] of [['tool_action', { action: 'hammer' }], ['tool_action', {}], ['tool_action', { action: 7 }], ['inject_energy', { type: 'coffee' }],
    ['tool_action', { action: 'vortex', params: { radius: -1 } }]])
    assert.equal((await c.answer('inference', cmd, args, 'notification')).status, 'error', JSON.stringify(args));
  await c.close();
});

test('configuration: gamma, grid and start of the next load', async () => {
  const c = await open();
  const u = await c.answer('inference', 'set_inference_config', { grid_size: 20, initial_state_mode: 'zeros', gamma_decay: 99 }, 'inference_config_update');
  assert.deepEqual(u, { grid_size: 20, initial_state_mode: 'zeros', gamma_decay: 10 }, 'gamma is clamped as Atheria clamps it');
  const from = c.mark();
  const f = await c.load({ grid_size: undefined });
  checkRows(f.map_data, 20, 20);
  assert.ok(f.map_data.flat().every((v) => v === 0));
  assert.equal((await c.type('inference_status_update', from)).simulation_info.gamma_decay, 10);
  const s = c.type('inference_status_update');
  await c.answer('inference', 'set_config', { gamma_decay: 0.5 }, 'inference_config_update');
  assert.equal((await s).simulation_info.gamma_decay, 0.5);
  for (const bad of [{ grid_size: 'x' }, { grid_size: 5000 }, { initial_state_mode: 'chaos' }, { gamma_decay: 'x' }])
    assert.equal((await c.answer('inference', 'set_config', bad, 'notification')).status, 'error', JSON.stringify(bad));
  assert.equal((await c.answer('inference', 'set_config', { grid_size: 24, gamma_decay: 'x' }, 'notification')).status, 'error');
  assert.equal((await c.answer('inference', 'set_config', {}, 'inference_config_update')).grid_size, 20, 'of a refused one nothing is taken');
  for (const bad of [{ experiment_name: 'other' }, { experiment_name: 7 }, { grid_size: 18 }, { grid_size: -4 }])
    assert.equal((await c.answer('inference', 'load_experiment', { experiment_name: LAW_NAME, grid_size: 16, ...bad }, 'notification')).status, 'error', JSON.stringify(bad));
  await c.load();
  await c.close();
});

test('what belongs to training, or is not there, is answered with a notification', async () => {
  const c = await open();
  for (const command of ['create', 'continue', 'stop', 'delete', 'list_checkpoints', 'delete_checkpoint', 'cleanup_checkpoints', 'list_quantum_models', 'load_checkpoint_snapshot', 'download_checkpoint']) {
    const n = await c.answer('experiment', command, { EXPERIMENT_NAME: 'x' }, 'notification');
    assert.equal(n.status, 'info');
    assert.match(n.message, /train/);
  }
  for (const [scope, command] of [['inference', 'switch_engine'], ['inference', 'get_bulk_volume'], ['inference', 'analyze_snapshot'], ['simulation', 'quantum_fast_forward'],
    ['simulation', 'set_global_config'], ['analysis', 'universe_atlas'], ['history', 'save_history'], ['snapshot', 'load_snapshot'], ['system', 'shutdown'], ['server', 'shutdown']])
    assert.ok(['info', 'warning'].includes((await c.answer(scope, command, {}, 'notification')).status), `${scope}.${command}`);
  for (const [scope, command] of [['system', 'halt'], ['nothing', 'play'], ['', '']])
    assert.equal((await c.answer(scope, command, {}, 'notification')).status, 'error', `${scope}.${command}`);
  c.cmd('system', 'toggle_logs');
  assert.equal((await server.http('/health')).status, 200, 'nobody has shut it down');
  await c.close();
});

test('the other style of messages', async () => {
  const c = await open();
  const f = c.frame();
  c.send({ type: 'inference.load_experiment', payload: { experiment_name: LAW_NAME, grid_size: 16 } });
  checkRows((await f).map_data, 16, 16);
  c.send({ type: 'inference.play', payload: {} });
  c.send({ type: 'simulation.set_viz', payload: { viz_type: 'fields' } });
  checkRows((await c.frame((x) => Array.isArray(x.map_data[0][0]))).map_data, 16, 16, 3);
  c.send({ type: 'inference.pause' });
  await c.type('inference_status_update');
  await c.close();
});

test('garbage is answered and does no harm', async () => {
  const c = await open();
  for (const bad of ['', '{', 'null', '[]', '7', '{}', '{"scope":"inference"}', '{"command":"play"}', '{"scope":7,"command":"play"}', '{"type":"play"}', '{"type":7}',
    `{"type":"${'x'.repeat(500)}.y"}`, '{"op":"infer","prompt":"x"}', '{"scope":"inference","command":["play"]}', '{"a":'.repeat(200), '{"scope":"\\u0000","command":"x"}']) {
    const from = c.mark();
    c.send(bad);
    assert.equal((await c.type('notification', from)).status, 'error', bad.slice(0, 60));
  }
  const from = c.mark();
  c.send(Buffer.from([1, 2, 3, 0, 255]), { binary: true });
  assert.equal((await c.type('notification', from)).status, 'error');
  for (const args of [null, 7, 'x', [], { params: 7 }]) assert.equal((await c.answer('inference', 'tool_action', args, 'notification')).status, 'error');
  await c.load();
  await c.close();
});

test('two connections have a simulation each', async () => {
  const [a, b] = [await open(), await open()];
  await a.load({ grid_size: 16 });
  await b.load({ grid_size: 20 });
  a.cmd('inference', 'play');
  await a.frame((f) => f.step > 5);
  assert.equal(b.frames.length, 1, 'b sees nothing of it');
  b.cmd('inference', 'reset');
  b.cmd('simulation', 'set_viz', { viz_type: 'fields' });
  const f = await a.frame();
  checkRows(f.map_data, 16, 16);
  assert.ok(f.step > 5);
  b.terminate();
  await a.frame();
  await a.close();
  await until(async () => (await sims(server)).length === 0, 'both to go');
});

test('a client that does not read: pairs stay pairs, the server does not care', async () => {
  const [slow, other] = [await open(), await SimClient.open(server)];
  const { sim_id } = await other.create();
  await slow.load({ experiment_name: MLP_NAME, grid_size: 128 });
  await slow.answer('simulation', 'set_speed', { speed: 100 }, 'simulation_speed_update');
  await slow.answer('simulation', 'set_fps', { fps: 120 }, 'simulation_fps_update');
  slow.cmd('inference', 'play');
  await slow.frame((f) => !f.simulation_info.is_paused);
  slow.ws._socket.pause();
  const had = (await server.metrics()).ic_law_frames_total;
  await other.sim('sim_run', { sim_id });
  await until(async () => (await server.metrics()).ic_law_frames_total > had + 250, 'frames to pile up');
  const begin = (await other.nextFrame(sim_id)).step;
  await other.nextFrame(sim_id, (f) => f.step > begin + 20);
  await other.sim('sim_pause', { sim_id });
  const count = slow.frameCount;
  slow.ws._socket.resume(); // take() checks every pair
  const last = slow.frames.at(-1).step;
  await slow.frame((f) => f.step > last + 50);
  await slow.answer('inference', 'pause', {}, 'inference_status_update');
  assert.ok(slow.frameCount > count);
  await Promise.all([slow.close(), other.close()]);
});

test('a flood of commands is bounded', async () => {
  const c = await open();
  await c.load({ grid_size: 8 });
  for (let i = 0; i < 3000; i++) {
    c.cmd('simulation', 'set_viz', { viz_type: i % 2 ? 'phase' : 'real' });
    if (i % 50 === 0) await new Promise((r) => setImmediate(r)); // it goes on reading
  }
  const r = await c.answer('simulation', 'set_compression', { enabled: true }, 'compression_status_update');
  assert.equal(r.enabled, true);
  // what was too much was refused, and said so; what comes afterwards is done
  await until(() => {
    c.cmd('simulation', 'set_viz', { viz_type: 'fields' });
    return Array.isArray(c.frames.at(-1)?.map_data[0][0]);
  }, 'a picture in the end');
  // and it can still be got rid of
  await c.answer('inference', 'unload', {}, 'inference_status_update');
  await until(async () => (await sims(server)).length === 0, 'it to go');
  await c.close();
});

test('clients vanish at any moment', async () => {
  let seed = 99;
  const rnd = (n) => (seed = (seed * 1103515245 + 12345) & 0x7fffffff) % n;
  for (let i = 0; i < 60; i++) {
    const c = await open();
    const steps = [
      () => c.cmd('inference', 'load_experiment', { experiment_name: LAW_NAME, grid_size: 16 }),
      () => c.cmd('inference', 'play'),
      () => c.frame(),
      () => c.cmd('simulation', 'set_viz', { viz_type: 'fields' }),
      () => c.cmd('inference', 'reset'),
      () => c.cmd('inference', 'unload'),
      () => c.cmd('inference', 'load_experiment', { grid_size: 20 }),
    ];
    for (const s of steps.slice(0, rnd(steps.length + 1))) await s();
    if (rnd(2)) c.terminate();
    else c.ws.close();
    server.clients.delete(c);
  }
  await until(async () => {
    const m = await server.metrics();
    return m.ic_law_simulations === 0 && m.ic_law_state_bytes === 0 && (await sims(server)).length === 0;
  }, 'all to go');
});

test('the server has survived', async () => {
  await server.stop();
  server.exited = true;
});
