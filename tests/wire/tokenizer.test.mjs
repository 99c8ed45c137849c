// Vocabularies that texts could end the process with. Many cut text by std::regex, which calls itself for each character of a
// word: here the 1 MB model with one of bytes, cut as DeepSeek's, Mistral's and OpenAI's models have it.
import test from 'node:test';
import path from 'node:path';
import assert from 'node:assert/strict';
import { T_ARRAY, T_BOOL, T_STRING, T_U32, parse, u32, write } from './gguflib.mjs';
import { GREEDY, MODEL, tempDir, withServer } from './lib.mjs';

const LONG = 120000;

const string = (s) => Buffer.concat([u32(s.length), u32(0), Buffer.from(s)]);

/** GPT-2's letters for the bytes. */
function letters() {
  const own = (b) => (b > 32 && b < 127) || (b > 160 && b < 173) || b > 173;
  let more = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCodePoint(own(b) ? b : more++));
}

function withBytes(file, pre) {
  const g = parse(MODEL);
  const text = (key, s) => ({ key: `tokenizer.ggml.${key}`, type: T_STRING, value: string(s) });
  const list = (key, value) => ({ key: `tokenizer.ggml.${key}`, type: T_ARRAY, value });
  const tokens = [...letters(), '<|end|>', ...Array.from({ length: 255 }, (_, i) => `<none ${i}>`)];
  const types = tokens.map((_, i) => (i < 256 ? 1 : i === 256 ? 3 : 5)); // normal, control, unused
  g.keys = g.keys.filter((k) => !k.key.startsWith('tokenizer.'));
  g.keys.push(text('model', 'gpt2'), text('pre', pre), list('tokens', tokens.map((t) => Buffer.from(t))), list('merges', []));
  g.keys.push(list('token_type', Buffer.concat([5, types.length, 0, ...types].map(u32)))); // of int32
  g.keys.push({ key: 'tokenizer.ggml.add_bos_token', type: T_BOOL, value: Buffer.of(0) });
  for (const end of ['bos', 'eos']) g.keys.push({ key: `tokenizer.ggml.${end}_token_id`, type: T_U32, value: u32(256) });
  return write(file, g);
}

test('a vocabulary without tokens for bytes: texts of its characters are read, others refused', async (t) => {
  const g = parse(MODEL);
  const tokens = g.keys.find((k) => k.key === 'tokenizer.ggml.tokens');
  tokens.value = tokens.value.map((b, i) => (/^<0x..>$/.test(b.toString()) ? Buffer.from(`<none ${i}>`) : b));
  const model = write(path.join(tempDir(t), 'no-bytes.gguf'), g);
  await withServer([], async (server) => {
    const c = await server.connect();
    const session_id = await c.session();
    const more = { ...GREEDY, max_tokens: 3 };
    assert.notEqual(await c.text('Once upon a time', more, { session_id }), '');
    for (const [text, named] of [['Hi 😀', '😀'], ['漢', '漢'], ['\u0001', ' ']]) {
      const e = await c.infer(text, GREEDY).refused();
      assert.deepEqual([e.code, e.message], ['bad_request', `the model's vocabulary does not know the character ${named}`]);
    }
    assert.equal((await c.infer('漢', GREEDY, { session_id }).refused()).code, 'bad_request');
    assert.notEqual(await c.text(' Then she', more, { session_id }), '');
    assert.equal((await server.http('/tokenize', { method: 'POST', body: '{"content":"漢"}' })).status, 400);
    assert.equal((await server.http('/tokenize', { method: 'POST', body: '{"content":"a cat"}' })).status, 200);
  }, { model });
});

test('a vocabulary of RWKV\'s kind that lacks bytes: what it could not leave again is refused', async (t) => {
  const g = parse(MODEL);
  g.keys.find((k) => k.key === 'tokenizer.ggml.model').value = string('rwkv');
  await withServer([], async (server) => {
    const c = await server.connect();
    assert.notEqual(await c.text('once', { ...GREEDY, max_tokens: 3 }), '');
    assert.equal((await c.infer('\u200b', GREEDY).refused()).code, 'bad_request');
  }, { model: write(path.join(tempDir(t), 'rwkv.gguf'), g) });
});

for (const pre of ['deepseek-llm', 'tekken', 'gpt-4o'])
  test(`a word of ${LONG} letters, blanks or signs is read, a longer one refused: ${pre}`, async (t) => {
    const model = withBytes(path.join(tempDir(t), `${pre}.gguf`), pre);
    await withServer(['--ctx-size', '60000', '--kv-size', '60000'], async (server) => {
      const c = await server.connect();
      const told = async (text) => (await c.infer(text, GREEDY).refused()).message;
      for (const word of ['a', ' ', '7', '=', 'é', '\u3000 ']) {
        const text = word.repeat(LONG / word.length);
        assert.match(await told(text), new RegExp(`^the prompt has ${Buffer.byteLength(text)} tokens`), 'it was read');
      }
      assert.match(await told('a'.repeat(LONG + 20000)), /^a word, or white space, of more than 131072 characters/);
      assert.match(await told('a '.repeat(LONG)), /^the prompt has/);
      const body = JSON.stringify({ content: ' '.repeat(16384) });
      assert.equal((await server.http('/tokenize', { method: 'POST', body })).json.tokens.length, 16384);
    }, { model });
  });
