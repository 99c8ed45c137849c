// --lora: adapters over the model, per server. They are made here, GGUF byte by byte, for the 1 MB model (5 layers, 64
// numbers wide).
import test from 'node:test';
import assert from 'node:assert/strict';
import fs from 'node:fs';
import path from 'node:path';
import { MODEL, run, tempDir, until, withServer } from './lib.mjs';

const PROMPT = 'Once upon a time';
const RANK = 4;
const WIDTH = 64;
const LAYERS = 5;
const ALIGN = 32;
const [T_F32, T_STRING] = [6, 8];
const EXIT_USAGE = 2;
const EXIT_FILE = 4;

const u32 = (v) => Buffer.from(Uint32Array.of(v).buffer);
const u64 = (v) => Buffer.from(BigUint64Array.of(BigInt(v)).buffer);
const str = (s) => Buffer.concat([u64(Buffer.byteLength(s)), Buffer.from(s)]);
const f32 = (v) => Buffer.from(Float32Array.of(v).buffer);

/** Numbers that are the same each time. */
function numbers(n, size) {
  let x = 7;
  return Float32Array.from({ length: n }, () => {
    x = (Math.imul(x, 1664525) + 1013904223) >>> 0;
    return size * (x / 2 ** 32 - 0.5);
  });
}

/** b: the size of B's numbers. */
function adapter(file, { arch = 'llama', b = 0.5 } = {}) {
  const keys = [
    ['general.architecture', T_STRING, str(arch)],
    ['general.type', T_STRING, str('adapter')],
    ['adapter.type', T_STRING, str('lora')],
    ['adapter.lora.alpha', T_F32, f32(RANK)],
  ];
  const tensors = Array.from({ length: LAYERS }, (_, i) => [
    { name: `blk.${i}.attn_q.weight.lora_a`, ne: [WIDTH, RANK], data: numbers(WIDTH * RANK, 1) },
    { name: `blk.${i}.attn_q.weight.lora_b`, ne: [RANK, WIDTH], data: numbers(WIDTH * RANK, b) },
  ]).flat();
  const head = [Buffer.from('GGUF'), u32(3), u64(tensors.length), u64(keys.length)];
  for (const [key, type, value] of keys) head.push(str(key), u32(type), value);
  const bytes = WIDTH * RANK * 4; // of each tensor: a multiple of ALIGN
  tensors.forEach((t, i) => head.push(str(t.name), u32(2), u64(t.ne[0]), u64(t.ne[1]), u32(0), u64(i * bytes)));
  const all = Buffer.concat(head);
  const pad = Buffer.alloc((ALIGN - (all.length % ALIGN)) % ALIGN);
  fs.writeFileSync(file, Buffer.concat([all, pad, ...tensors.map((t) => Buffer.from(t.data.buffer))]));
  return file;
}

async function textOf(s) {
  const body = JSON.stringify({ prompt: PROMPT, temperature: 0, max_tokens: 24 });
  const r = await s.http('/v1/completions', { method: 'POST', headers: { 'Content-Type': 'application/json' }, body });
  assert.equal(r.status, 200, r.body);
  return r.json.choices[0].text;
}

async function textWith(args) {
  let text;
  await withServer(args, async (s) => (text = await textOf(s)));
  return text;
}

test('an adapter changes the text; one of zeros, and one at scale 0, do not; two add up', async (t) => {
  const dir = tempDir(t);
  const zero = adapter(path.join(dir, 'zero.gguf'), { b: 0 });
  const some = adapter(path.join(dir, 'some.gguf'));
  const base = await textWith([]);
  const changed = await textWith(['--lora', some]);
  assert.notEqual(changed, base);
  assert.equal(await textWith(['--lora', zero]), base);
  assert.equal(await textWith(['--lora', `${some}:0`]), base);
  assert.equal(await textWith(['--lora', `${some}:1,${some}:-1`]), base);
  assert.equal(await textWith(['--lora', `${zero},${some}`]), changed);
});

test('it is still there when the model has been unloaded and comes back', async (t) => {
  const some = adapter(path.join(tempDir(t), 'some.gguf'));
  await withServer(['--lora', some, '--idle-unload', '1'], async (s) => {
    const before = await textOf(s);
    await until(async () => (await s.metrics())['ic_engine_unloaded_total{engine="text"}'] > 0, 'the model to leave');
    assert.equal(await textOf(s), before);
  });
});

test('what cannot be applied is refused before anything is served, with the exit code of a broken model', async (t) => {
  const dir = tempDir(t);
  const other = adapter(path.join(dir, 'other.gguf'), { arch: 'qwen2' });
  const whole = fs.readFileSync(adapter(path.join(dir, 'whole.gguf')));
  const cut = path.join(dir, 'cut.gguf');
  fs.writeFileSync(cut, whole.subarray(0, whole.length - 100));
  const cases = [
    [other, EXIT_FILE, /adapter .*other\.gguf: made for the architecture qwen2, the model is llama/],
    [cut, EXIT_FILE, /adapter .*cut\.gguf: cut short/],
    [path.join(dir, 'missing.gguf'), EXIT_FILE, /adapter .*missing\.gguf: No such file/],
    [MODEL, EXIT_FILE, /adapter .*: not a LoRA adapter/],
    [`${cut}:nan`, EXIT_USAGE, /--lora: the scale of .*cut\.gguf must be a finite number, not "nan"/],
    [`${cut},`, EXIT_USAGE, /--lora takes FILE\[:SCALE\]/],
    [Array(17).fill('a').join(','), EXIT_USAGE, /--lora: more than 16 adapters/],
  ];
  for (const [lora, code, why] of cases) {
    const r = await run(['serve', '--port', '0', '--model', MODEL, '--threads', '1', '--lora', lora]);
    assert.equal(r.code, code, `${lora} → ${r.stderr}`);
    assert.match(r.stderr.trimEnd().split('\n').at(-1), why);
  }
});

test('plan counts it', async (t) => {
  const some = adapter(path.join(tempDir(t), 'some.gguf'));
  const r = await run(['plan', '--model', MODEL, '--vram', '1GiB', '--lora', some]);
  assert.equal(r.code, 0, r.stderr);
  assert.match(r.stdout, /LoRA adapters, counted with their layers +10\.0 KiB/);
});
