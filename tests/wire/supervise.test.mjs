// The supervisor: a server that is killed comes back and answers right, one that keeps ending gets less, what is wrong
// is not tried again, and whoever manages it hears how it stands.
import test from 'node:test';
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import path from 'node:path';
import { BIN, ENDLESS, GREEDY, MODEL, Client, Server, freePort, run, sleep, tempDir, until, within } from './lib.mjs';

const STORY = 'Once upon a time';

async function supervised(t, options = [], args = [], { env = {} } = {}) {
  const dir = tempDir(t);
  const state = path.join(dir, 'state.json');
  const srv = await Server.start(args, { before: ['supervise', '--state', state, ...options, '--'], port: await freePort(), env });
  srv.dir = dir;
  srv.state = () => JSON.parse(fs.readFileSync(state, 'utf8')); // never half of it
  return srv;
}

const alive = (pid) => {
  try {
    return !/^State:\s+Z/m.test(fs.readFileSync(`/proc/${pid}/status`, 'utf8'));
  } catch {
    return false;
  }
};

const seconds = (from) => ((performance.now() - from) / 1000).toFixed(2);

test('kill -9 under load: the clients come back, and get the right answers', async (t) => {
  const srv = await supervised(t, [], ['--ctx-size', '4096', '--kv-size', '65536']);
  const first = await srv.connect();
  const right = await first.text(STORY, { ...GREEDY, max_tokens: 40 });
  await first.close();
  const old = srv.state().pid;
  const clients = await Promise.all(Array.from({ length: 8 }, () => srv.connect()));
  const streams = clients.map((c) => c.infer(STORY, { ...ENDLESS, max_tokens: 4000 }));
  await Promise.all(streams.map((s) => s.first()));
  const start = performance.now();
  process.kill(old, 'SIGKILL');
  await Promise.all(clients.map((c) => within(c.closed.promise, 'the connection to break')));
  const times = await Promise.all(
    clients.map(async () => {
      const c = await until(() => Client.open(srv).catch(() => null), 'a new connection');
      // refused as long as the model is being loaded
      for (;;) {
        const s = c.infer(STORY, { ...GREEDY, max_tokens: 40 });
        const token = await s.first().catch(() => null);
        if (!token) {
          assert.equal(s.error.code, 'unavailable');
          await sleep(10);
          continue;
        }
        const at = seconds(start);
        assert.equal((await s.done()).text, right);
        await c.close();
        return at;
      }
    }),
  );
  console.log(`kill -9 with 8 streams: first tokens again after ${times.sort().join(', ')} s`);
  const st = srv.state();
  assert.notEqual(st.pid, old);
  assert.deepEqual([st.restarts, st.step, st.configuration], [1, 0, 'as wished']);
  assert.match(st.last_end, /^signal 9 /);
  await srv.stop();
});

test('it ends when it is told to, with what runs finished; and the server ends with it', async (t) => {
  const srv = await supervised(t);
  const c = await srv.connect();
  const s = c.infer(STORY, { ...ENDLESS, max_tokens: 200 });
  await s.first();
  srv.signal('SIGTERM');
  assert.equal((await s.done()).end.stats.tokens, 200);
  assert.deepEqual(await within(srv.exit, 'the end'), { code: 0, signal: null });
  assert.equal(srv.state().state, 'ended');

  const other = await supervised(t);
  const { pid } = other.state();
  await other.kill();
  await until(() => !alive(pid), 'the server to go with its supervisor');
});

test('Ctrl-C goes to the whole group; the server hears it once, and finishes', async (t) => {
  const dir = tempDir(t);
  const port = await freePort();
  const state = path.join(dir, 's.json');
  const env = Object.fromEntries(Object.entries(process.env).filter(([k]) => !k.startsWith('IC_')));
  const args = ['supervise', '--state', state, '--', 'serve', '--model', MODEL, '--threads', '1', '--port', String(port)];
  const p = spawn(BIN, args, { env, stdio: 'ignore', detached: true }); // leads a group of its own
  t.after(() => alive(p.pid) && process.kill(p.pid, 'SIGKILL'));
  const exit = once(p, 'exit');
  await until(() => fs.existsSync(state) && JSON.parse(fs.readFileSync(state, 'utf8')).state === 'running', 'the server');
  const c = await Client.open({ port, clients: new Set() });
  const s = c.infer(STORY, { ...ENDLESS, max_tokens: 200 });
  await s.first();
  process.kill(-p.pid, 'SIGINT');
  assert.equal((await s.done()).end.stats.tokens, 200);
  assert.deepEqual(await within(exit, 'the end'), [0, null]);
});

test('SIGHUP reaches the server', async (t) => {
  const dir = tempDir(t);
  const file = path.join(dir, 'ic.log');
  const srv = await supervised(t, [], ['--log-file', file]);
  fs.renameSync(file, `${file}.old`);
  srv.signal('SIGHUP');
  await until(() => fs.existsSync(file), 'the new log file');
  await srv.stop();
});

