// A client that does not read: its own requests end, its own connection closes, and nobody else notices.
import test from 'node:test';
import assert from 'node:assert/strict';
import { ENDLESS, GREEDY, Server, UPGRADE, frame, rawSocket, until, within } from './lib.mjs';

const OUTBOX = 65536;
const server = await Server.start(['--outbox', String(OUTBOX), '--ctx-size', '131072', '--kv-size', '1048576', '--parallel', '64', '--requests', '64']);
const STORY = 'Once upon a time';

/** Messages in what a server has sent: text frames only, then the close code. */
function parse(buf) {
  const out = { messages: [], close: null };
  let at = buf.indexOf('\r\n\r\n') + 4;
  while (at + 2 <= buf.length) {
    const op = buf[at] & 15;
    let len = buf[at + 1] & 127;
    at += 2;
    if (len === 126) (len = buf.readUInt16BE(at)), (at += 2);
    else if (len === 127) (len = Number(buf.readBigUInt64BE(at))), (at += 8);
    if (at + len > buf.length) break;
    const body = buf.subarray(at, at + len);
    at += len;
    if (op === 1) out.messages.push(JSON.parse(body));
    else if (op === 8) out.close = { code: body.readUInt16BE(0), reason: body.subarray(2).toString() };
  }
  return out;
}

/** Asks for much and stops reading. */
async function stuck(n) {
  const s = await rawSocket(server, UPGRADE);
  await until(() => s.got.includes('"hello"'), 'hello');
  s.pause();
  for (let i = 0; i < n; i++)
    s.write(frame(1, JSON.stringify({ op: 'infer', id: `slow${i}`, prompt: STORY, params: { ...ENDLESS, logprobs: 20 } })));
  return s;
}

test('a client that does not read is told busy and closed with 1013', async () => {
  const before = (await server.metrics()).ic_slow_clients_closed_total;
  const s = await stuck(4);
  await until(async () => (await server.metrics()).ic_slow_clients_closed_total > before, 'the server to notice');
  await until(async () => (await server.metrics()).ic_text_requests_running === 0, 'its requests to end');
  s.resume(); // now it reads what is left
  await within(s.ended, 'the connection to close');
  const { messages, close } = parse(s.got);
  for (let i = 0; i < 4; i++) {
    const own = messages.filter((m) => m.id === `slow${i}`);
    assert.ok(own.filter((m) => m.op === 'token').length > 0);
    const last = own.at(-1);
    assert.equal(last.op, 'error', JSON.stringify(last));
    assert.equal(last.code, 'busy');
  }
  assert.equal(close?.code, 1013);
});

test('others are served meanwhile, and say the same', async () => {
  const c = await server.connect();
  const want = await c.text(STORY, { ...GREEDY, max_tokens: 60 });
  const before = (await server.metrics()).ic_slow_clients_closed_total;
  const many = await Promise.all([stuck(4), stuck(4), stuck(4)]);
  for (let i = 0; i < 8; i++) assert.equal(await c.text(STORY, { ...GREEDY, max_tokens: 60 }), want);
  await until(async () => (await server.metrics()).ic_slow_clients_closed_total === before + 3, 'all three to be closed');
  assert.equal(await c.text(STORY, { ...GREEDY, max_tokens: 60 }), want);
  many.forEach((s) => s.destroy());
  await c.close();
  await server.idle();
});

test('many slow clients cost bounded memory', async () => {
  const before = server.rss();
  const closed = (await server.metrics()).ic_slow_clients_closed_total;
  const all = await Promise.all(Array.from({ length: 10 }, () => stuck(4)));
  await until(async () => (await server.metrics()).ic_slow_clients_closed_total === closed + 10, 'all to be closed');
  server.grownLessThan(48 << 20, before);
  all.forEach((s) => s.destroy());
  await server.idle();
});

test('a client that asks and asks and never reads is stopped too', async () => {
  const closed = (await server.metrics()).ic_slow_clients_closed_total;
  const s = await rawSocket(server, UPGRADE);
  await until(() => s.got.includes('"hello"'), 'hello');
  s.pause();
  const many = Buffer.concat(Array.from({ length: 1000 }, () => frame(1, '{"op":"hello"}')));
  let gone = false;
  s.on('close', () => (gone = true));
  for (let i = 0; i < 200 && !gone && (await server.metrics()).ic_slow_clients_closed_total === closed; i++) await new Promise((r) => s.write(many, r));
  assert.equal((await server.metrics()).ic_slow_clients_closed_total, closed + 1);
  s.destroy();
});

test('a client that reads slowly, but reads, gets all', async () => {
  const c = await server.connect();
  const s = c.infer(STORY, { ...ENDLESS, max_tokens: 400 });
  const drip = setInterval(() => {
    c.ws._socket.pause();
    setTimeout(() => c.ws._socket.resume(), 5);
  }, 10);
  await s.done();
  clearInterval(drip);
  c.ws._socket.resume();
  assert.equal(s.end.stats.tokens, 400);
  assert.equal(s.tokens.length, 400);
  await c.close();
});

test('the server has survived', () => server.stop());
