// --draft: a second model that guesses ahead. The model served here is the 1 MB one with layers on top that add nothing,
// made byte by byte: it says what the small one says and takes several times as long, so its draft is right and cheap.
import test, { after } from 'node:test';
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { T_U32, parse, u32, write } from './gguflib.mjs';
import { ENDLESS, GREEDY, MODEL, run, same, tempDir, until, withServer } from './lib.mjs';

const IDLE_LAYERS = 35;
const [EXIT_USAGE, EXIT_FILE] = [2, 4];

/** The same model with layers of zeros behind its own: what goes in comes out. */
function deeper(file, more) {
  const g = parse(MODEL);
  const count = g.keys.find((k) => k.key === 'llama.block_count');
  const layers = count.value.readUInt32LE();
  assert.equal(count.type, T_U32);
  count.value = u32(layers + more);
  for (let i = 0; i < more; i++)
    for (const t of g.tensors.filter((x) => x.name.startsWith('blk.0.')))
      g.tensors.push({ ...t, name: t.name.replace('blk.0.', `blk.${layers + i}.`), data: Buffer.alloc(t.bytes) });
  return write(file, g);
}

const dir = fs.mkdtempSync(path.join(os.tmpdir(), 'ic-draft-'));
const DEEP = deeper(path.join(dir, 'deep.gguf'), IDLE_LAYERS);
after(() => fs.rmSync(dir, { recursive: true, force: true }));

const PROMPTS = [
  'Once upon a time',
  'Tom and Sam are friends. They like to',
  'The little girl named Lily went to the park.',
  'One day, a cat',
];
const params = { ...GREEDY, max_tokens: 160, logprobs: 2 };
const with_ = (args, fn, options = {}) =>
  withServer(['--ctx-size', '512', '--idle-unload', '0', ...args], fn, { model: DEEP, ...options });
const DRAFT = ['--draft', MODEL];

async function answers(s, p = params) {
  const c = await s.connect();
  const said = [];
  for (const prompt of PROMPTS) said.push(await c.infer(prompt, p).done()); // one by one, then all at once
  said.push(...(await Promise.all(PROMPTS.map((prompt) => c.infer(prompt, p).done()))));
  await c.close();
  return said;
}

const guesses = async (s) => {
  const m = await s.metrics();
  const [drafted, accepted] = [m.ic_text_drafted_tokens_total, m.ic_text_accepted_tokens_total];
  assert.ok(accepted <= drafted, `${accepted} of ${drafted}`);
  return { drafted, accepted, decodes: m.ic_text_decodes_total, tokens: m.ic_text_tokens_total };
};

test('it says the same with a draft, in fewer decodes', async () => {
  let want;
  await with_([], async (s) => {
    want = await answers(s);
    assert.equal((await guesses(s)).drafted, 0);
  });
  for (const args of [[], ['--speculate', '1']])
    await with_([...DRAFT, ...args], async (s) => {
      const got = await answers(s);
      got.forEach((a, i) => same(a, want[i]));
      const g = await guesses(s);
      // How many is for the machine to say; with --speculate some are looked up in the prompt, of which fewer are right.
      assert.ok(g.accepted > 0 && g.accepted > g.drafted / (args.length ? 5 : 2), JSON.stringify({ args, ...g }));
      assert.equal(s.log.filter((l) => /draft model stories260K/.test(l)).length, 1);
    });
});

test('temperature, grammars and stop strings go through it', () =>
  with_(DRAFT, async (s) => {
    const c = await s.connect();
    const song = { max_tokens: 120, temp: 0.7, seed: 5, grammar: 'root ::= "The cat sat on the mat, and so it goes. " root' };
    const text = await c.text('Sing', song);
    assert.ok('The cat sat on the mat, and so it goes. '.repeat(20).startsWith(text) && text.length > 60, text);
    const cut = await c.infer('Sing', { ...song, stop: ['it goes. The cat sat on the m'] }).done();
    assert.equal(cut.end.reason, 'stop');
    assert.equal(cut.text, 'The cat sat on the mat, and so ');
    for (const max_tokens of [1, 2, 3, 7])
      assert.equal((await c.infer(PROMPTS[0], { ...GREEDY, max_tokens }).done()).end.stats.tokens, max_tokens);
    await c.close();
  }));