test('what cannot get better is not tried again', async (t) => {
  const dir = tempDir(t);
  const state = path.join(dir, 's.json');
  const cases = [
    [2, ['serve', '--nonsense', '1']],
    [2, ['serve']],
    [2, []],
    [2, ['plan']],
    [4, ['serve', '--model', path.join(dir, 'none.gguf'), '--port', '0']],
  ];
  for (const [code, words] of cases) {
    const r = await run(['supervise', '--state', state, '--', ...words]);
    assert.equal(r.code, code, `${words}: ${r.stderr}`);
    assert.ok(!r.stderr.includes('starting it again'));
  }
  for (const bad of [['--crashes', '0'], ['--crashes', 'x'], ['--nonsense', '1'], ['stray'], ['--good-seconds'], ['--state', dir]])
    assert.equal((await run(['supervise', ...bad, '--', 'serve', '--model', MODEL])).code, 2, bad.join(' '));
  assert.match((await run(['supervise', '--help'])).stdout, /--good-seconds/);
});

test('a model that was there and is gone is waited for, with nothing less asked', async (t) => {
  const model = path.join(tempDir(t), 'model.gguf');
  fs.copyFileSync(MODEL, model);
  const srv = await supervised(t, ['--max-delay-seconds', '1'], ['--model', model]);
  await until(() => srv.state().state === 'running', 'the supervisor to hear that it is ready');
  fs.unlinkSync(model);
  process.kill(srv.state().pid, 'SIGKILL');
  await until(() => srv.state().last_end === 'exit code 4' && srv.state().restarts >= 4, 'some tries without the model');
  fs.copyFileSync(MODEL, model);
  await until(() => srv.ready(), 'the server to be ready again');
  assert.equal(srv.state().step, 0);
  srv.log = srv.log.filter((line) => !line.startsWith('inference-core: model ')); // each try says why it ended
  await srv.stop();
});

test('a server that keeps ending gets less, step by step, and the wished again after a long good run', async (t) => {
  const srv = await supervised(t, ['--crashes', '2', '--good-seconds', '1', '--retry-seconds', '2'], ['--ctx-size', '2048', '--kv-size', '8192']);
  const context = async () => {
    const c = await until(() => Client.open(srv).catch(() => null), 'a connection');
    const { hello } = await until(async () => {
      const h = await c.ask({ op: 'hello' }, 'hello');
      return h.status === 'ready' && { hello: h };
    }, 'the model');
    await c.close();
    return hello.limits.context_tokens;
  };
  const die = async () => {
    const { pid, restarts } = await until(() => srv.state().state === 'running' && srv.state(), 'a running server');
    process.kill(pid, 'SIGKILL');
    await until(() => srv.state().restarts > restarts, 'its end to be seen');
  };
  assert.equal(await context(), 2048);
  await until(() => srv.state().last_good, 'a good run');
  assert.deepEqual(srv.state().last_good, { ctx_size: 2048, kv_size: 8192, gpu_layers: 'auto' });
  await die();
  await die();
  await until(() => srv.state().step === 1 && srv.state().state === 'running', 'the first step');
  assert.equal(srv.state().configuration, 'half the context');
  assert.deepEqual(srv.state().in_force, { ctx_size: 1024, kv_size: 4096, gpu_layers: 'auto' });
  await die();
  await die();
  await until(() => srv.state().step === 2 && srv.state().state === 'running', 'the second step');
  assert.deepEqual(srv.state().in_force, { ctx_size: 1024, kv_size: 4096, gpu_layers: '0' });
  assert.equal(await context(), 1024);
  await until(() => srv.state().step === 0 && srv.state().state === 'running', 'the wished configuration again');
  assert.equal(await context(), 2048);
  for (const text of ['it keeps ending; from now on with less: half the context', 'back to the wished configuration'])
    assert.ok(srv.log.some((l) => l.includes(text)), text);
  await srv.stop();
});

test('what was good last is remembered by the next supervisor', async (t) => {
  const dir = tempDir(t);
  const state = path.join(dir, 's.json');
  fs.writeFileSync(state, JSON.stringify({ last_good: { ctx_size: 768, kv_size: 3072, gpu_layers: '0' } }));
  const srv = await Server.start(['--ctx-size', '2048'], { before: ['supervise', '--state', state, '--crashes', '1', '--'], port: await freePort() });
  const read = () => JSON.parse(fs.readFileSync(state, 'utf8'));
  process.kill(read().pid, 'SIGKILL');
  await until(() => read().state === 'running' && read().step === 1, 'the last good configuration');
  assert.equal(read().configuration, 'as it was good last');
  assert.deepEqual(read().in_force, { ctx_size: 768, kv_size: 3072, gpu_layers: '0' });
  await srv.stop();
  fs.writeFileSync(state, '{"last_good":{"ctx_size":"x"'); // nonsense is as nothing
  const again = await Server.start([], { before: ['supervise', '--state', state, '--'], port: await freePort() });
  await again.stop();
});

