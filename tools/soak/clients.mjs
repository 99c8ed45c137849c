// What the clients of the soak do. Each scenario is one client's visit: it comes, does its thing, checks all that it
// gets against the reference answers, and goes, politely or not.
import net from 'node:net';
import { Peer, fetchText, must, sleep, within } from './wire.mjs';

export const PROMPTS = ['Once upon a time', 'The dog and the cat', 'Lily went to the park', 'One day, a big bear'];
const THEN = ' Then she';
const [SHORT, LONG] = [16, 400]; // tokens
const LONG_PROMPT = 'Once upon a time there was a cat. '.repeat(60); // many decodes to read
const GRIDS = [8, 16, 32, 64];
const STEPS = 3; // after which a state is compared
const TIE = 0.05; // nats between the two best tokens, below which a reference counts as undecided
const LAW = 'ginzburg-landau';
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
const post = (body) => ({ method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body) });

/** No token is missing. One without a text of its own (part of a character, a control token) travels with the next, under
 * that one's index; an answer has few of them. */
const TEXTLESS = 4;
function gapless(s) {
  const jumps = s.tokens.filter(([, index], i) => index !== (s.tokens[i - 1]?.[1] ?? -1) + 1).length;
  const missing = s.end.stats.tokens - s.tokens.length;
  return missing >= jumps && missing <= TEXTLESS;
}

/** An answer, or as much of it as there is, is the reference's, up to where the reference itself was undecided: sums of
 * floats depend on who else is in the batch, and where two tokens are as good as equal that tells. */
export function like(s, want) {
  must(!s.error, `${s.error?.code}: ${s.error?.message}`);
  const n = Math.min(s.tokens.length, want.sure);
  for (let i = 0; i < n; i++)
    must(same(s.tokens[i], want.tokens[i]), `token ${i} is ${JSON.stringify(s.tokens[i])}, not ${JSON.stringify(want.tokens[i])}`);
  if (s.end.reason === 'abort') return;
  must(['stop', 'length'].includes(s.end.reason), `ended with ${JSON.stringify(s.end)}`);
  must(s.tokens.length >= want.sure, `${s.tokens.length} of ${want.tokens.length} tokens`);
  must(gapless(s), 'a token is missing');
  if (want.sure === want.tokens.length) must(s.tokens.length === n && s.end.reason === want.reason, `ended with ${JSON.stringify(s.end)}`);
}

/** After at least one step each cell's norm is 1 (docs: law m.md, section 4; float32 rounding). */
function unitNorm(m) {
  const v = new Float32Array(Uint8Array.from(m.body).buffer);
  const [h, w, d] = m.shape;
  for (let cell = 0; cell < h * w; cell++) {
    let n = 0;
    for (let i = 0; i < 2 * d; i++) n += v[cell * 2 * d + i] ** 2;
    must(Math.abs(n - 1) < 1e-4, `a cell with norm² ${n}`);
  }
}

async function run(p, sim_id, steps, more = {}) {
  const over = p.wait((m) => m.op === 'sim_status' && m.sim_id === sim_id && !m.id && m.steps_left === 0, `end of ${steps} steps`);
  await p.call('sim_step', { sim_id, steps, ...more }, 'sim_status');
  return over;
}

async function stateAfter(p, grid, seed) {
  const { sim_id } = await p.call('sim_create', { law: LAW, grid, seed, frames: false }, 'sim_created');
  must((await run(p, sim_id, STEPS)).step === STEPS, 'a run that ends where it should');
  const state = await p.call('sim_state', { sim_id }, 'state');
  must(state.step === STEPS, `a state of step ${state.step}`);
  unitNorm(state);
  await p.call('sim_close', { sim_id }, 'sim_closed');
  return state.body;
}

