// The wall clock jumps, years back and years ahead, while the server works: nobody is cut off, no deadline passes or
// fails to, no log file is rotated; only the times in the log are others.
import test from 'node:test';
import assert from 'node:assert/strict';
import fs from 'node:fs';
import path from 'node:path';
import { ENDLESS, GREEDY, Server, tempDir, until } from './lib.mjs';

const SHIM = process.env.IC_WALLCLOCK;
const YEAR = 365 * 86400;

test('a wall clock that jumps moves nothing', { skip: !SHIM && 'skipped: no IC_WALLCLOCK (not under the sanitizers)' }, async (t) => {
  const dir = tempDir(t);
  const file = path.join(dir, 'ic.log'), offset = path.join(dir, 'offset');
  const jump = (years) => fs.writeFileSync(offset, String(years * YEAR));
  jump(0);
  const srv = await Server.start(['--ctx-size', '131072', '--log-file', file, '--log-rotate-hours', '1', '--idle-seconds', '60'], {
    logFile: file,
    env: { LD_PRELOAD: SHIM, WALLCLOCK_FILE: offset },
  });
  const c = await srv.connect();
  const right = await c.text('Once upon a time', { ...GREEDY, max_tokens: 20 });
  const stream = c.infer('Once upon a time', ENDLESS); // goes on through all jumps
  await stream.first();
  const patient = c.infer('Once upon a time', ENDLESS, { deadline_ms: 3600_000 });
  await patient.first();
  const session = await c.session();
  for (const years of [-10, 10, -1, 30, 0]) {
    jump(years);
    const id = `at-${years}`;
    const had = stream.tokens.length;
    const s = await c.infer('Once upon a time', { ...GREEDY, max_tokens: 20 }, { id }).done();
    assert.equal(s.text, right);
    assert.ok(s.end.stats.total_ms >= 0 && s.end.stats.total_ms < 600e3);
    await c.text('there was', { ...GREEDY, max_tokens: 5 }, { session_id: session });
    await until(() => stream.tokens.length > had, 'the stream to go on');
    const line = await until(() => fs.readFileSync(file, 'utf8').split('\n').filter(Boolean).map((l) => JSON.parse(l)).find((l) => l.id === id), 'its line');
    assert.ok(Math.abs(Date.parse(line.time) / 1000 - (Date.now() / 1000 + years * YEAR)) < 3600, `the log tells the time that is set: ${line.time}`);
    assert.equal((await srv.http('/ready')).status, 200);
  }
  const short = await c.infer('Once upon a time', ENDLESS, { deadline_ms: 300 }).done();
  assert.equal(short.end.reason, 'deadline', 'deadlines go by the other clock');
  assert.equal(patient.end, null);
  await c.ask({ op: 'abort' }, 'abort');
  await Promise.all([stream.finished(), patient.finished()]);
  assert.deepEqual(fs.readdirSync(dir).sort(), ['ic.log', 'offset'], 'nothing was rotated');
  await c.close();
  await srv.stop();
});
