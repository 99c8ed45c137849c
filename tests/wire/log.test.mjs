// The log of a server: whose lines they are, what is never in it, a file that rotates, is reopened, and whose disk is
// full; and what a crash leaves in it.
import test from 'node:test';
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import zlib from 'node:zlib';
import { GREEDY, MODEL, Server, freePort, run, tempDir, until, within } from './lib.mjs';

const STORY = 'Once upon a time';
const linesOf = (text) => text.trimEnd().split('\n').filter(Boolean).map((l) => JSON.parse(l));
const linesIn = (file) => (fs.existsSync(file) ? linesOf(fs.readFileSync(file, 'utf8')) : []);

test('each line: UTC with ms, level, module; the end of a request says whose it was', async () => {
  const srv = await Server.start();
  const c = await srv.connect();
  await c.text(STORY, { ...GREEDY, max_tokens: 7 }, { id: 'my "own" id' });
  const line = await until(() => srv.log.map((l) => JSON.parse(l)).find((l) => l.module === 'request'), 'the line of its end');
  assert.equal(line.id, 'my "own" id');
  assert.equal(line.level, 'info');
  assert.ok(Number.isInteger(line.rid) && line.rid > 0);
  assert.match(line.conn, /^\d+\.\d+$/);
  assert.match(line.msg, /^length: 7 tokens for a prompt of \d+ \(0 known\), /);
  await c.close();
  await srv.stop();
  for (const l of linesOf(srv.log.join('\n'))) {
    assert.match(l.time, /^20\d\d-[01]\d-[0-3]\dT[0-2]\d:[0-5]\d:[0-5]\d\.\d{3}Z$/);
    assert.ok(Math.abs(Date.parse(l.time) - Date.now()) < 600e3);
    assert.ok(['error', 'warn', 'info', 'debug', 'trace'].includes(l.level));
    assert.ok(l.module.length > 0 && typeof l.msg === 'string');
  }
});

test('levels per module', async () => {
  const srv = await Server.start(['--log-level', 'warn,serve=info,request=debug']);
  const c = await srv.connect();
  await c.text(STORY, { ...GREEDY, max_tokens: 3 });
  await c.close();
  await srv.stop();
  const all = linesOf(srv.log.join('\n'));
  assert.ok(all.some((l) => l.module === 'request' && l.level === 'debug'));
  assert.ok(all.some((l) => l.module === 'serve' && l.level === 'info'));
  assert.deepEqual(all.filter((l) => !['serve', 'request'].includes(l.module) && !['error', 'warn'].includes(l.level)), []);
});

test('a reader of the log who does not read holds no request up; what he misses is counted', async () => {
  const srv = await Server.start(['--log-level', 'info,request=debug,proto=debug']);
  const c = await srv.connect();
  srv.process.stderr.pause();
  const missing = async () => (await srv.metrics())['ic_log_lines_missing_total{reason="queue"}'];
  for (let n = 0; n < 40000 && !(await missing()); n += 50)
    await Promise.all(Array.from({ length: 50 }, () => c.text('a', { ...GREEDY, max_tokens: 1 })));
  const dropped = await missing();
  assert.ok(dropped > 0, 'the pipe and the ring are full');
  srv.process.stderr.resume();
  const told = await until(() => srv.log.map((l) => JSON.parse(l)).find((l) => l.module === 'log'), 'the count');
  assert.equal(told.level, 'warn');
  assert.match(told.msg, /^log lines are missing here: \d+ found the queue full, 0 could not be written$/);
  await c.close();
  await srv.stop();
});

test('simulations, connections and refusals are in it too, with their numbers', async () => {
  const law = path.join(path.dirname(MODEL), '../laws/ginzburg-landau');
  const srv = await Server.start(['--law', law, '--log-level', 'info,request=debug,proto=debug']);
  const c = await srv.connect();
  const { sim_id } = await c.ask({ op: 'sim_create', grid: 32, id: 's' }, (m) => m.op === 'sim_created' || m.op === 'error');
  await c.ask({ op: 'sim_close', sim_id }, (m) => m.op === 'sim_closed' || m.op === 'error');
  await c.bad({ op: 'infer', id: 'no', params: {} }, 'bad_request');
  await c.close();
  await until(() => srv.log.some((l) => l.includes('gone, with 0')), 'its close');
  await srv.stop();
  const lines = linesOf(srv.log.join('\n'));
  const of = (text) => lines.find((l) => l.msg.startsWith(text));
  assert.equal(of('connected').conn, of('gone').conn);
  assert.equal(`sim_${of('simulation of law 0 on 32 x 32').sim}`, sim_id);
  assert.equal(of('simulation closed after 0 steps').conn, of('connected').conn);
  assert.equal(of('told: bad_request').id, 'no');
});

