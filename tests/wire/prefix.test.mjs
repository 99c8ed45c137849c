// Prefixes that prompts share: computed once, counted once, found by their own key space only, and never seen in a text.
import test from 'node:test';
import assert from 'node:assert/strict';
import fs from 'node:fs';
import path from 'node:path';
import { ENDLESS, GREEDY, run, MODEL, same, Server, tempDir, until, withServer } from './lib.mjs';

const server = await Server.start(['--kv-size', '2048', '--ctx-size', '512']);
const PREFIX = 'Once upon a time there was a little dog. He had a red ball and a big heart. '.repeat(2);
const ends = ['The dog', 'His mum', 'One day', 'A cat', 'The ball', 'He ran', 'Lily', 'The sun'];
const params = { ...GREEDY, max_tokens: 30, logprobs: 2 };

test('all at once: one computes what they share, and each text is that of a request alone', async () => {
  const c = await server.connect();
  const salt = { cache_salt: 'together' };
  const all = await Promise.all(ends.map((e) => c.infer(PREFIX + e, params, salt).done()));
  const cached = all.map((r) => r.end.stats.cached_tokens).sort((a, b) => a - b);
  const prefix = all[0].end.stats.prompt_tokens - 10;
  assert.ok(cached[0] === 0 && cached[1] > prefix / 2, `${cached} of about ${prefix} were there`);
  for (const [i, e] of ends.entries()) {
    const alone = await c.infer(PREFIX + e, params, { cache_salt: `alone ${i}` }).done();
    assert.equal(alone.end.stats.cached_tokens, 0);
    same(all[i], alone);
  }
  await c.close();
});

test('a key space finds its own only', async () => {
  const c = await server.connect();
  const ask = async (extra) => (await c.infer(`${PREFIX}Then`, params, extra).done()).end.stats;
  assert.equal((await ask({ cache_salt: 'a' })).cached_tokens, 0);
  assert.equal((await ask({ cache_salt: 'b' })).cached_tokens, 0);
  const again = await ask({ cache_salt: 'a' });
  assert.equal(again.cached_tokens, again.prompt_tokens - 1);
  assert.equal((await ask({ cache_salt: 'x'.repeat(63) })).cached_tokens, 0);
  for (const bad of ['x'.repeat(64), 7, ['a']])
    assert.equal((await c.infer('a', params, { cache_salt: bad }).refused()).code, bad.length === 64 ? 'too_large' : 'bad_request');
  await c.close();
});

test('what leaves the cache comes back from host memory, and says the same', () =>
  withServer(['--kv-size', '512', '--ctx-size', '512', '--cache-ram', '64M'], async (s) => {
    const c = await s.connect();
    const first = await c.infer(PREFIX, params).done();
    for (let i = 0; i < 6; i++) await c.infer(`${i} `.repeat(100), params, { cache_salt: 'others' }).done();
    const m = await s.metrics();
    assert.ok(m.ic_text_kv_spilled_tokens_total > 0 && m.ic_text_kv_spill_bytes > 0);
    const again = await c.infer(PREFIX, params).done();
    assert.ok((await s.metrics()).ic_text_kv_restored_tokens_total > 0);
    assert.ok(again.end.stats.cached_tokens > again.end.stats.prompt_tokens / 2);
    same(again, first);
    await c.close();
  }));

test('while nobody streams, all that is idle leaves the cache for host memory, and comes back', () =>
  withServer(['--cache-ram', '64M'], async (s) => {
    const c = await s.connect();
    const first = await c.infer(PREFIX, params).done();
    await until(async () => (await s.metrics()).ic_text_kv_tokens_used === 0, 'empty');
    const again = await c.infer(PREFIX, params).done();
    assert.equal(again.end.stats.cached_tokens, again.end.stats.prompt_tokens - 1);
    assert.ok((await s.metrics()).ic_text_kv_restored_tokens_total >= again.end.stats.cached_tokens);
    same(again, first);
    await c.close();
  }));

// ---- the disk below host memory: 192 KiB of that hold one text of the others and a half
const diskArgs = (dir) => ['--kv-size', '512', '--ctx-size', '512', '--cache-ram', '192K', '--cache-disk', dir];
const ours = (dir) => fs.readdirSync(dir).filter((f) => f.startsWith('inference-core-kv-'));
const files = (dir) => ours(dir).flatMap((f) => fs.readdirSync(path.join(dir, f)).map((g) => path.join(dir, f, g)));

