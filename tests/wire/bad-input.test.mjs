// What must be refused: with its code, and the connection lives wherever the protocol allows it.
import test from 'node:test';
import assert from 'node:assert/strict';
import { GREEDY, Server, checkError, frame, rawSocket, until, within, UPGRADE } from './lib.mjs';

const server = await Server.start();
const c = await server.connect();
const STORY = 'Once upon a time';
const want = await c.text(STORY, { ...GREEDY, max_tokens: 10 });
const lives = async () => assert.equal(await c.text(STORY, { ...GREEDY, max_tokens: 10 }), want);

test('not JSON', async () => {
  for (const m of ['', ' ', 'hello', '{', '{"op":"hello"', '{"op":"hello"}}', '{"op":"hello"} x', "{'op':'hello'}", '{"op":hello}', '{op:"hello"}', '{"op":"hello",}', '\u0000', '{"op":"hel\nlo"}', '// c', '{"op":"hello","x":5\u0000}', '{"op":"hello","x":[1\u0000]}', '\ufeff{"op":"hello"}'])
    await c.bad(m, 'bad_request');
  await lives();
});

test('JSON that is no object', async () => {
  for (const m of ['[]', '[{"op":"hello"}]', '1', '"op"', 'null', 'true']) await c.bad(m, 'bad_request');
  await lives();
});

test('no op, or one that nobody knows', async () => {
  for (const m of [{}, { op: null }, { op: 5 }, { op: {} }, { op: ['hello'] }, { payload: { op: 'hello' } }, { op: '' }, { op: 'nonsense' }, { op: 'infer ' }, { op: 'é'.repeat(500) }, { op: 'x'.repeat(100000) }])
    await c.bad(m, 'bad_request');
  const e = await c.bad({ op: 'nonsense', id: 'mine' }, 'bad_request');
  assert.equal(e.id, 'mine', 'the id of the message is echoed where there is one');
  await lives();
});

const WRONG = [null, true, 5, 'x', [], {}, -1, 1.5, '5', [1], { a: 1 }];
const TYPES = {
  // field: the values of WRONG that it may have
  id: [null, 'x', '5'],
  prompt: ['x', '5'],
  session_id: [null],
  params: [null, {}, { a: 1 }],
  priority: [null],
  deadline_ms: [null, 5, 1.5],
};
const PARAM_TYPES = {
  temp: [null, 5, 1.5],
  temperature: [null, 5, 1.5],
  top_k: [null, 5],
  top_p: [null],
  min_p: [null],
  repeat_penalty: [null, 5, 1.5],
  frequency_penalty: [null, -1, 1.5],
  presence_penalty: [null, -1, 1.5],
  seed: [null, 5, -1],
  max_tokens: [null, 5, -1],
  stop: [null, 'x', '5', []],
  logprobs: [null, 5],
  grammar: [null],
};
const isIn = (list, v) => list.some((x) => JSON.stringify(x) === JSON.stringify(v));

test('the wrong type or range in each field of infer', async () => {
  for (const [field, good] of Object.entries(TYPES))
    for (const v of WRONG.filter((x) => !isIn(good, x))) {
      const m = { op: 'infer', id: 'w', prompt: 'Once', params: { max_tokens: 1 }, [field]: v };
      const e = await c.bad(m);
      assert.ok(['bad_request', 'not_found'].includes(e.code), `${field}=${JSON.stringify(v)} → ${e.code}`);
    }
  await lives();
});

test('the wrong type or range in each parameter', async () => {
  for (const [field, good] of Object.entries(PARAM_TYPES))
    for (const v of WRONG)
      if (isIn(good, v)) await c.infer('Once', { max_tokens: 1, [field]: v }).done();
      else await c.bad({ op: 'infer', id: 'w', prompt: 'Once', params: { max_tokens: 1, [field]: v } }, 'bad_request');
  await lives();
});

