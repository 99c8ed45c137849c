// Sampling: stop strings, seeds, lengths, penalties, log probabilities, grammars, schemas.
import test from 'node:test';
import assert from 'node:assert/strict';
import { GREEDY, Server } from './lib.mjs';

const server = await Server.start();
const c = await server.connect();
const STORY = 'Once upon a time';
const whole = await c.text(STORY, { ...GREEDY, max_tokens: 120 });

test('temp 0 says the same each time, whatever the seed', async () => {
  for (const seed of [1, 2, 3]) assert.equal(await c.text(STORY, { temp: 0, seed, max_tokens: 120 }), whole);
  assert.equal(await c.text(STORY, { temperature: 0, max_tokens: 120 }), whole, 'temperature is another name of temp');
});

test('the same seed says the same, other seeds say other things', async () => {
  // Short: seed 4's text hangs on a near tie behind its 50th token, which goes by the order of the cells that others leave.
  const say = (seed) => c.text(STORY, { temp: 1, seed, max_tokens: 40 });
  const first = await say(7);
  assert.equal(await say(7), first);
  const others = await Promise.all([1, 2, 3, 4].map(say));
  assert.equal(new Set([first, ...others]).size, 5);
  assert.deepEqual(await Promise.all([1, 2, 3, 4].map(say)), others, 'at once or one by one');
  assert.notEqual(await c.text(STORY, { temp: 1, max_tokens: 60 }), await c.text(STORY, { temp: 1, max_tokens: 60 }), 'no seed: a random one');
});

test('seeds that differ in their upper half only differ too', async () => {
  const say = (seed) => c.text(STORY, { temp: 1, seed, max_tokens: 60 });
  assert.notEqual(await say(5), await say(5 + 2 ** 40));
});

test('top_k 1 and a tiny top_p are greedy', async () => {
  const greedy = await c.text(STORY, { ...GREEDY, max_tokens: 50 });
  for (const p of [{ top_k: 1 }, { top_p: 0 }, { top_p: 1e-6, top_k: 0 }, { min_p: 1, top_k: 0, top_p: 1 }])
    assert.equal(await c.text(STORY, { temp: 1, seed: 3, max_tokens: 50, ...p }), greedy, JSON.stringify(p));
});

test('max_tokens is obeyed', async () => {
  for (const n of [1, 2, 17, 100]) {
    const s = await c.infer(STORY, { ...GREEDY, max_tokens: n }).done();
    assert.equal(s.end.reason, 'length');
    assert.equal(s.end.stats.tokens, n);
    assert.ok(n > 100 || whole.startsWith(s.text));
  }
  const none = await c.infer(STORY, { ...GREEDY, max_tokens: 0 }).done();
  assert.equal(none.text, '');
  assert.equal(none.end.stats.tokens, 0);
  assert.equal(none.end.reason, 'length');
});

test('without max_tokens an answer ends with the context at the latest', async () => {
  const s = await c.infer(STORY, { temp: 0, grammar: 'root ::= [a-z] root' }).done();
  assert.equal(s.end.reason, 'length');
  assert.equal(s.end.stats.tokens + s.end.stats.prompt_tokens, 512);
});

test('the model may end its answer itself', async () => {
  const s = await c.infer(STORY, { ...GREEDY, grammar: 'root ::= "x"' }).done();
  assert.equal(s.end.reason, 'stop');
  assert.equal(s.text, 'x');
});

// Every cut of the greedy text is tried as a stop string, of every length: within a token, over two, over many.
test('a stop string ends the answer just before it, wherever tokens are cut', async () => {
  const cases = [];
  for (let at = 10; at < 60; at += 7) for (const len of [1, 2, 3, 5, 9, 20]) cases.push(whole.slice(at, at + len));
  await Promise.all(
    cases.map(async (stop) => {
      const s = await c.infer(STORY, { ...GREEDY, max_tokens: 120, stop: [stop] }).done();
      assert.equal(s.end.reason, 'stop', stop);
      assert.equal(s.text, whole.slice(0, whole.indexOf(stop)), `stop ${JSON.stringify(stop)}`);
    }),
  );
});

