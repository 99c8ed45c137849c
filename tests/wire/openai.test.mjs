// OpenAI's formats through OpenAI's own client.
import test from 'node:test';
import assert from 'node:assert/strict';
import { alike, ENDLESS, Server, until, within } from './lib.mjs';

const OpenAI = await import('openai').then(
  (m) => m.default,
  () => {
    console.log('WIRE_SKIPPED: the npm package openai is missing (npm ci --prefix tests)');
    process.exit(0);
  },
);
const server = await Server.start(['--chat-template', 'chatml', '--ctx-size', '8192']);
const client = new OpenAI({ baseURL: `http://127.0.0.1:${server.port}/v1`, apiKey: 'any', maxRetries: 0, timeout: 600_000 });
const model = 'whatever';
const messages = [{ role: 'user', content: 'Tell me a story about a dog.' }];
const PROMPT = 'Once upon a time';
const chat = (more) => client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 40, ...more });
const complete = (more) => client.completions.create({ model, prompt: PROMPT, temperature: 0, max_tokens: 40, ...more });
const say = async (more) => (await chat(more)).choices[0].message.content;
async function all(stream) {
  const chunks = [];
  for await (const c of await stream) chunks.push(c);
  return chunks;
}
const textOf = (chunks) => chunks.map((c) => c.choices[0]?.delta?.content ?? c.choices[0]?.text ?? '').join('');
const valid = (s) => assert.ok(!s.includes('\ufffd') && s.isWellFormed?.() !== false, `broken characters in ${JSON.stringify(s)}`);

// What of a prompt was there already depends on who asked before.
const counts = ({ prompt_tokens_details, ...rest }) => rest;

test('a chat answer has the documented shape', async () => {
  const before = Math.floor(Date.now() / 1000);
  const r = await chat();
  assert.match(r.id, /^chatcmpl-\d+$/);
  assert.equal(r.object, 'chat.completion');
  assert.equal(r.model, 'stories260K-f32');
  assert.ok(r.created >= before && r.created <= Date.now() / 1000);
  assert.equal(r.choices.length, 1);
  const [c] = r.choices;
  assert.deepEqual(Object.keys(c), ['index', 'message', 'logprobs', 'finish_reason']);
  assert.equal(c.index, 0);
  assert.deepEqual(c.message, { role: 'assistant', content: c.message.content });
  assert.ok(c.message.content.length > 0);
  assert.equal(c.logprobs, null);
  assert.equal(c.finish_reason, 'length');
  assert.equal(r.usage.completion_tokens, 40);
  assert.equal(r.usage.total_tokens, r.usage.prompt_tokens + 40);
  assert.ok(r.usage.prompt_tokens > 10);
  const cached = r.usage.prompt_tokens_details.cached_tokens; // somebody may have begun alike
  assert.ok(0 <= cached && cached < r.usage.prompt_tokens);
});

test('streamed, the same answer comes in pieces', async () => {
  const whole = await chat();
  const chunks = await all(chat({ stream: true }));
  assert.equal(textOf(chunks), whole.choices[0].message.content);
  assert.equal(new Set(chunks.map((c) => c.id)).size, 1);
  assert.ok(chunks.every((c) => c.object === 'chat.completion.chunk' && c.model === 'stories260K-f32' && c.choices.length === 1));
  assert.ok(chunks.every((c) => !('usage' in c)), 'usage only when asked for');
  assert.equal(chunks[0].choices[0].delta.role, 'assistant');
  assert.ok(chunks.slice(1).every((c) => !('role' in c.choices[0].delta)));
  assert.ok(chunks.slice(0, -1).every((c) => c.choices[0].finish_reason === null));
  assert.deepEqual(chunks.at(-1).choices[0], { index: 0, delta: {}, finish_reason: 'length' });
});

test("OpenAI's own gathering of a stream understands it", async () => {
  const stream = client.chat.completions.stream({ model, messages, temperature: 0, max_tokens: 30, stream_options: { include_usage: true } });
  const final = await stream.finalChatCompletion();
  assert.equal(final.choices[0].message.content, await say({ max_tokens: 30 }));
  assert.equal(final.choices[0].finish_reason, 'length');
  assert.equal(final.usage.completion_tokens, 30);
});