test('no prompt, no answer, nothing of what clients send is in the log at the default level', async () => {
  const srv = await Server.start();
  const c = await srv.connect();
  const secret = 'Zanzibar';
  const answer = await c.text(`${STORY} there was ${secret}`, { ...GREEDY, max_tokens: 40 });
  await c.infer([{ role: 'user', content: secret }]).refused(); // no template
  await c.infer(secret, { grammar: `root ::= ${secret} "` }).refused();
  await c.infer(secret, { json_schema: { type: secret } }).refused();
  await c.bad({ op: secret });
  await c.bad(`{"op":"infer","prompt":"${secret}`);
  await srv.http('/v1/completions', { method: 'POST', body: JSON.stringify({ prompt: secret, max_tokens: 5 }), headers: { 'content-type': 'application/json' } });
  await srv.http(`/${secret}`);
  await c.close();
  await srv.stop();
  const log = srv.log.join('\n');
  assert.ok(!log.includes(secret), log);
  const words = answer.trim();
  assert.ok(words.length > 20 && !log.includes(words.slice(0, 20)));
});

test('--log-file: everything is there, stderr stays empty, SIGHUP reopens it, the last line is not lost', async (t) => {
  const dir = tempDir(t);
  const file = path.join(dir, 'ic.log');
  const srv = await Server.start(['--log-file', file], { logFile: file });
  const c = await srv.connect();
  await c.text(STORY, { ...GREEDY, max_tokens: 3 });
  fs.renameSync(file, `${file}.old`);
  await c.text(STORY, { ...GREEDY, max_tokens: 3 });
  assert.ok(!fs.existsSync(file));
  const requests = (name) => linesIn(name).filter((l) => l.module === 'request').length;
  await until(() => requests(`${file}.old`) === 2, 'the line of the second request'); // the log's thread writes it
  srv.signal('SIGHUP');
  await until(() => fs.existsSync(file), 'the new file');
  await c.text(STORY, { ...GREEDY, max_tokens: 3 });
  await c.close();
  await srv.stop();
  assert.deepEqual(srv.log, []);
  assert.equal(fs.statSync(file).mode & 0o777 & ~0o640, 0);
  assert.equal(requests(`${file}.old`), 2);
  assert.equal(requests(file), 1);
  assert.equal(linesIn(file).at(-1).msg, 'bye');
});

test('rotation: files are compressed, within the bound, and lose no line', async (t) => {
  const dir = tempDir(t);
  const file = path.join(dir, 'ic.log');
  const srv = await Server.start(['--log-file', file, '--log-rotate-bytes', '64K', '--log-total-bytes', '1M', '--log-level', 'debug'], { logFile: file });
  const c = await srv.connect();
  for (let i = 0; i < 900; i += 30) await Promise.all(Array.from({ length: 30 }, (_, k) => c.text('a', { ...GREEDY, max_tokens: 1 }, { id: `line-${i + k}` })));
  await until(() => fs.existsSync(`${file}.000002.gz`) && !fs.existsSync(`${file}.000002`), 'two compressed files');
  const m = await srv.metrics();
  assert.equal(m['ic_log_lines_missing_total{reason="queue"}'], 0);
  assert.equal(m['ic_log_lines_missing_total{reason="disk"}'], 0);
  await c.close();
  await srv.stop();
  const names = fs.readdirSync(dir).sort();
  const all = names.flatMap((n) => {
    const raw = fs.readFileSync(path.join(dir, n));
    return linesOf((n.endsWith('.gz') ? zlib.gunzipSync(raw) : raw).toString());
  });
  const ends = all.filter((l) => l.module === 'request' && l.id);
  assert.equal(new Set(ends.map((l) => l.id)).size, 900);
  assert.equal(ends.length, 900);
  for (const n of names) assert.ok(fs.statSync(path.join(dir, n)).size <= 65536 + 65536, n);
});

test('a disk that takes nothing costs lines, not requests, and they are counted', async () => {
  const srv = await Server.start(['--log-file', '/dev/full'], { port: await freePort() });
  const c = await srv.connect();
  for (let i = 0; i < 20; i++) assert.ok((await c.text(STORY, { ...GREEDY, max_tokens: 5 })).length > 0);
  const lost = await until(async () => {
    const m = await srv.metrics();
    return m['ic_log_lines_missing_total{reason="disk"}'] >= 20 && m['ic_log_lines_missing_total{reason="disk"}'];
  }, 'the count of lost lines');
  await c.close();
  await srv.stop();
  const last = JSON.parse(srv.log.at(-1)); // on stderr, once the log is closed
  assert.equal(last.level, 'warn');
  assert.match(last.msg, /^0 lines found the queue full, \d+ could not be written$/);
  assert.ok(Number(/(\d+) could/.exec(last.msg)[1]) >= lost);
});