test('of several stop strings the one that comes first counts', async () => {
  const s = await c.infer(STORY, { ...GREEDY, max_tokens: 120, stop: ['never said', 'park', 'girl', 'Lily', 'outside'] }).done();
  assert.equal(s.text, whole.slice(0, whole.indexOf('girl')));
});

test('stop may be one string', async () => {
  assert.equal(await c.text(STORY, { ...GREEDY, max_tokens: 120, stop: 'park' }), whole.slice(0, whole.indexOf('park')));
});

test('a stop string that never comes, but nearly does, costs no text', async () => {
  for (const stop of ['little girk', 'Lily. She loved to plaz', `${whole.slice(-6)}qqq`, ' girl named Lily, She', 'zzzz'])
    assert.equal(await c.text(STORY, { ...GREEDY, max_tokens: 120, stop: [stop] }), whole, stop);
});

test('stop strings of more than one byte a character', async () => {
  const grammar = 'root ::= "ab😀cdéf"';
  for (const [stop, want] of [['😀', 'ab'], ['é', 'ab😀cd'], ['d\u00e9', 'ab😀c'], ['😁', 'ab😀cdéf'], ['è', 'ab😀cdéf']]) {
    const s = await c.infer('Say: ', { ...GREEDY, grammar, stop: [stop] }).done();
    assert.equal(s.text, want, stop);
    assert.equal(s.end.reason, 'stop');
  }
});

test('penalties change what is said', async () => {
  const base = await c.text(STORY, { ...GREEDY, max_tokens: 200 });
  for (const p of [{ repeat_penalty: 1.5 }, { frequency_penalty: 1.5 }, { presence_penalty: 1.5 }]) {
    const other = await c.text(STORY, { ...GREEDY, max_tokens: 200, ...p });
    assert.notEqual(other, base, JSON.stringify(p));
    assert.equal(await c.text(STORY, { ...GREEDY, max_tokens: 200, ...p }), other);
  }
  assert.equal(await c.text(STORY, { ...GREEDY, max_tokens: 200, repeat_penalty: 1, frequency_penalty: 0, presence_penalty: 0 }), base);
});

test('logit_bias: what is never said, what is said at once, and what it costs nobody else', async () => {
  const run = (prompt, params) => c.infer(prompt, params).done();
  const id = async (text) => (await server.http('/tokenize', { method: 'POST', body: JSON.stringify({ content: STORY + text }) })).json.tokens.at(-1);
  const said = (await run(STORY, { ...GREEDY, max_tokens: 30, logprobs: 2 })).tokens;
  const first = said[0].logprobs.map((l) => l.token); // the most probable two
  const ids = await Promise.all(first.map(id));
  const other = (await run(STORY, { ...GREEDY, max_tokens: 1, logit_bias: { [ids[0]]: -100 } })).tokens[0];
  assert.equal(other.content, first[1]);
  assert.ok(other.prob < said[0].prob, 'the probability is the model’s own');
  assert.equal((await run(STORY, { ...GREEDY, max_tokens: 1, logit_bias: [[ids[0], false]] })).tokens[0].content, first[1]);
  const [forced, plain] = await Promise.all([
    run(STORY, { temp: 1.5, seed: 3, top_k: 0, max_tokens: 8, logit_bias: { [ids[1]]: 100 } }), // drawn, yet decided
    run(STORY, { ...GREEDY, max_tokens: 30 })]);
  assert.ok(forced.tokens.every((t) => t.content === first[1]), JSON.stringify(forced.tokens.map((t) => t.content)));
  assert.deepEqual(plain.tokens.map((t) => t.content), said.map((t) => t.content));
  const e = await c.infer(STORY, { ...GREEDY, logit_bias: { 512: 1 } }).refused();
  assert.ok(e.code === 'bad_request' && /no token 512/.test(e.message), JSON.stringify(e));
});