test('numbers out of range, huge, or none at all', async () => {
  const bad = (params) => c.bad(`{"op":"infer","prompt":"x","params":${params}}`, 'bad_request');
  for (const v of ['NaN', 'Infinity', '-Infinity', '1e999', '-1e999', '01', '+1', '.5', '1.', '0x10', '1e', '--1']) await bad(`{"temp":${v}}`);
  for (const v of ['1e308', '99999999999999999999', '-99999999999999999999', '123456789012345678901234567890', '9223372036854775808', '-9223372036854775809', '1e30']) {
    await bad(`{"temp":${v}}`);
    await bad(`{"max_tokens":${v}}`);
    await bad(`{"top_k":${v}}`);
    await bad(`{"seed":${v}}`);
  }
  for (const p of ['{"temp":-0.1}', '{"temp":101}', '{"top_p":1.1}', '{"top_p":-1}', '{"min_p":2}', '{"top_k":-1}', '{"top_k":2147483648}', '{"max_tokens":-2}', '{"max_tokens":2147483648}', '{"max_tokens":1.5}', '{"seed":-2}', '{"seed":1.5}', '{"repeat_penalty":0}', '{"repeat_penalty":-1}', '{"frequency_penalty":3}', '{"presence_penalty":-3}', '{"logprobs":21}', '{"logprobs":-1}'])
    await bad(p);
  for (const v of ['0', '-1', '86400001', '1e300', '"5"']) await c.bad(`{"op":"infer","prompt":"x","deadline_ms":${v}}`, 'bad_request');
  await lives();
});

test('a number that no field of ours can hold is JSON all the same', async () => {
  // How JavaScript writes 1e20. It was "not valid JSON", and so the error had no id.
  assert.equal((await c.ask('{"op":"hello","since":100000000000000000000}', 'hello')).status, 'ready');
  const e = await c.bad({ op: 'infer', id: 'big', prompt: 'x', params: { max_tokens: 1e20 } }, 'bad_request');
  assert.equal(e.id, 'big');
  const s = await c.infer('Once', { ...GREEDY, json_schema: { type: 'integer', minimum: 3, maximum: 1e20 }, max_tokens: 40 }, { id: 'bound' }).done();
  assert.match(s.text, /^\d+$/);
  assert.match((await c.bad('{"op":"hello","since":1e400}', 'bad_request')).message, /number is too large/);
});

test('whole numbers may be written as 5.0 and 5e0', async () => {
  for (const v of ['5.0', '5e0', '0.5e1'])
    assert.equal((await c.ask(`{"op":"infer","prompt":"Once","params":{"temp":0,"max_tokens":${v}}}`, 'end')).stats.tokens, 5);
});

test('the biggest seeds are taken', async () => {
  for (const v of ['9223372036854775807', '4294967296', '0']) await c.ask(`{"op":"infer","prompt":"Once","params":{"seed":${v},"max_tokens":1}}`, 'end');
});

test('stop strings: too many, too long, empty', async () => {
  await c.bad({ op: 'infer', prompt: 'x', params: { stop: Array(17).fill('a') } }, 'too_large');
  await c.bad({ op: 'infer', prompt: 'x', params: { stop: ['a'.repeat(257)] } }, 'too_large');
  await c.bad({ op: 'infer', prompt: 'x', params: { stop: [''] } }, 'bad_request');
  await c.bad({ op: 'infer', prompt: 'x', params: { stop: '' } }, 'bad_request');
  await c.infer(STORY, { ...GREEDY, max_tokens: 2, stop: Array(16).fill('q'.repeat(256)) }).done();
});

test('an empty prompt, none, or two', async () => {
  for (const m of [{}, { prompt: '' }, { prompt: null }, { messages: [] }, { prompt: 'x', messages: [{ role: 'user', content: 'x' }] }]) {
    const e = await c.bad({ op: 'infer', id: 'e', ...m }, 'bad_request');
    assert.equal(e.id, 'e');
  }
  await lives();
});