/** The reference answers, asked for while nobody else is there. */
export async function references(port) {
  const p = await Peer.open(port);
  const ref = { texts: {}, states: {} };
  const ask = async (prompt, max_tokens, more) => {
    const s = await p.infer(prompt, { max_tokens, logprobs: 2 }, more).done();
    must(!s.error && gapless(s), `${prompt}: an index is missing`);
    p.streams.clear();
    const tie = s.margins.findIndex((m) => !(m > TIE));
    must(tie < 0 || tie > 5, `${prompt}: undecided at token ${tie}, no reference`);
    return { tokens: s.tokens, sure: tie < 0 ? s.tokens.length : tie, reason: s.end.reason, text: s.tokens.map((t) => t[0]).join('') };
  };
  for (const prompt of PROMPTS) for (const n of [SHORT, LONG]) ref.texts[`${prompt}/${n}`] = await ask(prompt, n);
  ref.longPrompt = await ask(LONG_PROMPT, SHORT);
  ref.second = await ask(PROMPTS[0] + ref.texts[`${PROMPTS[0]}/${SHORT}`].text + THEN, SHORT);
  for (const grid of GRIDS) ref.states[grid] = Buffer.from(await stateAfter(p, grid, grid));
  const chat = await fetchText(port, '/v1/chat/completions', post(CHAT));
  must(chat.status === 200, `chat: ${chat.body}`);
  ref.chat = JSON.parse(chat.body).choices[0].message.content;
  await p.close();
  return ref;
}

const CHAT = { messages: [{ role: 'user', content: 'Tell me a story.' }], temperature: 0, max_tokens: SHORT };

const BAD = [ // text that is answered with bad_request, the connection living on
  'hello', '{', '[]', 'null', '{"op":"hello"} x', '{"op":5}', '{"op":"nonsense"}', '{"op":"infer"}', '{"op":"infer","prompt":""}',
  '{"op":"infer","prompt":5}', '{"op":"infer","prompt":"x","params":[]}', '{"op":"infer","prompt":"x","params":{"temp":"hot"}}',
  '{"op":"infer","prompt":"x","params":{"max_tokens":1e300}}',
  '{"op":"infer","prompt":"x","messages":[]}', '{"op":"sim_create","grid":"big"}', '{"op":"sim_create","grid":-4}', '[' .repeat(5000),
];