// Others come until all that the first one left in the cache and in host memory lies on the disk, and is written.
async function pushOut(s, c, dir) {
  for (let i = 0; i < 8; i++) await c.infer(`${i} `.repeat(100), params, { cache_salt: 'others' }).done();
  await until(async () => {
    const bytes = (await s.metrics()).ic_text_kv_disk_bytes;
    const there = files(dir);
    return bytes > 0 && there.every((f) => f.endsWith('.kv')) && there.reduce((n, f) => n + fs.statSync(f).size, 0) === bytes;
  }, 'the files to be written');
}

test('what leaves host memory too comes back from the disk, says the same, and is gone in the end', async (t) => {
  const dir = tempDir(t);
  fs.writeFileSync(path.join(dir, 'strangers.kv'), 'not ours');
  await withServer(diskArgs(dir), async (s) => {
    const c = await s.connect();
    const session_id = await c.session();
    const first = await c.infer(PREFIX, params, { session_id }).done();
    const second = await c.infer(PREFIX, params, { cache_salt: 'alone' }).done();
    same(second, first);
    await pushOut(s, c, dir);
    for (const f of files(dir)) assert.equal(fs.statSync(f).mode & 0o777, 0o600);
    const before = (await s.metrics()).ic_text_kv_disk_read_tokens_total;
    const again = await c.infer(PREFIX, params).done();
    assert.ok(again.end.stats.cached_tokens > again.end.stats.prompt_tokens / 2, JSON.stringify(again.end.stats));
    same(again, first);
    assert.ok((await s.metrics()).ic_text_kv_disk_read_tokens_total > before);
    await pushOut(s, c, dir);
    const on = await c.infer(' Then', params, { session_id }).done(); // the conversation goes on
    assert.ok(on.end.stats.cached_tokens > PREFIX.length / 4, JSON.stringify(on.end.stats));
    const m = await s.metrics();
    assert.ok(m.ic_text_kv_disk_written_tokens_total > 0 && m.ic_text_kv_disk_lost_tokens_total === 0, JSON.stringify(m));
    await c.close();
  });
  assert.deepEqual(fs.readdirSync(dir), ['strangers.kv']);
});