test('an abort amid guesses is an abort, and the others go on', () =>
  with_(DRAFT, async (s) => {
    const c = await s.connect();
    const want = await c.infer(PROMPTS[1], params).done();
    for (let i = 0; i < 4; i++) {
      const long = { ...GREEDY, max_tokens: 400 };
      const hit = [c.infer(PROMPTS[0], long), c.infer('A', ENDLESS), c.infer(PROMPTS[2], long)];
      const other = i < 2 ? c.infer(PROMPTS[1], params) : null;
      await Promise.all(hit.map((r) => r.first()));
      await until(() => hit[0].tokens.length > 5 * i + 1 || hit[0].end, 'some tokens');
      hit.forEach((r) => c.send({ op: 'abort', id: r.id }));
      for (const r of hit) assert.match((await r.finished()).reason, /abort|stop|length/);
      if (other) same(await other.done(), want);
    }
    await s.idle();
    assert.ok((await guesses(s)).accepted > 0);
    await c.close();
  }));

test('a draft that fails is gone, and nobody notices', () =>
  with_(DRAFT, async (s) => {
    const said = await answers(s, { ...params, max_tokens: 60 });
    for (const a of said) assert.match(a.end.reason, /length|stop/);
    const { drafted } = await guesses(s);
    await answers(s, { ...params, max_tokens: 60 });
    assert.equal((await guesses(s)).drafted, drafted);
    assert.equal(s.log.filter((l) => /the draft model failed/.test(l)).length, 1);
  }, { env: { IC_FAULT: 'draft-fail:9' } }));

test('it goes and comes back with the model; where it does not, the model comes alone', async (t) => {
  const file = path.join(tempDir(t), 'small.gguf');
  fs.copyFileSync(MODEL, file);
  await with_(['--draft', file, '--idle-unload', '1'], async (s) => {
    const count = async () => (await s.metrics())['ic_engine_unloaded_total{engine="text"}'];
    const unloaded = (n) => until(async () => (await count()) === n, 'the model to be unloaded');
    const first = await answers(s);
    await unloaded(1);
    const before = await guesses(s);
    (await answers(s)).forEach((a, i) => same(a, first[i]));
    const then = await guesses(s);
    assert.ok(then.accepted > before.accepted, `${JSON.stringify(before)} ${JSON.stringify(then)}`);
    await unloaded(2);
    fs.unlinkSync(file);
    (await answers(s)).forEach((a, i) => same(a, first[i]));
    assert.equal((await guesses(s)).drafted, then.drafted);
    assert.equal(s.log.filter((l) => /goes on without the draft model: draft model .*small\.gguf/.test(l)).length, 1);
  });
});

test('an engine that is built anew has its draft again', () =>
  with_([...DRAFT, '--stall-seconds', '1'], async (s) => {
    const c = await s.connect();
    const hit = c.infer(PROMPTS[0], { ...GREEDY, max_tokens: 300 });
    assert.equal((await hit.refused()).code, 'internal');
    const count = async () => (await s.metrics())['ic_engine_rebuilt_total{engine="text"}'];
    await until(async () => (await count()) === 1, 'the engine to be built anew');
    const before = await guesses(s);
    await answers(s);
    assert.ok((await guesses(s)).accepted > before.accepted);
    await c.close();
  }, { env: { IC_FAULT: 'text-hang:30', ASAN_OPTIONS: 'detect_leaks=0' } }));

test('what cannot draft is refused in one line', async () => {
  const other = parse(MODEL);
  other.keys.find((k) => k.key === 'tokenizer.ggml.tokens').value[411] = Buffer.from('changed');
  const changed = write(path.join(dir, 'changed.gguf'), other);
  const broken = path.join(dir, 'broken.gguf');
  fs.writeFileSync(broken, fs.readFileSync(MODEL).subarray(0, 5000));
  for (const [args, code, say] of [
    [['--model', MODEL, '--draft', changed], EXIT_FILE, /draft model changed: another vocabulary .*: its token 411 is "changed"/],
    [['--model', MODEL, '--draft', broken], EXIT_FILE, /draft model .*broken\.gguf/],
    [['--model', MODEL, '--draft', '/nonexistent/d.gguf'], EXIT_FILE, /draft model \/nonexistent\/d\.gguf: No such file/],
    [['--law', 'x', '--draft', MODEL], EXIT_USAGE, /--draft .* needs --model/],
  ]) {
    const r = await run(['serve', '--port', '0', '--threads', '1', ...args]);
    assert.equal(r.code, code, r.stderr);
    assert.match(r.stderr, say);
    assert.equal(r.stderr.split('\n').filter((l) => l.startsWith('inference-core: ')).length, 1, r.stderr);
  }
});

test('plan shows both, the draft first', async () => {
  const r = await run(['plan', '--model', DEEP, ...DRAFT, '--vram', '1GiB']);
  assert.equal(r.code, 0, r.stderr);
  const models = r.stdout.match(/^(draft )?model: llama, \d+ layers/gm);
  assert.deepEqual(models, ['draft model: llama, 5 layers', `model: llama, ${5 + IDLE_LAYERS} layers`]);
  assert.match(r.stdout, /held by others/); // of the card that is assumed
});