test('logprobs: as many as asked for, sorted, a part of the whole, with the chosen one', async () => {
  for (const n of [1, 5, 20]) {
    const s = await c.infer(STORY, { ...GREEDY, max_tokens: 30, logprobs: n }).done();
    for (const t of s.tokens) {
      assert.equal(t.logprobs.length, n);
      const lp = t.logprobs.map((l) => l.logprob);
      assert.deepEqual(lp, [...lp].sort((a, b) => b - a));
      const sum = lp.reduce((a, l) => a + Math.exp(l), 0);
      assert.ok(sum <= 1.0001, `sum ${sum}`);
      assert.equal(t.logprobs[0].token, t.content, 'greedy takes the first');
      assert.ok(Math.abs(Math.exp(lp[0]) - t.prob) < 1e-4, `${Math.exp(lp[0])} and ${t.prob}`);
    }
  }
  const none = await c.infer(STORY, { ...GREEDY, max_tokens: 5, logprobs: 0 }).done();
  assert.ok(none.tokens.every((t) => !('logprobs' in t)));
});

test('logprobs of a sampled answer name the chosen token with its probability', async () => {
  const s = await c.infer(STORY, { temp: 1, seed: 11, top_k: 20, max_tokens: 60, logprobs: 20 }).done();
  for (const t of s.tokens) {
    const own = t.logprobs.filter((l) => l.token === t.content);
    assert.ok(own.some((l) => Math.abs(Math.exp(l.logprob) - t.prob) < 1e-4), `${t.content} ${t.prob} ${JSON.stringify(own)}`);
  }
  assert.ok(s.tokens.some((t) => t.content !== t.logprobs[0].token), 'not always the first');
});

test('logprobs of byte tokens do not break the message', async () => {
  const s = await c.infer('😀', { ...GREEDY, grammar: 'root ::= "é😀é"', logprobs: 20 }).done();
  assert.equal(s.text, 'é😀é');
});

test('a grammar is obeyed', async () => {
  for (const seed of [1, 2, 3, 4, 5]) {
    const s = await c.infer(STORY, { temp: 1.5, seed, grammar: 'root ::= [0-9]{3} "-" ("yes" | "no")' }).done();
    assert.match(s.text, /^\d{3}-(yes|no)$/);
    assert.equal(s.end.reason, 'stop');
  }
});

test('a bad grammar is refused and its connection lives', async () => {
  for (const grammar of ['root ::= "a', 'no root here', 'other ::= "a"', 'root ::= missing', '', '\\', 'root ::= [', 'root ::= root', 'root ::= "a"{9999999}']) {
    const e = await c.infer(STORY, { grammar, max_tokens: 5 }).refused();
    assert.equal(e.code, 'bad_request', `${grammar} → ${e.code} ${e.message}`);
  }
  assert.equal(await c.text(STORY, { ...GREEDY, max_tokens: 120 }), whole);
});

test('a grammar of very many groups within groups is refused, not the end of the server', async () => {
  const nested = (n) => `root ::= ${'('.repeat(n)}"a"${')'.repeat(n)}`;
  for (const grammar of [nested(257), nested(20000), `root ::= ${'('.repeat(250000)}`])
    assert.match((await c.infer(STORY, { grammar, max_tokens: 5 }).refused()).message, /deeper than 256/);
  assert.equal(await c.text(STORY, { grammar: nested(256), max_tokens: 5 }), 'a');
  assert.equal(await c.text(STORY, { grammar: `root ::= "${'('.repeat(300)}" # ${'('.repeat(300)}`, max_tokens: 500 }), '('.repeat(300), 'in a string or a remark they are text');
});

