// The bytes of the HTTP side: the stream's form, statuses and errors, keep-alive, /tokenize and /detokenize.
import test from 'node:test';
import assert from 'node:assert/strict';
import http from 'node:http';
import { Server, rawSocket, until, withServer, within } from './lib.mjs';

const server = await Server.start(['--chat-template', 'chatml', '--ctx-size', '2048']);
const messages = [{ role: 'user', content: 'Tell me a story.' }];
const PROMPT = 'Once upon a time';
const CHAT = '/v1/chat/completions';
const TEXT = '/v1/completions';
const json = (body) => ({ method: 'POST', headers: { 'Content-Type': 'application/json' }, body: typeof body === 'object' && !Buffer.isBuffer(body) ? JSON.stringify(body) : body });
const post = (path, body, more) => server.http(path, { ...json(body), ...more });

function checkError(r, status, code, what = '') {
  const where = `${what} → ${r.status} ${r.body.slice(0, 300)}`;
  assert.equal(r.status, status, where);
  assert.match(r.headers['content-type'], /^application\/json/, where);
  assert.deepEqual(Object.keys(r.json), ['error'], where);
  const e = r.json.error;
  assert.deepEqual(Object.keys(e), ['code', 'message', 'type', 'param'], where);
  assert.equal(e.code, code, where);
  assert.equal(e.type, status < 500 ? 'invalid_request_error' : 'server_error', where);
  assert.equal(e.param, null);
  assert.ok(e.message.length > 0);
}

const request = (path, body, { version = '1.1', extra = '' } = {}) => {
  const b = Buffer.from(JSON.stringify(body));
  return Buffer.concat([Buffer.from(`POST ${path} HTTP/${version}\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: ${b.length}\r\n${extra}\r\n`), b]);
};
const gotten = (s, mark) => until(() => s.got.includes(mark), `${JSON.stringify(mark)}; so far: ${s.got.toString().slice(-300)}`);

/** Takes chunked coding off by hand: {chunks, rest}. */
function dechunk(bytes) {
  const chunks = [];
  for (let at = 0; ; ) {
    const nl = bytes.indexOf('\r\n', at);
    assert.ok(nl > 0, 'a chunk has a size');
    const size = bytes.subarray(at, nl).toString();
    assert.match(size, /^[0-9a-f]+$/);
    const n = parseInt(size, 16);
    at = nl + 2;
    assert.equal(bytes.subarray(at + n, at + n + 2).toString(), '\r\n', 'a chunk ends with CRLF');
    if (!n) return { chunks, rest: bytes.subarray(at + 2) };
    chunks.push(bytes.subarray(at, at + n));
    at += n + 2;
  }
}

test('the stream of a chat, byte for byte', async () => {
  const grammar = 'root ::= "a€" [b-c]';
  const s = await rawSocket(server, request(CHAT, { messages, temperature: 0, grammar, stream: true, stream_options: { include_usage: true } }));
  await gotten(s, '\r\n0\r\n\r\n');
  const [head] = s.got.toString().split('\r\n\r\n', 1);
  const { chunks, rest } = dechunk(s.got.subarray(Buffer.byteLength(head) + 4));
  s.destroy();
  assert.equal(rest.length, 0);
  assert.match(head, /^HTTP\/1\.1 200 OK\r\nDate: [^\r]+\r\nContent-Type: text\/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\nCache-Control: no-cache\r\nX-Accel-Buffering: no$/);
  const body = new TextDecoder('utf-8', { fatal: true }).decode(Buffer.concat(chunks));
  const { id, created } = JSON.parse(body.slice(6, body.indexOf('\n')));
  const common = `"id":"${id}","object":"chat.completion.chunk","created":${created},"model":"stories260K-f32"`;
  const piece = (delta, finish = 'null') => `data: {${common},"choices":[{"index":0,"delta":{${delta}},"finish_reason":${finish}}]}\n\n`;
  const last = /"content":"([bc])"/.exec(body)[1];
  const usage = /"usage":(\{.*\})\}\n\ndata: \[DONE\]/.exec(body)[1];
  assert.deepEqual(Object.keys(JSON.parse(usage)), ['prompt_tokens', 'completion_tokens', 'total_tokens', 'prompt_tokens_details']);
  const want = [
    piece('"role":"assistant","content":""'),
    piece('"content":"a"'),
    piece('"content":"€"'),
    piece(`"content":"${last}"`),
    piece('', '"stop"'),
    `data: {${common},"choices":[],"usage":${usage}}\n\n`,
    'data: [DONE]\n\n',
  ];
  assert.equal(body, want.join(''));
  assert.deepEqual(chunks.map(String), want, 'an event is a chunk');
});

