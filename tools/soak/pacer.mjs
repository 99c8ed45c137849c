// The stream whose token gaps are measured: a thread of its own, so that the other clients' work does not count. One
// connection for the whole run; a fixed answer again and again, at a fixed pace. Posts {gaps, wrong} each second.
import { parentPort, workerData } from 'node:worker_threads';
import { like } from './clients.mjs';
import { Peer, sleep } from './wire.mjs';

const { port, prompt, tokens, everyMs, want } = workerData;
let gaps = [], answers = 0, stop = false;
parentPort.on('message', () => (stop = true));
const post = () => {
  parentPort.postMessage({ gaps, answers });
  gaps = [];
  answers = 0;
};

try {
  const p = await Peer.open(port);
  const timer = setInterval(post, 1000);
  const take = p.take.bind(p);
  let last = 0;
  p.ws.removeAllListeners('message');
  p.ws.on('message', (data, binary) => {
    const now = performance.now(); // before anything else is done with it
    const had = p.current?.tokens.length ?? 0;
    take(data, binary);
    if (!p.current || p.current.tokens.length === had) return;
    if (had > 0) gaps.push(now - last);
    last = now;
  });
  for (let next = performance.now(); !stop; await sleep(Math.max(0, (next += everyMs) - performance.now()))) {
    p.current = p.infer(prompt, { max_tokens: tokens }, { priority: 'high' }); // it is to stream, not to wait
    await p.current.done();
    like(p.current, want);
    p.streams.clear();
    answers++;
    if (performance.now() - next > 60_000) next = performance.now(); // a machine that slept
  }
  clearInterval(timer);
  post();
  await p.close();
} catch (e) {
  parentPort.postMessage({ gaps: [], answers: 0, wrong: e.message });
}
process.exit(0); // of this thread