test('messages that are none', async () => {
  const one = { role: 'user', content: 'x' };
  for (const messages of ['x', 5, {}, [5], [null], ['x'], [{}], [{ role: 'user' }], [{ content: 'x' }], [{ ...one, role: 'robot' }], [{ ...one, role: 5 }], [{ ...one, content: 5 }], [{ ...one, content: null }], [{ ...one, content: [{ type: 'image' }] }], [one, {}]])
    await c.bad({ op: 'infer', messages }, 'bad_request');
  await c.bad({ op: 'infer', messages: Array(1025).fill(one) }, 'too_large');
  await lives();
});

test('messages for a model without a chat template', async () => {
  const e = await c.bad({ op: 'infer', id: 'chat', messages: [{ role: 'user', content: 'Hello' }] }, 'bad_request');
  assert.match(e.message, /template/);
  assert.equal(e.id, 'chat');
  await lives();
});

test('an id that is too long', async () => {
  await c.bad({ op: 'infer', id: 'x'.repeat(129), prompt: 'x' }, 'too_large');
  await c.bad({ op: 'infer', id: 'é'.repeat(65), prompt: 'x' }, 'too_large');
  await lives();
});

test('deep nesting', async () => {
  for (const deep of ['['.repeat(10000), '['.repeat(10000) + ']'.repeat(10000), '{"a":'.repeat(5000) + '1' + '}'.repeat(5000), `{"op":"infer","prompt":"x","params":${'['.repeat(500)}${']'.repeat(500)}}`, '['.repeat(900000)])
    await c.bad(deep, 'bad_request');
  assert.equal((await c.ask(`{"op":"hello","x":${'['.repeat(20)}${']'.repeat(20)}}`, 'hello')).op, 'hello', 'a little is fine, unknown fields are ignored');
  assert.equal((await c.ask({ op: 'hello', x: '['.repeat(5000) }, 'hello')).op, 'hello', 'brackets in a string are no nesting');
});

test('a message past the limit is refused and the connection lives', async () => {
  assert.equal(c.hello.limits.message_bytes, 1 << 20);
  await c.bad({ op: 'infer', prompt: 'x'.repeat(10_000_000) }, 'too_large');
  await c.bad('x'.repeat((1 << 20) + 1), 'too_large');
  await c.bad(Buffer.alloc(3_000_000), 'too_large');
  await lives();
  await c.bad('x'.repeat(1 << 20), 'bad_request'); // just within: it is only no JSON
  assert.equal((await c.ask({ op: 'hello', pad: 'x'.repeat((1 << 20) - 100) }, 'hello')).op, 'hello');
});

test('NUL characters and lone surrogates in JSON', async () => {
  for (const s of ['"\\u0000"', '"a\\u0000b"', '"\\ud800"', '"\\udc00"', '"\\ud800x"', '"\\ud800\\ud800"', '"\\u12"', '"\\x41"'])
    for (const m of [`{"op":"infer","prompt":${s}}`, `{"op":${s}}`, `{"op":"infer","id":${s},"prompt":"x"}`, `{"op":"infer","prompt":"x","params":{"stop":[${s}]}}`, `{${s}:1,"op":"hello"}`])
      await c.bad(m, 'bad_request');
  await lives();
});

test('a surrogate pair is one character', async () => {
  const pair = await c.ask('{"op":"infer","id":"\\ud83d\\ude00","prompt":"Once","params":{"temp":0,"max_tokens":1}}', 'end');
  assert.equal(pair.id, '😀');
});

test('a key given twice does not confuse anybody', async () => {
  assert.equal((await c.ask('{"op":"nonsense","op":"hello"}', (m) => ['hello', 'error'].includes(m.op))).op, 'hello');
});

test('a binary message is read like a text message', async () => {
  assert.equal((await c.ask(Buffer.from('{"op":"ping"}'), 'hello', { binary: true })).status, 'ready');
  await c.bad(Buffer.from([0xff, 0xfe, 0]), 'bad_request', { binary: true });
  await c.bad(Buffer.from('{"op":"infer","prompt":"\xff"}', 'latin1'), 'bad_request', { binary: true });
  await c.bad(Buffer.alloc(1000), 'bad_request', { binary: true });
  await lives();
});

// Fragments and bytes that no library would send.
async function rawClient() {
  const s = await rawSocket(server, UPGRADE);
  await until(() => s.got.includes('"hello"'), 'hello');
  s.got = Buffer.alloc(0);
  return s;
}