test('the stream of a completion, byte for byte', async () => {
  const r = await post(TEXT, { prompt: PROMPT, temperature: 0, grammar: 'root ::= "a€"', stream: true });
  const { id, created } = JSON.parse(r.body.slice(6, r.body.indexOf('\n')));
  const piece = (text, finish = 'null') =>
    `data: {"id":"${id}","object":"text_completion","created":${created},"model":"stories260K-f32","choices":[{"index":0,"text":"${text}","finish_reason":${finish}}]}\n\n`;
  assert.equal(r.body, piece('a') + piece('€') + piece('', '"stop"') + 'data: [DONE]\n\n');
});

test('line feeds and separators in the text cannot break an event', async () => {
  const text = 'a\n\ndata: [DONE]\r\n\t"\\\u2028\u007f';
  const grammar = `root ::= ${JSON.stringify(text).replace('\u2028', '\\u2028').replace('\u007f', '\\x7F')}`;
  const r = await post(TEXT, { prompt: PROMPT, grammar, stream: true, max_tokens: 100 });
  const events = r.body.split('\n\n');
  assert.equal(events.pop(), '');
  assert.equal(events.pop(), 'data: [DONE]');
  for (const e of events) assert.match(e, /^data: \{[^\n\r]*\}$/);
  assert.equal(events.map((e) => JSON.parse(e.slice(6)).choices[0].text).join(''), text);
});

