// No descriptor is left, not even for refusing a connection: it waits, the loop does not turn over it at full speed, and
// it is served when there are some again.
import test from 'node:test';
import assert from 'node:assert/strict';
import fs from 'node:fs';
import { execFileSync } from 'node:child_process';
import { GREEDY, until, withServer } from './lib.mjs';

const PRLIMIT = ['/usr/bin/prlimit', '/bin/prlimit'].find((f) => fs.existsSync(f));
const FULL = /out of file descriptors/;

test('a connection that can be neither taken nor refused waits', { skip: !PRLIMIT && 'skipped: no prlimit' }, () => withServer([], async (srv) => {
  const limit = (n) => execFileSync(PRLIMIT, ['--pid', String(srv.process.pid), `--nofile=${n}:`]);
  const c = await srv.connect();
  // below the one that it gives up for refusing; not lower, for poll(2) takes no more sockets than the limit says
  const fds = fs.readdirSync(`/proc/${srv.process.pid}/fd`).filter((fd) => fs.readlinkSync(`/proc/${srv.process.pid}/fd/${fd}`) === '/dev/null');
  limit(Math.max(...fds.map(Number)));
  const late = Array.from({ length: 8 }, () => srv.connect()); // what was open at the start may have left numbers below it
  await until(() => srv.log.some((l) => FULL.test(l)), 'the connection to be noticed');
  await c.ask({ op: 'subscribe_metrics' }, 'metrics_subscribed');
  await until(() => c.log.filter((m) => m.op === 'metrics').length >= 2, 'two seconds of the loop');
  const lines = srv.log.filter((l) => FULL.test(l)).length;
  limit(1024);
  assert.ok(lines < 100, `an attempt at each tick, and no more: ${lines}`);
  for (const l of await Promise.all(late)) assert.match(await l.text('Once upon a time', { ...GREEDY, max_tokens: 2 }), /./);
}));