test('a server that hangs is aborted and started again', async (t) => {
  const srv = await supervised(t, ['--watchdog-seconds', '4']);
  const { pid } = await until(() => srv.state().state === 'running' && srv.state(), 'READY to be told'); // its log line comes first
  process.kill(pid, 'SIGSTOP'); // not even its handlers run: SIGABRT waits, SIGKILL does not
  await until(() => srv.state().pid !== pid && srv.state().state === 'running', 'another process');
  assert.match(srv.state().last_end, /because it was silent$/);
  await srv.stop();
});

test('a server that was stopped together with its supervisor, as in a paused container, is not taken for silent', async (t) => {
  const srv = await supervised(t, ['--watchdog-seconds', '4']);
  const { pid } = await until(() => srv.state().state === 'running' && srv.state(), 'READY to be told');
  process.kill(srv.process.pid, 'SIGSTOP');
  process.kill(pid, 'SIGSTOP');
  await sleep(6000);
  process.kill(srv.process.pid, 'SIGCONT');
  await sleep(200);
  process.kill(pid, 'SIGCONT');
  assert.equal((await srv.http('/health')).status, 200);
  await sleep(1000);
  assert.deepEqual([srv.state().pid, srv.state().restarts], [pid, 0]);
  await srv.stop();
});

// A manager in a few lines of Python: node has no datagrams of AF_UNIX.
const MANAGER = `
import socket, sys, subprocess, os
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.bind(sys.argv[1])
p = subprocess.Popen(sys.argv[2:], env=dict(os.environ, NOTIFY_SOCKET=sys.argv[1], WATCHDOG_USEC='2000000'))
print('pid', p.pid, flush=True)
while True:
    print(repr(s.recv(4096).decode()), flush=True)
`;

test('a service manager hears READY when the model answers, pings, restarts, STOPPING', async (t) => {
  const dir = tempDir(t);
  const port = await freePort();
  const args = ['supervise', '--state', path.join(dir, 's.json'), '--', 'serve', '--model', MODEL, '--threads', '1', '--port', String(port)];
  const env = Object.fromEntries(Object.entries(process.env).filter(([k]) => !k.startsWith('IC_')));
  const p = spawn('python3', ['-c', MANAGER, path.join(dir, 'notify'), BIN, ...args], { env, stdio: ['ignore', 'pipe', 'ignore'] });
  p.on('error', () => {});
  if (!p.pid) {
    t.skip('skipped: no python3');
    return;
  }
  let text = '';
  p.stdout.setEncoding('utf8').on('data', (d) => (text += d));
  const heard = (what) => until(() => text.includes(what) && text, what);
  const pid = Number((await until(() => /^pid (\d+)\n/.exec(text), 'its process'))[1]);
  t.after(() => {
    if (alive(pid)) process.kill(pid, 'SIGKILL');
    p.kill('SIGKILL');
  });
  await heard('READY=1\\nSTATUS=serving on 127.0.0.1:');
  const c = await Client.open({ port, clients: new Set() });
  assert.equal(c.hello.status, 'ready', 'READY is not said before the model answers');
  await c.close();
  await heard('WATCHDOG=1');
  // the server's socket, used by another process
  const server = JSON.parse(fs.readFileSync(path.join(dir, 's.json'), 'utf8')).pid;
  const inbox = /NOTIFY_SOCKET=@([^\0]*)/.exec(fs.readFileSync(`/proc/${server}/environ`, 'utf8'))[1];
  const liar = spawn('python3', ['-c', `import socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.connect('\\x00${inbox}'); s.send(b'STATUS=lies')`], { stdio: 'inherit' });
  assert.deepEqual(await once(liar, 'exit'), [0, null]);
  process.kill(pid, 'SIGHUP');
  await heard('RELOADING=1\\nMONOTONIC_USEC=');
  await until(() => text.match(/READY=1/g).length === 2, 'READY again');
  process.kill(JSON.parse(fs.readFileSync(path.join(dir, 's.json'), 'utf8')).pid, 'SIGKILL');
  await heard('STATUS=waiting to start again; last ended by signal 9');
  await heard(`STATUS=serving on 127.0.0.1:${port}; last ended by signal 9 (Killed); 1 restarts`);
  process.kill(pid, 'SIGTERM');
  await heard('STOPPING=1');
  await until(() => !alive(pid), 'its end');
  assert.equal(text.match(/READY=1/g).length, 2, 'a restart is not a new start of the service');
  p.kill('SIGKILL');
  await once(p, 'close');
  assert.ok(!text.includes('lies'), 'nobody but the server is believed');
});