test('a full disk that is emptied: lines again, the first tells how many are missing', async (t) => {
  let mounted = false;
  t.after(() => mounted && execFileSync('umount', ['-l', dir])); // first of all
  const dir = tempDir(t);
  try {
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=192k', 'ic-test', dir], { stdio: 'ignore' });
  } catch {
    t.skip('skipped: only root may mount a small disk');
    return;
  }
  mounted = true;
  const file = path.join(dir, 'ic.log');
  const srv = await Server.start(['--log-file', file, '--log-rotate-bytes', '64M'], { logFile: file });
  const c = await srv.connect();
  await c.text(STORY, { ...GREEDY, max_tokens: 3 }, { id: 'before' });
  await until(() => linesIn(file).some((l) => l.id === 'before'), 'its line');
  const ballast = path.join(dir, 'ballast');
  const fd = fs.openSync(ballast, 'w');
  assert.throws(() => {
    for (;;) fs.writeSync(fd, Buffer.alloc(1024)); // down to the last page
  }, { code: 'ENOSPC' });
  fs.closeSync(fd);
  const missing = async () => (await srv.metrics())['ic_log_lines_missing_total{reason="disk"}'];
  for (let i = 0; (await missing()) < 25; i++) assert.ok((await c.text(STORY, { ...GREEDY, max_tokens: 3 }, { id: `during-${i}` })).length > 0);
  fs.rmSync(ballast);
  const lost = await missing();
  await c.text(STORY, { ...GREEDY, max_tokens: 3 }, { id: 'after' });
  const lines = await until(() => {
    const l = linesIn(file);
    return l.some((x) => x.id === 'after') && l;
  }, 'lines again');
  const told = lines.find((l) => l.module === 'log');
  assert.match(told.msg, /^log lines are missing here: 0 found the queue full, \d+ could not be written: No space left on device$/);
  assert.equal(Number(/(\d+) could/.exec(told.msg)[1]), lost);
  assert.equal(lines.indexOf(told), lines.findIndex((l) => l.id === 'after') - 1);
  console.log(`full disk: ${lost} lines lost and counted, no request`);
  await c.close();
  await srv.stop();
});

test('a log file that cannot be: exit 4 and one line; sizes that make no sense: exit 2', async (t) => {
  const dir = tempDir(t);
  for (const file of [path.join(dir, 'no/such/folder.log'), dir]) {
    const r = await run(['serve', '--model', MODEL, '--port', '0', '--log-file', file]);
    assert.equal(r.code, 4, r.stderr);
    assert.match(r.stderr, /^inference-core: log file .*\n$/);
  }
  const r = await run(['serve', '--model', MODEL, '--port', '0', '--log-rotate-bytes', '64M', '--log-total-bytes', '100M']);
  assert.equal(r.code, 2);
  assert.equal((await run(['serve', '--model', MODEL, '--log-level', 'info,net=loud'])).code, 2);
});

// ---- a crash ----

const sanitized = async (srv) => /lib[at]san\.so/.test(fs.readFileSync(`/proc/${srv.process.pid}/maps`, 'utf8'));

for (const [kind, signal] of [['segv', 'SIGSEGV'], ['abort', 'SIGABRT'], ['fpe', 'SIGFPE'], ['ill', 'SIGILL'], ['bus', 'SIGBUS'], ['stack', 'SIGSEGV']])
  test(`a crash (${kind}): what was logged, one line of cause, a backtrace; the signal is the exit status`, async (t) => {
    const dir = tempDir(t);
    const file = path.join(dir, 'ic.log');
    const srv = await Server.start(['--log-file', file], { logFile: file, env: { IC_FAULT: `crash-after-ms:1500:${kind}` } });
    if (await sanitized(srv)) {
      await srv.kill();
      t.skip('skipped: the sanitizer has its own handlers');
      return;
    }
    const end = await within(srv.exit, 'the crash');
    assert.deepEqual(end, { code: null, signal });
    const lines = linesIn(file); // all JSON
    const cause = lines.findIndex((l) => l.module === 'crash');
    assert.equal(lines[cause].level, 'error');
    assert.match(lines[cause].msg, new RegExp(`^crashed: ${signal}.* in thread ic-fault; version [\\d.]+, build id [0-9a-f]{16,}$`));
    if (kind === 'segv') assert.match(lines[cause].msg, /at address 0x[0-9a-f]+ in/);
    assert.equal(lines[cause - 1].module, 'fault', 'the last line before it is not lost');
    const frames = lines.slice(cause + 1);
    assert.ok(frames.length >= 2);
    for (const [i, f] of frames.entries()) assert.match(f.msg, new RegExp(`^#${i} .*\\[0x[0-9a-f]+\\]$`));
    assert.ok(frames.some((f) => f.msg.includes('inference-core')), 'our own code is in it');
    assert.deepEqual(linesOf(srv.log.join('\n')), lines.slice(cause), 'the same on stderr');
  });
