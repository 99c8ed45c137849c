// What lies in deploy/: systemd takes the unit and finds it hardened, and the server takes the example configuration.
import test from 'node:test';
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { BIN, MODEL, Server, run, tempDir } from './lib.mjs';

const DEPLOY = path.join(path.dirname(fileURLToPath(import.meta.url)), '../../deploy/systemd');
const UNIT = fs.readFileSync(path.join(DEPLOY, 'inference-core.service'), 'utf8');
const EXPOSURE_MAX = 20; // tenths

const analyze = (...args) => spawnSync('systemd-analyze', args, { encoding: 'utf8' });
const absent = analyze('--version').status !== 0;

// verify wants the program to be there
function unitFile(t, text = UNIT) {
  const file = path.join(tempDir(t), 'inference-core.service');
  fs.writeFileSync(file, text.replace('/usr/local/bin/inference-core', BIN));
  return file;
}

test('systemd-analyze verify', { skip: absent && 'skipped: no systemd-analyze' }, (t) => {
  const r = analyze('verify', '--man=no', unitFile(t));
  assert.equal(r.status, 0, r.stderr);
  assert.ok(!r.stderr.includes('inference-core.service'), r.stderr); // unknown settings are only warned of
  const bad = analyze('verify', '--man=no', unitFile(t, UNIT.replace('NoNewPrivileges', 'NoNewPriviledges')));
  assert.ok(bad.stderr.includes('NoNewPriviledges'), 'a mistake would be seen');
});

test('systemd-analyze security', { skip: absent && 'skipped: no systemd-analyze' }, (t) => {
  const args = ['security', '--offline=true', '--no-pager', `--threshold=${EXPOSURE_MAX}`];
  const r = analyze(...args, unitFile(t));
  console.log(/Overall exposure level.*/.exec(r.stdout)?.[0] ?? r.stderr);
  assert.equal(r.status, 0, r.stdout + r.stderr);
  assert.notEqual(analyze(...args, unitFile(t, UNIT.replace(/^SystemCallFilter=.*$/gm, ''))).status, 0, 'the threshold means something');
});

test('the unit fits the supervisor', () => {
  const setting = (name) => new RegExp(`^${name}=(.*)$`, 'm').exec(UNIT)?.[1];
  const words = setting('ExecStart').split(' ');
  assert.deepEqual(words.slice(1, 4), ['supervise', '--', 'serve']);
  assert.equal(setting('KillMode'), 'mixed', 'else the server gets SIGTERM twice, and ends at once');
  assert.equal(setting('Type'), 'notify');
  assert.equal(setting('RestartPreventExitStatus'), '2 4');
  const conf = fs.readFileSync(path.join(DEPLOY, 'inference-core.conf'), 'utf8');
  assert.ok(Number(setting('TimeoutStopSec')) > Number(/^drain-seconds = (\d+)$/m.exec(conf)[1]) + 10);
});

test('serve takes the example configuration, also with what is commented out', async (t) => {
  const conf = path.join(DEPLOY, 'inference-core.conf');
  const srv = await Server.start(['--config', conf]);
  const c = await srv.connect();
  assert.equal(c.hello.status, 'ready');
  await c.close();
  await srv.stop();
  const all = path.join(tempDir(t), 'all.conf');
  const text = fs.readFileSync(conf, 'utf8').replace(/^; ([a-z-]+ = )/gm, '$1');
  assert.ok(text.includes('\nlog-file = ') && text.includes('\nkeys = '));
  fs.writeFileSync(all, text);
  // no entry is unknown or out of range: it gets as far as the files that are not here
  const r = await run(['serve', '--config', all, '--model', MODEL, '--law', '', '--port', '0']);
  assert.match(r.stderr, /keys\.ini/);
});