// llama.cpp's engine compares all places where the text may go on with each other: with these a token took minutes.
test('a grammar in which very much in a row may be left out is refused', async () => {
  const doubled = (n) => `root ::= a0\n${Array.from({ length: n }, (_, i) => `a${i} ::= a${i + 1} a${i + 1}`).join('\n')}\na${n} ::= "x"?`;
  const refused = [doubled(8), doubled(12), doubled(40), `root ::= "b" ${'"x"? '.repeat(200)}`, 'root ::= ("a" (("x"? "y"*){0,100}))+', `root ::= ${'( "x" | "" ) '.repeat(200)}`, 'root ::= e{200}\ne ::= | [a-z]'];
  for (const grammar of refused) {
    const e = await c.infer(STORY, { grammar, max_tokens: 5 }).refused();
    assert.equal(e.code, 'too_large');
    assert.match(e.message, /more than 128 parts in a row/);
  }
  const endless = Array.from({ length: 1100 }, (_, i) => `a${i} ::= a${i + 1}`).join('\n');
  assert.match((await c.infer(STORY, { grammar: `root ::= a0\n${endless}\na1100 ::= "x"` }).refused()).message, /deeper than 1000/);
  assert.match((await c.infer(STORY, { grammar: `root ::= "x"\n${'a'.repeat(128)} ::= "x"` }).refused()).message, /name in the grammar is longer/);
  const taken = [doubled(6), 'root ::= "x"{0,2000}', `root ::= ( ${'"x" "y"? # z\n "z"* '.repeat(300)})`, Array(300).fill('').reduce((g, _, i) => `${g} | "${i}" ["?]*`, 'root ::= "a"'), 'root ::= "(" root? ")" ws root?\nws ::= [ \\]\\n]*'];
  for (const grammar of taken) await c.infer(STORY, { ...GREEDY, grammar, max_tokens: 3 }).done();
});

test('left recursion behind what may be left out is refused; llama.cpp followed it for ever', async () => {
  for (const grammar of ['root ::= x y\nx ::= "a"?\ny ::= root "d"', 'root ::= "a"* root', 'root ::= (x | "b") "c"\nx ::= ws root\nws ::= [ ]*', 'root ::= a\na ::= a{2} "b"'])
    assert.match((await c.infer(STORY, { grammar, max_tokens: 9 }).refused()).message, /leads to itself/);
  for (const grammar of ['root ::= "a"? "b" root?', 'root ::= ("a"* "b")* "c" | "d" root']) await c.infer(STORY, { ...GREEDY, grammar, max_tokens: 3 }).done();
});

test('a grammar that names tokens is refused: llama.cpp may throw in the midst of it', async () => {
  for (const grammar of ['root ::= <[1]>', 'root ::= <think> [a-z]', 'root ::= x y\nx ::= "a"? | !<[3]>[b-c]+\ny ::= ( "d" | x )*'])
    assert.match((await c.infer(STORY, { grammar, temp: 1, seed: 5, max_tokens: 9 }).refused()).message, /names tokens/);
  assert.equal(await c.text(STORY, { grammar: 'root ::= "<[1]>" [<] # <x>', max_tokens: 20 }), '<[1]><');
});

test('a schema is obeyed', async () => {
  const json_schema = {
    type: 'object',
    properties: {
      name: { type: 'string', minLength: 1, maxLength: 12 },
      age: { type: 'integer', minimum: 0, maximum: 130 },
      kind: { enum: ['cat', 'dog'] },
      tags: { type: 'array', items: { type: 'boolean' }, minItems: 1, maxItems: 3 },
    },
    required: ['name', 'age', 'kind', 'tags'],
    additionalProperties: false,
  };
  for (const seed of [1, 2, 3, 4]) {
    const s = await c.infer('A cat as JSON: ', { temp: 1, seed, json_schema }).done();
    assert.equal(s.end.reason, 'stop', s.text);
    const o = JSON.parse(s.text);
    assert.deepEqual(Object.keys(o).sort(), ['age', 'kind', 'name', 'tags']);
    assert.ok(typeof o.name === 'string' && [...o.name].length >= 1 && [...o.name].length <= 12);
    assert.ok(Number.isInteger(o.age) && o.age >= 0 && o.age <= 130);
    assert.ok(['cat', 'dog'].includes(o.kind));
    assert.ok(o.tags.length >= 1 && o.tags.length <= 3 && o.tags.every((t) => typeof t === 'boolean'));
  }
});

test('a bad schema, or a schema beside a grammar, is refused', async () => {
  for (const params of [
    { json_schema: { type: 'nonsense' } },
    { json_schema: 5 },
    { json_schema: 'x' },
    { json_schema: { multipleOf: 3, type: 'number' } },
    { json_schema: { $ref: '#/nowhere' } },
    { json_schema: true, grammar: 'root ::= "a"' },
  ])
    assert.equal((await c.infer(STORY, params).refused()).code, 'bad_request', JSON.stringify(params));
});

// llama.cpp's grammar parser writes its complaints to stderr itself.
test('the server has survived', () => server.stop());