/** rnd(n): a whole number below n. */
export function scenarios(port, ref, rnd) {
  const prompt = () => PROMPTS[rnd(PROMPTS.length)];
  const of = (what, n) => ref.texts[`${what}/${n}`];
  const visit = async (fn, at) => {
    const p = await Peer.open(port, at);
    try {
      await fn(p);
    } catch (e) {
      p.ws.terminate();
      throw e;
    }
  };
  const text = (p, n, what = prompt()) => Object.assign(p.infer(what, { max_tokens: n }), { want: of(what, n) });
  const check = async (s) => (await s.done(), like(s, s.want));

  return {
    short: [6, () => visit(async (p) => {
      await Promise.all(Array.from({ length: 1 + rnd(3) }, () => check(text(p, SHORT))));
      await p.close();
    })],
    long: [2, () => visit(async (p) => (await check(text(p, LONG)), await p.close()))],
    long_prompt: [1, () => visit(async (p) => {
      await check(Object.assign(p.infer(LONG_PROMPT, { max_tokens: SHORT }), { want: ref.longPrompt }));
      await p.close();
    })],
    queue: [1, () => visit(async (p) => { // more than are decoded at once, two of them aborted while they wait
      const all = Array.from({ length: 12 }, () => text(p, SHORT));
      await Promise.all([p.abort(all[10]), p.abort(all[11])]);
      await Promise.all(all.map(check));
      await p.close();
    })],
    session: [1, () => visit(async (p) => {
      const { session_id } = await p.ask({ op: 'create_session' }, (m) => m.op === 'session_created');
      const more = { session_id };
      const first = Object.assign(p.infer(PROMPTS[0], { max_tokens: SHORT }, more), { want: of(PROMPTS[0], SHORT) });
      await check(first);
      await check(Object.assign(p.infer(THEN, { max_tokens: SHORT }, more), { want: ref.second }));
      if (rnd(2)) await p.ask({ op: 'close_session', session_id }, (m) => m.op === 'session_closed');
      await p.close();
    })],
    abort_decoding: [2, () => visit(async (p) => {
      const [s, other] = [text(p, LONG), text(p, SHORT)];
      await s.reached(1 + rnd(60));
      await p.abort(s);
      like(s, s.want);
      await check(other);
      await p.close();
    })],
    abort_prompt: [1, () => visit(async (p) => {
      const s = p.infer(LONG_PROMPT, { max_tokens: SHORT });
      if (rnd(2)) await sleep(rnd(5));
      await p.abort(s);
      like(s, ref.longPrompt);
      await p.close();
    })],
    abort_over: [1, () => visit(async (p) => {
      const s = text(p, SHORT);
      await check(s);
      const ack = await p.ask({ op: 'abort', id: s.id }, (m) => m.op === 'abort');
      must(ack.status === 'not_found', `an abort of what is over: ${ack.status}`);
      await p.close();
    })],
    disconnect: [2, () => visit(async (p) => { // in mid-stream, while it is read, or at once
      const s = rnd(3) ? text(p, LONG) : p.infer(LONG_PROMPT, {});
      if (rnd(4)) await s.reached(1 + rnd(30));
      p.ws.terminate();
      await p.closed.promise;
    })],
    slow: [1, () => visit(async (p) => { // reads nothing for a while, then all
      const s = text(p, LONG);
      const { sim_id } = await p.call('sim_create', { grid: 32, view: 'fields', encoding: 'f32', rate: 30 }, 'sim_created');
      await p.call('sim_run', { sim_id, steps: 20 }, 'sim_status');
      p.ws.pause();
      await sleep(500 + rnd(1000));
      p.ws.resume();
      await check(s);
      await p.close();
    })],
    never_reads: [0.2, () => visit(async (p) => { // asks and asks: closed with 1013, in the end
      await check(text(p, SHORT));
      p.ws.pause();
      for (let i = 0; i < 400 && p.ws._socket && !p.ws._socket.destroyed && p.ws.bufferedAmount < 1 << 20; i++) {
        for (let k = 0; k < 250; k++) p.send('{"op":"hello"}');
        await sleep(5);
      }
      p.ws.resume();
      const code = await within(p.closed.promise, 'close of a client that never reads');
      must(code === 1013 || code === 1006, `a client that never reads was closed with ${code}`);
    })],
    bad_input: [2, () => visit(async (p) => {
      for (let i = 0; i < 6; i++) await p.bad(BAD[rnd(BAD.length)], 'bad_request');
      await p.bad({ op: 'infer', prompt: 'x', params: { stop: Array(17).fill('a') } }, 'too_large');
      await p.bad({ op: 'sim_step', sim_id: 'sim_0' }, 'not_found');
      if (rnd(4) === 0) await p.bad('x'.repeat((1 << 20) + 1 + rnd(100_000)), 'too_large');
      const error = p.wait((m) => m.op === 'error', 'error'); // an end follows it where the request had begun
      p.infer('x', { grammar: 'branch ::= leaf' });
      must((await error).code === 'bad_request', `a grammar without root: ${(await error).code}`);
      await check(text(p, SHORT)); // and is served none the worse
      await p.close();
    })],
    bad_utf8: [0.5, () => visit(async (p) => {
      const error = p.wait((m) => m.op === 'error', 'error for what is not UTF-8');
      p.ws.send(Buffer.from([0x7b, 0xff, 0xfe]), { binary: false });
      must((await error).code === 'bad_request', 'not UTF-8');
      must((await within(p.closed.promise, 'close')) === 1007, 'not UTF-8 is closed with 1007');
    })],
    sim_exact: [2, () => visit(async (p) => {
      const grid = GRIDS[rnd(GRIDS.length)];
      must(ref.states[grid].equals(await stateAfter(p, grid, grid)), `grid ${grid}: another state than before`);
      await p.close();
    })],
    sim_life: [2, () => visit(async (p) => {
      const { sim_id } = await p.call('sim_create', { grid: GRIDS[rnd(GRIDS.length)], seed: rnd(1000), rate: 40, view: ['phase', 'real', 'phase_hsv', 'flow'][rnd(4)], encoding: ['u8', 'f32'][rnd(2)] }, 'sim_created');
      await p.call('sim_run', { sim_id }, 'sim_status');
      await p.wait((m) => m.op === 'frame' && m.step >= 8, 'frame of step 8');
      if (rnd(3) === 0) return p.ws.terminate(); // while it runs
      await p.call('sim_tool', { sim_id, tool: 'vortex' }, 'sim_status');
      const { step } = await p.call('sim_pause', { sim_id }, 'sim_status');
      must(step >= 8, `paused at ${step} after a frame of 8`);
      must((await run(p, sim_id, 2, { rate: 0 })).step === step + 2, 'two steps are two');
      unitNorm(await p.call('sim_state', { sim_id }, 'state'));
      p.resets.add(sim_id);
      must((await p.call('sim_reset', { sim_id }, 'sim_status')).step === 0, 'reset');
      await p.call('sim_close', { sim_id }, 'sim_closed');
      await p.call('sim_run', { sim_id }, 'error', 'not_found');
      await p.close();
    })],
    atheria: [0.5, () => visit(async (p) => {
      const first = p.wait((m) => m.op === 'pair', 'frame');
      p.send({ scope: 'inference', command: 'load_experiment', args: { experiment_name: LAW, grid_size: 16 } });
      await first;
      await p.close();
    }, '/ws')],
    metrics: [0.5, () => visit(async (p) => {
      await p.ask({ op: 'subscribe_metrics' }, (m) => m.op === 'metrics_subscribed');
      must((await p.wait((m) => m.op === 'metrics', 'metrics')).inference.total_tokens_generated > 0, 'metrics count tokens');
      await p.close();
    })],
    http: [2, async () => {
      for (const at of ['/health', '/ready', '/metrics', '/v1/models', '/v1/laws', '/v1/sims', '/']) {
        const { status } = await fetchText(port, at);
        must(status === 200, `${at}: ${status}`);
      }
      must((await fetchText(port, '/nowhere')).status === 404, '/nowhere');
      must((await fetchText(port, '/v1/chat/completions', { ...post({}), body: '{' })).status === 400, 'a body that is not JSON');
    }],
    chat: [2, async () => {
      const stream = rnd(2) === 1;
      const { status, body } = await fetchText(port, '/v1/chat/completions', post({ ...CHAT, stream }));
      must(status === 200, `chat: ${status} ${body}`);
      const events = stream ? body.split('\n').filter((l) => l.startsWith('data: ')).map((l) => l.slice(6)) : [];
      must(!stream || events.pop() === '[DONE]', 'a stream ends with [DONE]');
      const said = stream ? events.map((e) => JSON.parse(e).choices[0]?.delta.content ?? '').join('') : JSON.parse(body).choices[0].message.content;
      must(said === ref.chat, `chat said ${JSON.stringify(said)}`);
    }],
    http_gone: [1, async () => { // half a request, or a stream that nobody waits for
      const s = net.connect(port, '127.0.0.1');
      s.on('error', () => {});
      const body = JSON.stringify({ ...CHAT, max_tokens: LONG, stream: true });
      s.write(`POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: ${body.length}\r\n\r\n${rnd(2) ? body : body.slice(0, 9)}`);
      await sleep(20 + rnd(60));
      s.destroy();
    }],
  };
}