test('HTTP/1.0: a stream ends with the connection, without chunks', async () => {
  const s = await rawSocket(server, request(TEXT, { prompt: PROMPT, temperature: 0, max_tokens: 3, stream: true }, { version: '1.0' }));
  await within(s.ended, 'the end of the connection');
  const [head, ...body] = s.got.toString().split('\r\n\r\n');
  assert.match(head, /\r\nConnection: close/);
  assert.doesNotMatch(head, /Transfer-Encoding/);
  assert.match(body.join('\r\n\r\n'), /^data: \{/);
  assert.match(s.got.toString(), /\n\ndata: \[DONE\]\n\n$/);
});

test('the connection is used again after a streamed answer, a whole one and a refused one', async () => {
  const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
  const sockets = new Set();
  const ask = (path, body) =>
    within(
      new Promise((ok, no) => {
        const { headers } = json('');
        const req = http.request({ host: '127.0.0.1', port: server.port, path, method: 'POST', headers, agent }, (res) => {
          sockets.add(req.socket);
          let text = '';
          res.setEncoding('utf8').on('data', (d) => (text += d)).on('end', () => ok({ status: res.statusCode, text, reused: req.reusedSocket }));
        });
        req.on('error', no).end(JSON.stringify(body));
      }),
      path,
    );
  const body = { prompt: PROMPT, temperature: 0, max_tokens: 5 };
  for (let i = 0; i < 3; i++) {
    const streamed = await ask(TEXT, { ...body, stream: true });
    assert.equal(streamed.reused, i > 0);
    assert.match(streamed.text, /data: \[DONE\]\n\n$/);
    const whole = await ask(TEXT, body);
    assert.equal(streamed.text.trimEnd().split('\n\n').slice(0, -1).map((e) => JSON.parse(e.slice(6)).choices[0].text).join(''), JSON.parse(whole.text).choices[0].text);
    assert.equal((await ask(CHAT, {})).status, 400);
    assert.equal((await ask('/tokenize', { content: 'a' })).status, 200);
  }
  assert.equal(sockets.size, 1);
  agent.destroy();
});

test('requests sent ahead are answered in order', async () => {
  const body = (n, stream) => ({ prompt: PROMPT, temperature: 0, grammar: `root ::= "n${n}"`, stream });
  const all = [1, 2, 3, 4, 5, 6].map((n) => request(TEXT, body(n, n % 2 === 0), { extra: n === 6 ? 'Connection: close\r\n' : '' }));
  const s = await rawSocket(server, Buffer.concat(all));
  await within(s.ended, 'six answers');
  const text = s.got.toString();
  assert.equal(text.match(/HTTP\/1\.1 200 OK/g).length, 6);
  assert.equal(text.match(/\[DONE\]/g).length, 3);
  assert.equal([...text.matchAll(/"text":"([^"]*)"/g)].map((m) => m[1]).join(''), 'n1n2n3n4n5n6');
});

test('GET, HEAD and others on POST paths: 405 with Allow', async () => {
  for (const path of [CHAT, TEXT, '/v1/embeddings', '/tokenize', '/detokenize', '/predict'])
    for (const method of ['GET', 'HEAD', 'PUT', 'DELETE', 'OPTIONS', 'PATCH']) {
      const r = await server.http(path, { method });
      assert.equal(r.status, 405, `${method} ${path}`);
      assert.equal(r.headers.allow, 'POST');
      if (method === 'HEAD') assert.equal(r.body, '');
      else checkError(r, 405, 'bad_request', `${method} ${path}`);
    }
  for (const path of ['/v1/models', '/health']) {
    const r = await post(path, {});
    assert.equal(r.status, 405);
    assert.equal(r.headers.allow, 'GET, HEAD');
  }
  for (const path of ['/v1/embedding', '/v1/chat/completions/', '/v1/chat', '/V1/COMPLETIONS']) checkError(await post(path, {}), 404, 'not_found', path);
});

const OK_CHAT = { messages, temperature: 0, max_tokens: 2 };
const OK_TEXT = { prompt: PROMPT, temperature: 0, max_tokens: 2 };
const both = [['temperature', ['hot', -1, 101, [], true]], ['top_p', [-0.1, 1.1, '1']], ['min_p', [2]], ['top_k', [-1, 1.5]], ['repeat_penalty', [0, '1']],
  ['frequency_penalty', [3, {}]], ['presence_penalty', [-3]], ['max_tokens', [-2, 1.5, '5', 1e99, []]], ['max_completion_tokens', ['5', -2]], ['seed', ['x', 1.5, -2]],
  ['stop', ['', [''], [1], 5, {}, ['a'.repeat(100_000)]]], ['n', [0, 2, 'x', 1.5]], ['best_of', [2, 'x']], ['stream', ['yes', 1, []]], ['stream_options', [{ include_usage: 'yes' }]],
  ['logit_bias', [{ x: 1 }, { 5: 'x' }, { 5: 101 }, { 512: 1 }, [[5]], [['x', 1]], 'x']], ['tools', [[{ type: 'function' }], 'x', { a: 1 }]], ['functions', [[{ name: 'f' }]]], ['echo', [true, 'x']], ['grammar', ['', 5, 'root ::= (', 'x ::= "y"']], ['json_schema', [5, 'x', { $ref: 'http://x/' }]],
  ['response_format', ['json', 5, [], { type: 'xml' }, {}, { type: 'json_schema' }, { type: 'json_schema', json_schema: { name: 'x' } }, { type: 'json_schema', json_schema: { schema: null } },
    { type: 'json_schema', json_schema: { schema: 5 } }, { type: 'json_schema', json_schema: 'x' }]]];
const chatOnly = [['messages', [undefined, null, [], {}, 'x', [5], [null], [[]], [{}], [{ role: 'user' }], [{ role: 'user', content: 5 }], [{ role: 'user', content: null }], [{ content: 'x' }],
  [{ role: 'boss', content: 'x' }], [{ role: 5, content: 'x' }], [{ role: 'user', content: ['x'] }], [{ role: 'user', content: [{ type: 'image_url', image_url: { url: 'x' } }] }],
  [{ role: 'user', content: [{ type: 'text' }] }]]],
  ['logprobs', [5, 'x']], ['top_logprobs', [2]]];
const textOnly = [['prompt', [undefined, null, '', [], [''], ['a', 'b'], [1, 2], [[1, 2]], 5, {}]], ['suffix', ['x', 5]], ['logprobs', [-1, 21, 'x', true]]];

test('what is wrong is refused, with a status and a reason, and the connection lives', async () => {
  const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
  const sure = async (path, good) => assert.equal((await post(path, good, { agent })).status, 200);
  for (const [path, good, fields] of [[CHAT, OK_CHAT, [...both, ...chatOnly]], [TEXT, OK_TEXT, [...both, ...textOnly]]]) {
    await sure(path, good);
    for (const [field, values] of fields)
      for (const v of values)
        for (const stream of field === 'stream' ? [v] : [undefined, true]) {
          const r = await post(path, { ...good, stream, [field]: v }, { agent });
          const large = field === 'stop' && Array.isArray(v) && v[0]?.length > 1000;
          checkError(r, large ? 413 : 400, large ? 'too_large' : 'bad_request', `${path} ${field} ${JSON.stringify(v)?.slice(0, 80)}`);
        }
    await sure(path, good);
  }
  for (const v of [-1, 21, 'x']) checkError(await post(CHAT, { ...OK_CHAT, logprobs: true, top_logprobs: v }), 400, 'bad_request', `top_logprobs ${v}`);
  checkError(await post(TEXT, { ...OK_TEXT, grammar: 'root ::= "x"', json_schema: {} }), 400, 'bad_request', 'both');
  agent.destroy();
});

test('bodies that are no request', async () => {
  const deep = `{"prompt":"x","a":${'['.repeat(200)}${']'.repeat(200)}}`;
  const bodies = ['', '{', 'null', '[]', '"x"', '{"prompt":"x"', '{"prompt":"x"}}', '{"prompt":"x","prompt\\u0000":1}', '{"prompt":"a\\u0000b"}', '{"prompt":"\\ud800"}', deep, Buffer.from([0x7b, 0xff, 0x7d]),
    Buffer.from('{"prompt":"\xff"}', 'latin1'), '\u0000', '{"prompt":NaN}', 'prompt=x'];
  for (const path of [CHAT, TEXT, '/tokenize', '/detokenize'])
    for (const b of bodies) checkError(await post(path, b), 400, 'bad_request', `${path} ${String(b).slice(0, 60)}`);
});

test('too much: a long prompt, a body past --message-max', async () => {
  checkError(await post(TEXT, { prompt: 'dog '.repeat(3000) }), 413, 'too_large');
  checkError(await post(CHAT, { messages: [{ role: 'user', content: 'dog '.repeat(3000) }], stream: true }), 413, 'too_large');
  checkError(await post(CHAT, { messages: Array(1025).fill(messages[0]) }), 413, 'too_large');
  const r = await post(TEXT, { prompt: 'x'.repeat(1 << 20) });
  checkError(r, 413, 'too_large');
  assert.equal(r.headers.connection, 'close');
});

test('a chat without a template is refused, a completion is not', () =>
  withServer([], async (s) => {
    const r = await s.http(CHAT, json(OK_CHAT));
    checkError(r, 400, 'bad_request');
    assert.match(r.json.error.message, /chat-template/);
    assert.equal((await s.http(TEXT, json(OK_TEXT))).status, 200);
  }));

// ---- /tokenize and /detokenize ----------------------------------------------------------------------------------

const tokens = async (content, more) => {
  const r = await post('/tokenize', { content, ...more });
  assert.equal(r.status, 200, r.body.slice(0, 200));
  return r.json.tokens;
};
const content = async (list) => {
  const r = await post('/detokenize', { tokens: list });
  assert.equal(r.status, 200, r.body.slice(0, 200));
  return r.json.content;
};

test('there and back again', async () => {
  for (const text of ['Once upon a time', 'ä€😀𝄞', 'a\n\n\tb', '"\\', '\u007f\u2028', 'x'.repeat(5000)]) {
    const back = await content(await tokens(text));
    assert.equal(back.replace(/^ /, ''), text); // this vocabulary begins with a space
  }
  assert.deepEqual(await tokens(''), []);
  assert.equal(await content([]), '');
});

test('add_special adds the beginning; control tokens that are written are text', async () => {
  const plain = await tokens('Hi');
  assert.deepEqual(await tokens('Hi', { add_special: true }), [1, ...plain]);
  assert.deepEqual(await tokens('Hi', { add_special: false }), plain);
  for (const t of ['<s>', '</s>', '<unk>']) {
    const got = await tokens(t);
    assert.ok(got.length > 1 && !got.includes(1) && !got.includes(2), `${t} → ${got}`);
  }
  assert.equal(await content([1, 2]), '', 'and give no text themselves');
});

test('with_pieces and parse_special, as llama-server has them', async () => {
  const list = await tokens('a 😀<s>', { with_pieces: true });
  assert.deepEqual(list.map((t) => t.id), await tokens('a 😀<s>'));
  const bytes = list.map((t) => Buffer.from(t.piece));
  assert.equal(Buffer.concat(bytes).toString(), ' a 😀<s>');
  assert.deepEqual(list.filter((t) => Array.isArray(t.piece)).flatMap((t) => t.piece), [...Buffer.from('😀')], 'a byte alone is no text');
  assert.deepEqual(await tokens('<s>', { parse_special: true }), [1]);
  assert.deepEqual(await tokens('<s>', { parse_special: true, with_pieces: true }), [{ id: 1, piece: '' }]);
  for (const bad of [{ with_pieces: 1 }, { parse_special: 'x' }]) checkError(await post('/tokenize', { content: 'a', ...bad }), 400, 'bad_request');
});

test('a part of a character is told as U+FFFD', async () => {
  const list = await tokens('😀');
  assert.ok(list.length >= 4);
  assert.match(await content(list.slice(-2)), /^\ufffd+$/);
});

test('their limits', async () => {
  for (const ch of ['a', '~', 'あ', '😀', '\u007f', ' ', '\n']) {
    const r = await post('/tokenize', { content: ch.repeat(16384 / Buffer.byteLength(ch)), add_special: true }); // one token too many, for some
    if (r.status === 200) assert.ok(r.json.tokens.length <= 16384);
    else checkError(r, 413, 'too_large', JSON.stringify(ch));
  }
  checkError(await post('/tokenize', { content: '~'.repeat(16384), add_special: true }), 413, 'too_large');
  assert.ok((await tokens('~'.repeat(16000), { add_special: true })).length > 16000);
  checkError(await post('/tokenize', { content: 'a'.repeat(16385) }), 413, 'too_large');
  assert.equal((await content(Array(16384).fill(410))).length > 0, true);
  checkError(await post('/detokenize', { tokens: Array(16385).fill(410) }), 400, 'bad_request');
  for (const bad of [{}, { content: null }, { content: 5 }, { content: ['a'] }, { content: 'a', add_special: 1 }]) checkError(await post('/tokenize', bad), 400, 'bad_request', JSON.stringify(bad));
  for (const bad of [{}, { tokens: null }, { tokens: 'x' }, { tokens: {} }, { tokens: [-1] }, { tokens: [512] }, { tokens: [2 ** 40] }, { tokens: [1.5] }, { tokens: ['1'] }, { tokens: [[1]] }, { tokens: [1, null] }])
    checkError(await post('/detokenize', bad), 400, 'bad_request', JSON.stringify(bad));
});

test('a short question has no endless answer', () =>
  withServer(['--outbox', '64K'], async (s) => {
    const { tokens: list } = (await s.http('/tokenize', json({ content: 'x there was upon' }))).json;
    const size = async (t) => (await s.http('/detokenize', json({ tokens: Array(100).fill(t) }))).body.length;
    let long = list[0];
    for (const t of list) if ((await size(t)) > (await size(long))) long = t;
    assert.ok((await size(long)) > 300, 'a token of several characters');
    const r = await s.http('/detokenize', json({ tokens: Array(16384).fill(long) }));
    checkError(r, 413, 'too_large');
    assert.equal((await s.http('/detokenize', json({ tokens: Array(1000).fill(long) }))).status, 200);
  }));

test('the server has survived', () => server.stop());
