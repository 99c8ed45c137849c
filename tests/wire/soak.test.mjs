// The soak's check can fail: each of the faults that it brings itself is found, and nothing else is.
import test from 'node:test';
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { BIN, tempDir } from './lib.mjs';
import { slope } from '../../tools/soak/stats.mjs';
import { sleep, within } from '../../tools/soak/wire.mjs';

const SOAK = path.join(path.dirname(fileURLToPath(import.meta.url)), '../../tools/soak/soak.mjs');

async function soak(t, args) {
  const p = spawn(process.execPath, [SOAK, '--bin', BIN, '--idle-seconds', '0', '--settle-seconds', '3', '--load', '0.3', '--out', tempDir(t), ...args]);
  t.after(() => p.kill('SIGKILL'));
  let out = '';
  for (const s of [p.stdout, p.stderr]) s.setEncoding('utf8').on('data', (d) => (out += d));
  const [code] = await once(p, 'close');
  return { code, out, failed: [...out.matchAll(/^FAIL +(.*?)  /gm)].map((m) => m[1]) };
}

test('a wrong answer is found', async (t) => {
  const { code, out, failed } = await soak(t, ['--minutes', '0.15', '--fault', 'answer']);
  assert.equal(code, 1, out);
  assert.ok(failed.includes('answers') && !failed.includes('fds'), out);
  assert.match(out, /wrong: .*token 2 is/);
});

test('connections that stay are found', async (t) => {
  const { code, out, failed } = await soak(t, ['--minutes', '0.1', '--fault', 'fds']);
  assert.equal(code, 1, out);
  assert.ok(failed.includes('fds') && failed.includes('nothing held') && !failed.includes('answers'), out);
});

test('a server that ends is found', async (t) => {
  const { code, out, failed } = await soak(t, ['--minutes', '0.1', '--fault', 'death']);
  assert.equal(code, 1, out);
  assert.ok(failed.includes('server'), out);
});

test('the slope of what grows is found in what jumps', () => {
  const noise = (i) => ((i * 7919) % 101) / 101 - 0.5;
  const grows = (perHour) => slope(Array.from({ length: 1500 }, (_, i) => [i / 3600, 80 + (perHour * i) / 3600 + noise(i)]));
  assert.ok(grows(0).high < 1 && grows(0).low < 0);
  assert.ok(grows(5).low > 1, JSON.stringify(grows(5)));
  assert.ok(Math.abs(grows(5).slope - 5) < 0.5);
  assert.equal(slope([[0, 1]]).high, Infinity, 'too few points say nothing');
});

test('what fails before it is awaited ends nobody', async () => {
  const early = within(Promise.reject(new Error('gone')), 'answer'); // unhandled, node would end the process
  await sleep(10);
  await assert.rejects(early, /gone/);
});