test('files that were changed, cut short or removed do no harm', async (t) => {
  const dir = tempDir(t);
  await withServer(diskArgs(dir), async (s) => {
    const c = await s.connect();
    const first = await c.infer(PREFIX, params).done();
    for (const harm of [
      (f) => { const fd = fs.openSync(f, 'r+'); fs.writeSync(fd, 'x!', fs.statSync(f).size - 1000); fs.closeSync(fd); },
      (f) => fs.truncateSync(f, 100),
      (f) => fs.unlinkSync(f),
    ]) {
      await pushOut(s, c, dir);
      const before = (await s.metrics()).ic_text_kv_disk_lost_tokens_total;
      files(dir).forEach(harm);
      const again = await c.infer(PREFIX, params).done();
      same(again, first);
      assert.ok((await s.metrics()).ic_text_kv_disk_lost_tokens_total > before);
    }
    assert.equal(s.log.filter((l) => /the cache's disk/.test(l)).length, 1, 'one warning a minute');
    await c.close();
  });
  assert.deepEqual(fs.readdirSync(dir), []);
});

test('what a killed server has left is removed by the next one, and nothing else', async (t) => {
  const dir = tempDir(t);
  fs.mkdirSync(path.join(dir, 'inference-core-kv-photos'));
  const s = await Server.start(diskArgs(dir));
  const c = await s.connect();
  await pushOut(s, c, dir);
  const left = ours(dir).find((f) => f !== 'inference-core-kv-photos');
  fs.writeFileSync(path.join(dir, 'strangers.txt'), 'not ours');
  await s.kill();
  assert.ok(fs.readdirSync(path.join(dir, left)).length > 0);
  await withServer(diskArgs(dir), async (next) => {
    assert.ok(!ours(dir).includes(left) && ours(dir).length === 2);
    await withServer(diskArgs(dir), async () => assert.equal(ours(dir).length, 3)); // a second one beside it takes nothing from it
    const d = await next.connect();
    await pushOut(next, d, path.join(dir));
    await d.close();
  });
  assert.deepEqual(fs.readdirSync(dir).sort(), ['inference-core-kv-photos', 'strangers.txt']);
});

test('a folder that is not there is told at the start', async () => {
  for (const [code, args, want] of [[1, ['--cache-disk', '/nonexistent/kv'], /nonexistent/], [2, ['--cache-disk', '/tmp', '--cache-ram', '0'], /cache-ram/]]) {
    const r = await run(['serve', '--model', MODEL, '--port', '0', ...args]);
    assert.equal(r.code, code);
    assert.match(r.stderr + r.stdout, want);
  }
});

test('--prefix: there before anybody has asked, in every key space', async (t) => {
  const file = path.join(tempDir(t), 'prefix.txt');
  fs.writeFileSync(file, PREFIX);
  await withServer(['--prefix', file], async (s) => {
    const c = await s.connect();
    for (const extra of [{}, { cache_salt: 'tenant' }]) {
      const r = await c.infer(`${PREFIX}The dog`, params, extra).done();
      assert.ok(r.end.stats.cached_tokens > r.end.stats.prompt_tokens - 12, JSON.stringify(r.end.stats));
    }
    await c.close();
  });
  for (const [name, text, want] of [['none.txt', null, /none\.txt/], ['empty.txt', '', /1 to/], ['long.txt', PREFIX.repeat(200), /longer/]]) {
    const bad = path.join(path.dirname(file), name);
    if (text !== null) fs.writeFileSync(bad, text);
    const r = await run(['serve', '--model', MODEL, '--port', '0', '--prefix', bad]);
    assert.notEqual(r.code, 0);
    assert.match(r.stderr + r.stdout, want);
  }
});

test('a client has its own bound of the queue, and is told when to try again', () =>
  withServer(['--parallel', '1', '--queue-max-per-client', '2'], async (s) => {
    const [a, b] = [await s.connect(), await s.connect()];
    const running = a.infer('a', { ...ENDLESS, max_tokens: 400 });
    await until(() => running.tokens.length, 'the first token');
    const waiting = [a.infer('b', params), a.infer('c', params)];
    await until(async () => (await s.metrics()).ic_text_requests_waiting === 2, 'two to wait');
    const e = await a.infer('d', params).refused();
    assert.equal(e.code, 'busy');
    assert.match(e.message, /try again in about \d+ s/);
    const other = b.infer('e', params); // has a bound of its own
    a.send({ op: 'abort', id: running.id });
    await Promise.all([...waiting, other].map((r) => r.done()));
    await Promise.all([a.close(), b.close()]);
  }));

test('a full context goes on where the operator wants it', () =>
  withServer(['--context-shift', '1', '--ctx-size', '64'], async (s) => {
    const c = await s.connect();
    const r = await c.infer('Once', { ...ENDLESS, max_tokens: 200 }).done();
    assert.equal(r.end.reason, 'length');
    assert.equal(r.end.stats.tokens, 200);
    await c.close();
  }));

test('a text that repeats itself is guessed ahead, and says what it says without', async () => {
  const line = 'The cat sat on the mat, and so it goes. ', said = [];
  const song = { ...GREEDY, max_tokens: 240, logprobs: 2, grammar: `root ::= "${line}" root` };
  for (const on of ['1', '0'])
    await withServer(['--speculate', on], async (s) => {
      const c = await s.connect();
      for (const p of [song, { ...song, temperature: 0.7, seed: 5 }, { ...song, grammar: undefined, seed: 6 }]) said.push(await c.infer('Sing', p).done());
      const m = await s.metrics();
      if (on === '1') {
        assert.ok(m.ic_text_accepted_tokens_total > 0 && m.ic_text_accepted_tokens_total <= m.ic_text_drafted_tokens_total, JSON.stringify(m));
        assert.ok(m.ic_text_decodes_total < m.ic_text_tokens_total);
      } else {
        assert.equal(m.ic_text_drafted_tokens_total, 0);
      }
      await c.close();
    });
  for (const s of said.filter((_, i) => i % 3 < 2)) assert.ok(line.repeat(99).startsWith(s.text) && s.tokens.length > 100, s.text);
  same(said[2], said[5]); // the two above may be cut into other tokens: a sampled one turns wherever its number falls between two
});