for (const [name, bytes] of [['a lone byte', [0xff]], ['half a character', [0xc3]], ['an overlong form', [0xc0, 0xaf]], ['a surrogate', [0xed, 0xa0, 0x80]], ['past U+10FFFF', [0xf4, 0x90, 0x80, 0x80]]])
  test(`text that is not UTF-8 (${name}): an error, then closed with 1007`, async () => {
    const s = await rawClient();
    s.write(frame(1, Buffer.concat([Buffer.from('{"op":"hello","x":"'), Buffer.from(bytes), Buffer.from('"}')])));
    await until(() => s.got.includes(0x88), 'the close frame');
    const text = s.got.toString('latin1');
    assert.match(text, /"op":"error".*"code":"bad_request"/s);
    assert.equal(s.got.readUInt16BE(s.got.indexOf(Buffer.from([0x03, 0xef]))), 1007, text);
    s.end();
    await within(s.ended, 'the connection to close');
    await lives();
  });

test('fragments, with pings between them, are one message', async () => {
  const s = await rawClient();
  const m = '{"op":"infer","id":"frag","prompt":"Once upon a time é","params":{"temp":0,"max_tokens":3}}';
  const b = Buffer.from(m);
  b.forEach((x, i) => {
    s.write(frame(i ? 0 : 1, Buffer.from([x]), { fin: i === b.length - 1 }));
    if (i % 9 === 0) s.write(frame(9, 'p'));
  });
  await until(() => s.got.includes('"op":"end"'), 'the end');
  assert.match(s.got.toString(), /"id":"frag"/);
  s.destroy();
});

for (const [name, bytes] of [
  ['an unmasked frame', [0x81, 0x02, 0x7b, 0x7d]],
  ['a reserved bit', [0xc1, 0x80, 0, 0, 0, 0]],
  ['an unknown opcode', [0x83, 0x80, 0, 0, 0, 0]],
  ['a continuation of nothing', [0x80, 0x80, 0, 0, 0, 0]],
  ['a long ping', [0x89, 0xfe, 0, 126, 0, 0, 0, 0]],
  ['a length past 2^63', [0x81, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]],
])
  test(`${name}: closed with 1002`, async () => {
    const s = await rawClient();
    s.write(Buffer.from(bytes));
    await until(() => s.got.includes(Buffer.from([0x03, 0xea])), 'close 1002');
    s.end();
    await within(s.ended, 'the connection to close');
    await lives();
  });

test('a message that claims to be huge costs nothing', async () => {
  const before = server.rss();
  const all = [];
  for (let i = 0; i < 20; i++) {
    const s = await rawClient();
    s.write(Buffer.from([0x81, 0xff, 0, 0, 0, 1, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7]));
    await until(() => s.got.includes('too_large'), 'too_large');
    all.push(s);
  }
  server.grownLessThan(32 << 20, before);
  all.forEach((s) => s.destroy());
  await lives();
});

test('random garbage', async () => {
  let seed = 12345;
  const rnd = (n) => ((seed = (seed * 1103515245 + 12345) & 0x7fffffff) >> 8) % n;
  const base = JSON.stringify({ op: 'infer', id: 'g', prompt: 'Once', params: { temp: 0, max_tokens: 2, stop: ['a'], logprobs: 2 }, priority: 'high' });
  for (let i = 0; i < 500; i++) {
    const b = Buffer.from(base);
    for (let k = rnd(4) + 1; k > 0; k--) b[rnd(b.length)] = rnd(256);
    c.send(b, { binary: true });
  }
  await c.sync();
  await server.idle();
  await lives();
});

test('checkError knows what an error must look like', () => {
  assert.throws(() => checkError({ op: 'error', code: 'oops', message: 'x', error: 'x' }));
  assert.throws(() => checkError({ op: 'error', code: 'busy', message: 'x' }));
});

// llama.cpp's grammar parser writes its complaints to stderr itself.
test('the server has survived', () => server.stop());
