// The greedy text of llama.cpp's own tool, word for word. tests/golden-text/*.json say how they were made.
import test from 'node:test';
import assert from 'node:assert/strict';
import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { BIN, MODEL, Server } from './lib.mjs';

const root = path.join(path.dirname(fileURLToPath(import.meta.url)), '../..');
const name = process.env.IC_GOLDEN ?? 'stories260k';
const golden = JSON.parse(fs.readFileSync(path.join(root, 'tests/golden-text', `${name}.json`), 'utf8'));
const model = name === 'stories260k' ? MODEL : process.env.IC_TEST_MODEL || path.join(root, '.models/tinyllama-1.1b-chat-iq2_xxs.gguf');
if (!fs.existsSync(model)) {
  console.log(`WIRE_SKIPPED: the model ${model} is missing (make model)`);
  process.exit(0);
}
assert.ok(BIN);
const avx512 = / avx512f /.test(fs.readFileSync('/proc/cpuinfo', 'utf8')); // ggml picks its kernels by it, and these round each in its way
const text = (g) => (avx512 ? g.text : (g.text_avx2 ?? g.text));
const server = await Server.start([], { model });
const c = await server.connect();

const ask = (g) => c.infer(g.messages ?? g.prompt, { temp: 0, max_tokens: g.max_tokens });

for (const g of golden.answers)
  test(`${JSON.stringify(g.messages ?? g.prompt)}`, async () => {
    const s = await ask(g).done();
    assert.equal(s.text, text(g));
    assert.equal(s.end.reason, g.ended ? 'stop' : 'length');
  });

if (name === 'stories260k')
  test('all of them at once', async () => {
    const all = await Promise.all(golden.answers.map((g) => ask(g).done()));
    assert.deepEqual(all.map((s) => s.text), golden.answers.map(text));
  });

test('the server has survived', () => server.stop());