test('include_usage adds one last chunk without choices', async () => {
  const whole = await chat();
  const chunks = await all(chat({ stream: true, stream_options: { include_usage: true } }));
  assert.deepEqual(chunks.at(-1).choices, []);
  assert.deepEqual(chunks.at(-1).usage, whole.usage);
  assert.equal(chunks.at(-2).choices[0].finish_reason, 'length');
  const off = await all(chat({ stream: true, stream_options: { include_usage: false } }));
  assert.ok(off.every((c) => c.choices.length === 1));
});

test('completions, whole and streamed', async () => {
  const r = await complete();
  assert.match(r.id, /^cmpl-\d+$/);
  assert.equal(r.object, 'text_completion');
  assert.deepEqual(Object.keys(r.choices[0]), ['index', 'text', 'logprobs', 'finish_reason']);
  assert.ok(r.choices[0].text.length > 0);
  const chunks = await all(complete({ stream: true, stream_options: { include_usage: true } }));
  assert.equal(textOf(chunks), r.choices[0].text);
  assert.ok(chunks.every((c) => c.object === 'text_completion'));
  assert.deepEqual(chunks.at(-2).choices[0], { index: 0, text: '', finish_reason: 'length' });
  assert.deepEqual(counts(chunks.at(-1).usage), counts(r.usage));
  assert.equal((await complete({ prompt: [PROMPT] })).choices[0].text, r.choices[0].text, 'a list of one prompt');
  const c = await server.connect();
  assert.equal(await c.text(PROMPT, { temp: 0, max_tokens: 40 }), r.choices[0].text, 'over WebSocket the same');
  await c.close();
});

test('completions default to 16 tokens, chat to the context', async () => {
  const { max_tokens: _, ...open } = { model, prompt: PROMPT, temperature: 0, max_tokens: 0 };
  assert.equal((await client.completions.create(open)).usage.completion_tokens, 16);
  assert.equal((await client.completions.create({ ...open, max_tokens: null })).usage.completion_tokens, 16, 'null is the same as nothing');
  const r = await client.chat.completions.create({ model, messages, temperature: 0, grammar: 'root ::= "a"{30}' });
  assert.equal(r.choices[0].message.content, 'a'.repeat(30));
  assert.equal(r.choices[0].finish_reason, 'stop');
});

test('models.list tells what is loaded', async () => {
  const list = await client.models.list();
  assert.equal(list.data.length, 1);
  const [m] = list.data;
  assert.equal(m.id, 'stories260K-f32');
  assert.equal(m.object, 'model');
  assert.equal(m.owned_by, 'inference-core');
  assert.equal(m.meta.n_ctx, 8192);
  assert.equal(m.meta.n_vocab, 512);
});

test('models.retrieve: the one there is, under its name', async () => {
  const { data } = await client.models.list();
  assert.deepEqual(await client.models.retrieve(data[0].id), data[0]);
  for (const name of ['gpt-4', 'x/y', data[0].id + 'x', data[0].id.slice(1)])
    await assert.rejects(client.models.retrieve(name), (e) => e.status === 404 && e.code === 'not_found');
});

test('max_tokens, and max_completion_tokens which goes before it', async () => {
  for (const n of [1, 2, 9]) assert.equal((await chat({ max_tokens: n })).usage.completion_tokens, n);
  assert.equal((await chat({ max_tokens: 30, max_completion_tokens: 7 })).usage.completion_tokens, 7);
  assert.equal((await chat({ max_tokens: undefined, max_completion_tokens: 7 })).usage.completion_tokens, 7);
  assert.equal((await chat({ max_tokens: 5, max_completion_tokens: null })).usage.completion_tokens, 5);
  const none = await chat({ max_tokens: 0 });
  assert.equal(none.choices[0].message.content, '');
  const chunks = await all(chat({ max_tokens: 0, stream: true }));
  assert.deepEqual(chunks.map((c) => c.choices[0]), [
    { index: 0, delta: { role: 'assistant', content: '' }, finish_reason: null },
    { index: 0, delta: {}, finish_reason: 'length' },
  ]);
});

test('the same seed says the same, other seeds other things', async () => {
  const hot = (seed) => say({ seed, temperature: 1 });
  const first = await hot(11);
  assert.equal(await hot(11), first);
  assert.equal(textOf(await all(chat({ seed: 11, temperature: 1, stream: true }))), first);
  assert.equal(new Set([first, ...(await Promise.all([12, 13, 14].map(hot)))]).size, 4);
});

test('stop: a string or a list; the answer ends before it', async () => {
  const text = await say({ max_tokens: 60 });
  const stop = text.slice(12, 15);
  const cut = text.slice(0, text.indexOf(stop));
  for (const s of [stop, [stop], ['never said', stop]]) {
    const r = await chat({ max_tokens: 60, stop: s });
    assert.equal(r.choices[0].message.content, cut);
    assert.equal(r.choices[0].finish_reason, 'stop');
    const chunks = await all(chat({ max_tokens: 60, stop: s, stream: true }));
    assert.equal(textOf(chunks), cut);
    assert.equal(chunks.at(-1).choices[0].finish_reason, 'stop');
  }
  assert.equal(await say({ max_tokens: 60, stop: null }), text);
});

test("chat's logprobs", async () => {
  const r = await chat({ logprobs: true, top_logprobs: 3, max_tokens: 12 });
  const { content } = r.choices[0].logprobs;
  assert.equal(content.length, 12);
  assert.equal(content.map((e) => e.token).join(''), r.choices[0].message.content);
  for (const e of content) {
    assert.deepEqual(Object.keys(e), ['token', 'logprob', 'bytes', 'top_logprobs']);
    assert.equal(Buffer.from(e.bytes).toString(), e.token);
    assert.equal(e.top_logprobs.length, 3);
    assert.ok(e.top_logprobs[0].logprob >= e.top_logprobs[1].logprob && e.top_logprobs[1].logprob >= e.top_logprobs[2].logprob);
    assert.equal(e.top_logprobs[0].token, e.token, 'greedy: the most probable one');
    assert.ok(Math.abs(e.top_logprobs[0].logprob - e.logprob) < 1e-4);
    assert.ok(e.top_logprobs.reduce((sum, t) => sum + Math.exp(t.logprob), 0) <= 1 + 1e-5);
    for (const t of e.top_logprobs) assert.deepEqual(Object.keys(t), ['token', 'logprob', 'bytes']);
  }
  const chunks = await all(chat({ logprobs: true, top_logprobs: 3, max_tokens: 12, stream: true }));
  alike(chunks.flatMap((c) => c.choices[0].logprobs?.content ?? []), content);
  const gathered = client.chat.completions.stream({ model, messages, temperature: 0, logprobs: true, top_logprobs: 3, max_tokens: 12 });
  alike((await gathered.finalChatCompletion()).choices[0].logprobs.content, content, "OpenAI's own gathering");
  const bare = await chat({ logprobs: true, max_tokens: 4 });
  alike(bare.choices[0].logprobs.content.map((e) => [e.logprob, e.top_logprobs]), content.slice(0, 4).map((e) => [e.logprob, []]));
  assert.equal((await chat({ logprobs: false, max_tokens: 4 })).choices[0].logprobs, null);
});

test("completions' logprobs are four lists side by side", async () => {
  const r = await complete({ logprobs: 2, max_tokens: 12 });
  const l = r.choices[0].logprobs;
  assert.deepEqual(Object.keys(l), ['tokens', 'token_logprobs', 'top_logprobs', 'text_offset']);
  assert.equal(l.tokens.join(''), r.choices[0].text);
  assert.equal(l.tokens.length, 12);
  l.tokens.forEach((t, i) => {
    assert.equal(l.text_offset[i], l.tokens.slice(0, i).join('').length);
    assert.equal(Object.keys(l.top_logprobs[i]).length, 2);
    assert.ok(Math.abs(l.top_logprobs[i][t] - l.token_logprobs[i]) < 1e-4);
  });
  const chunks = await all(complete({ logprobs: 2, max_tokens: 12, stream: true }));
  for (const k of Object.keys(l)) alike(chunks.flatMap((c) => c.choices[0].logprobs?.[k] ?? []), l[k], k);
  const bare = (await complete({ logprobs: 0, max_tokens: 12 })).choices[0].logprobs;
  alike(bare, { ...l, top_logprobs: l.tokens.map(() => ({})) }, '0: the chosen one only');
});

test('characters of many bytes come whole, and count as one', async () => {
  const grammar = 'root ::= "ä€😀𝄞" [あ-ん]{3} "é\\n\\"\\\\"';
  const r = await complete({ grammar, logprobs: 1, max_tokens: 200 });
  const { text, logprobs: l } = r.choices[0];
  assert.match(text, /^ä€😀𝄞[あ-ん]{3}é\n"\\$/u);
  assert.equal(r.choices[0].finish_reason, 'stop');
  assert.equal(l.tokens.join(''), text);
  l.tokens.forEach((t, i) => assert.equal(l.text_offset[i], [...l.tokens.slice(0, i).join('')].length, 'offsets are characters'));
  const chunks = await all(complete({ grammar, max_tokens: 200, stream: true }));
  chunks.forEach((c) => valid(c.choices[0].text));
  assert.equal(textOf(chunks), text);
  for (const e of (await chat({ grammar, logprobs: true, max_tokens: 200 })).choices[0].logprobs.content) {
    assert.equal(Buffer.from(e.bytes).toString(), e.token);
    assert.ok(Number.isFinite(e.logprob), 'however improbable: a number');
  }
  // cut in the middle of a character: what is there of it becomes U+FFFD, not broken UTF-8
  const cut = await complete({ grammar: 'root ::= "😀"', max_tokens: 2 });
  assert.equal(cut.choices[0].finish_reason, 'length');
  assert.match(cut.choices[0].text, /^\ufffd+$/);
});

const SCHEMA = {
  type: 'object',
  properties: { name: { type: 'string', maxLength: 8 }, age: { type: 'integer', minimum: 0, maximum: 120 }, tags: { type: 'array', items: { enum: ['a', 'ß'] }, minItems: 1, maxItems: 3 } },
  required: ['name', 'age', 'tags'],
  additionalProperties: false,
};
const FORMAT = { type: 'json_schema', json_schema: { name: 'person', strict: true, schema: SCHEMA } };

test('response_format json_schema: what comes obeys it', async () => {
  for (const seed of [1, 2, 3]) {
    const more = { response_format: FORMAT, seed, temperature: 1, max_tokens: undefined };
    const text = await say(more);
    const o = JSON.parse(text);
    assert.deepEqual(Object.keys(o), ['name', 'age', 'tags']);
    assert.ok(typeof o.name === 'string' && [...o.name].length <= 8);
    assert.ok(Number.isInteger(o.age) && o.age >= 0 && o.age <= 120);
    assert.ok(o.tags.length >= 1 && o.tags.length <= 3 && o.tags.every((t) => t === 'a' || t === 'ß'));
    assert.equal(textOf(await all(chat({ ...more, stream: true }))), text);
  }
  const parsed = await client.chat.completions.parse({ model, messages, seed: 1, response_format: FORMAT });
  assert.deepEqual(Object.keys(JSON.parse(parsed.choices[0].message.content)), ['name', 'age', 'tags']);
});

test('response_format json_object parses, text changes nothing', async () => {
  let complete = 0;
  for (const seed of [1, 2, 3, 4, 5]) {
    const r = await chat({ response_format: { type: 'json_object' }, seed, temperature: 0.7, max_tokens: 3000 });
    if (r.choices[0].finish_reason !== 'stop') continue; // cut by max_tokens: this model may go on for long
    const o = JSON.parse(r.choices[0].message.content);
    assert.ok(o && typeof o === 'object' && !Array.isArray(o));
    complete++;
  }
  assert.ok(complete > 0, 'one of five comes to its end');
  assert.equal(await say({ response_format: { type: 'text' } }), await say());
  assert.equal(await say({ response_format: null }), await say());
});

test('response_format may carry its schema beside the type, as clients of llama-server write it', async () => {
  for (const type of ['json_object', 'json_schema']) {
    assert.equal(await say({ response_format: { type, schema: { const: '42' } } }), '"42"');
    await assert.rejects(say({ response_format: { type, schema: 123 } }), { status: 400 });
  }
});

test("fields beyond OpenAI's: top_k, min_p, grammar, json_schema, repeat_penalty", async () => {
  const greedy = await say();
  assert.equal(await say({ temperature: 1, seed: 5, top_k: 1 }), greedy);
  assert.equal(await say({ temperature: 1, seed: 5, min_p: 1, top_k: 0, top_p: 1 }), greedy);
  assert.notEqual(await say({ repeat_penalty: 5, max_tokens: 60 }), await say({ max_tokens: 60 }));
  assert.equal(await say({ grammar: 'root ::= "yes"' }), 'yes');
  assert.equal(JSON.parse(await say({ json_schema: { const: 'ö' } })), 'ö');
});

test('content may be a list of parts; roles', async () => {
  const one = [{ role: 'system', content: 'Be brief. Be kind.' }, { role: 'user', content: 'A dog and a cat' }];
  const parts = [
    { role: 'developer', content: [{ type: 'text', text: 'Be brief. ' }, { type: 'text', text: 'Be kind.' }] },
    { role: 'user', content: [{ type: 'text', text: 'A dog ' }, { type: 'text', text: 'and a cat' }] },
  ];
  const a = await chat({ messages: one });
  const b = await chat({ messages: parts });
  assert.equal(b.choices[0].message.content, a.choices[0].message.content);
  assert.deepEqual(counts(b.usage), counts(a.usage));
  const long = await chat({ messages: [...one, { role: 'assistant', content: 'Woof' }, { role: 'tool', content: '5', tool_call_id: 'x' }, { role: 'user', content: 'More' }] });
  assert.ok(long.usage.prompt_tokens > a.usage.prompt_tokens);
  const none = await chat({ messages: [{ role: 'user', content: [] }] });
  assert.ok(none.usage.prompt_tokens > 0, 'the template alone');
});

test('what the client adds without meaning for us is taken', async () => {
  const plain = await say();
  const more = { user: 'me', metadata: { a: 'b' }, store: false, n: 1, tools: [], tool_choice: 'none', logit_bias: {}, service_tier: 'auto', parallel_tool_calls: true, functions: [] };
  assert.equal(await say(more), plain);
  assert.equal((await complete({ echo: false, best_of: 1, suffix: null })).choices[0].text, (await complete()).choices[0].text);
});

async function refused(promise, kind, status, code) {
  const e = await promise.then((r) => assert.fail(`not refused: ${JSON.stringify(r).slice(0, 200)}`), (x) => x);
  assert.ok(e instanceof kind, `${kind.name}, not ${e.constructor.name}: ${e.message}`);
  assert.equal(e.status, status);
  assert.equal(e.code, code);
  assert.equal(e.param, null);
  assert.equal(e.type, status < 500 ? 'invalid_request_error' : 'server_error');
  assert.ok(e.error.message.length > 0);
  return e;
}

test('errors are those that the client knows', async () => {
  const bad = (more) => refused(chat(more), OpenAI.BadRequestError, 400, 'bad_request');
  await bad({ n: 2 });
  await bad({ messages: [] });
  await bad({ messages: [{ role: 'nobody', content: 'x' }] });
  await bad({ tools: [{ type: 'function', function: { name: 'f', parameters: {} } }] });
  await bad({ stream: true, n: 2 });
  await bad({ grammar: 'root ::= nonsense(' });
  await bad({ stream: true, grammar: 'root ::= nonsense(' }); // found out by the engine: still a status, not an event
  await refused(complete({ echo: true }), OpenAI.BadRequestError, 400, 'bad_request');
  await refused(complete({ prompt: 'dog '.repeat(9000) }), OpenAI.APIError, 413, 'too_large');
  await refused(client.embeddings.create({ model, input: 'x' }), OpenAI.BadRequestError, 400, 'bad_request'); // without --pooling
});

test('aborted by the client, a request ends in the server', async () => {
  const ended = async () => (await server.metrics())['ic_text_requests_ended_total{reason="abort"}'];
  const running = async () => (await server.metrics()).ic_text_requests_running;
  const before = await ended();
  const endless = { ...ENDLESS, temperature: 1, max_tokens: -1 };
  const stop = new AbortController();
  const stream = await client.chat.completions.create({ model, messages, stream: true, ...endless }, { signal: stop.signal });
  let n = 0;
  for await (const _ of stream) if (++n === 5) stop.abort(); // the client ends the loop quietly
  assert.ok(n >= 5);
  await server.idle();
  assert.equal(await ended(), before + 1);

  const whole = new AbortController();
  const answer = client.chat.completions.create({ model, messages, ...endless }, { signal: whole.signal });
  answer.catch(() => {});
  await until(async () => (await running()) === 1, 'the request to run');
  whole.abort();
  await assert.rejects(within(answer, 'the aborted call'), OpenAI.APIUserAbortError);
  await server.idle();
  assert.equal(await ended(), before + 2);

  // Leaving the loop is an abort, too.
  for await (const _ of await client.completions.create({ model, prompt: PROMPT, stream: true, ...endless })) break;
  await server.idle();
  assert.equal(await ended(), before + 3);
});

test('the server has survived', () => server.stop());
