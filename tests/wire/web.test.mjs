// What a browser gets: the built-in page, or a folder in its place, and the page at work in headless Chromium.
//
// IC_CHROMIUM: the browser's path. IC_SCREENSHOT: a file for a picture of the page. Without a browser or playwright-core the
// part that needs one says so and is skipped.
import test from 'node:test';
import assert from 'node:assert/strict';
import { once } from 'node:events';
import fs from 'node:fs';
import http from 'node:http';
import path from 'node:path';
import { Server, rawSocket, tempDir, until, withServer, within, GIVE_UP_MS, MODEL } from './lib.mjs';
import { AtheriaClient, LAW, LAW_NAME, SimClient, lawServer, sims } from './simlib.mjs';

const server = await Server.start(['--law', LAW, '--ctx-size', '4096', '--kv-size', '65536']);

test('the built-in page', async () => {
  const r = await server.http('/');
  assert.equal(r.status, 200);
  assert.match(r.headers['content-type'], /^text\/html; charset=utf-8/);
  assert.match(r.headers['content-security-policy'], /default-src 'none'/);
  assert.equal(r.headers['x-content-type-options'], 'nosniff');
  assert.match(r.body, /<canvas/);
  assert.match(r.body, /<\/html>\s*$/);
  const head = await server.http('/', { method: 'HEAD' });
  assert.equal(head.status, 200);
  assert.equal(head.body, '');
  assert.equal((await server.http('/', { method: 'POST' })).status, 405);
  assert.equal((await server.http('/index.php')).status, 404);
});

test('--web-root DIR serves that folder at /, beside everything else', async (t) => {
  const dir = tempDir(t);
  fs.mkdirSync(path.join(dir, 'assets'));
  fs.writeFileSync(path.join(dir, 'index.html'), '<!doctype html><title>another client</title>');
  fs.writeFileSync(path.join(dir, 'assets/app.js'), 'export default 7;\n');
  fs.writeFileSync(path.join(path.dirname(dir), `${path.basename(dir)}-secret`), 'secret');
  t.after(() => fs.rmSync(`${dir}-secret`, { force: true }));
  await withServer(['--law', LAW, '--web-root', dir], async (s) => {
    const page = await s.http('/');
    assert.equal(page.status, 200);
    assert.match(page.headers['content-type'], /^text\/html/);
    assert.match(page.body, /another client/);
    const js = await s.http('/assets/app.js');
    assert.equal(js.status, 200);
    assert.match(js.headers['content-type'], /javascript/);
    assert.equal(js.body, 'export default 7;\n');
    assert.equal((await s.http('/missing.js')).status, 404);
    for (const evil of [`/../${path.basename(dir)}-secret`, `/%2e%2e/${path.basename(dir)}-secret`, `/assets/..%2f..%2f${path.basename(dir)}-secret`]) {
      const raw = await rawSocket(s, `GET ${evil} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n`);
      await within(raw.ended, evil);
      assert.doesNotMatch(raw.got.toString(), /secret$/, evil);
    }
    for (const own of ['/health', '/v1/laws', '/metrics', '/v1/sims']) assert.equal((await s.http(own)).status, 200, own);
    const { decode } = await import('@msgpack/msgpack').catch(() => ({}));
    if (decode) {
      const a = await AtheriaClient.open(s, decode);
      assert.equal((await a.load()).map_data.length, 16);
      await a.close();
    }
    const c = await SimClient.open(s);
    await c.create();
    await c.close();
  }, { model: null });
});

// ---- in a browser ------------------------------------------------------------------------------------------------

const chromium = process.env.IC_CHROMIUM ?? '/usr/bin/chromium';
const playwright = await import('playwright-core').then((m) => m.default ?? m, () => null);
const skip = !fs.existsSync(chromium) ? `no browser at ${chromium} (Debian: chromium)` : !playwright ? 'the npm package playwright-core is missing' : false;

const FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync'];

/** What the canvas shows: its step, and a fingerprint of its pixels. */
const look = (page) =>
  page.evaluate(() => {
    const c = document.querySelector('#canvas');
    const px = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
    let hash = 0;
    const colours = new Set();
    for (let i = 0; i < px.length; i += 4) {
      const v = (px[i] << 16) | (px[i + 1] << 8) | px[i + 2];
      hash = (Math.imul(hash, 31) + v) | 0;
      if (colours.size < 1000) colours.add(v);
    }
    return { step: Number(c.dataset.step ?? -1), hash, colours: colours.size, side: c.width };
  });

test('the page in Chromium: a picture that moves, an answer that streams', { skip }, async (t) => {
  const browser = await playwright.chromium.launch({ executablePath: chromium, args: FLAGS, timeout: GIVE_UP_MS });
  t.after(() => browser.close());
  const page = await browser.newPage({ viewport: { width: 1100, height: 1000 } });
  page.setDefaultTimeout(GIVE_UP_MS);
  const complaints = [];
  page.on('console', (m) => ['error', 'warning'].includes(m.type()) && !/willReadFrequently/.test(m.text()) && complaints.push(m.text())); // look() reads back
  page.on('pageerror', (e) => complaints.push(String(e)));
  page.on('requestfailed', (r) => complaints.push(`${r.url()} ${r.failure()?.errorText}`));
  await page.goto(`http://127.0.0.1:${server.port}/`);

  const shown = (pred, what) => until(async () => { const s = await look(page); return pred(s) && s; }, what);
  const a = await shown((s) => s.step > 0 && s.colours > 100, 'a picture');
  const b = await shown((s) => s.step > a.step + 3 && s.hash !== a.hash, 'a picture that moves');
  assert.equal(b.side, 128);
  assert.match(await page.textContent('#metrics'), /channel entropy/);
  assert.ok((await page.$$eval('#law option', (o) => o.map((x) => x.text))).includes(LAW_NAME));

  await page.click('#play');
  await until(async () => (await page.textContent('#play')) === 'Run', 'the pause');
  await until(async () => (await sims(server))[0].status === 'paused', 'the server to pause');
  const still = await look(page);
  await page.selectOption('#view', 'phase'); // shown though nothing moves
  const grey = await shown((s) => s.hash !== still.hash && s.colours <= 256 && s.colours > 20, 'another view of the same');
  await page.selectOption('#view', 'fields');
  await shown((s) => s.hash !== grey.hash, 'yet another');
  const before = await look(page);
  const box = await page.locator('#canvas').boundingBox();
  await page.mouse.click(box.x + box.width / 3, box.y + box.height / 3);
  await shown((s) => s.hash !== before.hash, 'the vortex that was stirred');
  await page.click('#reset');
  await shown((s) => s.step === 0, 'the start again');
  await page.click('#play');
  await shown((s) => s.step > 5, 'it to go on');
  await page.selectOption('#grid', '64');
  await shown((s) => s.side === 64 && s.step > 2 && s.colours > 100, 'another grid');
  assert.equal((await sims(server)).length, 1, 'the old one has been closed');
  await page.selectOption('#view', 'phase_hsv');

  await page.fill('#prompt', 'Once upon a time, there was a');
  await page.click('#send');
  const text = () => page.textContent('#answer');
  const early = await until(async () => (await text()).length > 20 && (await text()), 'the first words');
  await until(async () => (await text()).length > early.length + 40 || /tokens\/s/.test(await page.textContent('#stats')), 'more of them');
  await until(async () => /\d+ tokens, first after .* tokens\/s/.test(await page.textContent('#stats')), 'the end of the answer');
  assert.ok((await text()).startsWith(early));
  if (process.env.IC_SCREENSHOT) await page.screenshot({ path: process.env.IC_SCREENSHOT, fullPage: true });

  // a long one is stopped
  await page.fill('#prompt', 'The');
  // by a hand that is quicker than any model: at the first word
  await page.evaluate(() => {
    const hand = new MutationObserver(() => {
      if (!document.querySelector('#answer').textContent) return;
      hand.disconnect();
      document.querySelector('#stop').click();
    });
    hand.observe(document.querySelector('#answer'), { childList: true });
  });
  await page.click('#send');
  await until(async () => /abort/.test(await page.textContent('#stats')), 'the stop');
  assert.ok(await page.isDisabled('#stop'));
  await page.fill('#prompt', '   ');
  await page.click('#send'); // nothing to ask
  // a narrow window
  await page.setViewportSize({ width: 380, height: 800 });
  assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), 'nothing sticks out of a narrow window');
  if (process.env.IC_SCREENSHOT) await page.screenshot({ path: process.env.IC_SCREENSHOT.replace(/\.png$/, '-narrow.png'), fullPage: true });
  assert.deepEqual(complaints, [], 'no complaints in the console');
  await page.close();
  await until(async () => (await sims(server)).length === 0, 'the page’s simulation to go with it');
});

test('the page where a model or a law is missing', { skip }, async (t) => {
  const browser = await playwright.chromium.launch({ executablePath: chromium, args: FLAGS, timeout: GIVE_UP_MS });
  t.after(() => browser.close());
  for (const [args, model] of [[[], MODEL], [['--law', LAW], null]])
    await withServer(args, async (s) => {
      const page = await browser.newPage();
      const complaints = [];
      page.on('console', (m) => ['error', 'warning'].includes(m.type()) && !/willReadFrequently/.test(m.text()) && complaints.push(m.text())); // look() reads back
      page.on('pageerror', (e) => complaints.push(String(e)));
      await page.goto(`http://127.0.0.1:${s.port}/`);
      await until(async () => (await page.textContent('#state')).includes(model ? 'no laws' : 'no text model'), 'the page to say so');
      assert.equal(await page.isDisabled('#send'), !model);
      if (!model) await until(async () => (await look(page)).step > 0, 'a picture all the same');
      assert.deepEqual(complaints, []);
      await page.close();
    }, { model });
});

test('a simulation that is refused is explained on the page', { skip }, async (t) => {
  const browser = await playwright.chromium.launch({ executablePath: chromium, args: FLAGS, timeout: GIVE_UP_MS });
  t.after(() => browser.close());
  await withServer(['--law', LAW, '--simulations', '1'], async (s) => {
    const c = await SimClient.open(s);
    await c.create();
    const page = await browser.newPage();
    await page.goto(`http://127.0.0.1:${s.port}/`);
    await until(async () => /simulations are running already/.test(await page.textContent('#hint')), 'a word about it');
    await page.close();
    await c.close();
  }, { model: null });
});

test('a page of another origin: what --origins allows', { skip }, async (t) => {
  const browser = await playwright.chromium.launch({ executablePath: chromium, args: FLAGS, timeout: GIVE_UP_MS });
  t.after(() => browser.close());
  const home = http.createServer((q, r) => r.end('<!doctype html><title>elsewhere</title>')).listen(0, '127.0.0.1');
  t.after(() => home.close());
  await once(home, 'listening');
  const page = await browser.newPage();
  await page.goto(`http://127.0.0.1:${home.address().port}/`);
  const origin = `http://127.0.0.1:${home.address().port}`;
  const ask = (port) => page.evaluate(async (port) => {
    const body = JSON.stringify({ prompt: 'Once', max_tokens: 3 }); // with fields that want a preflight, as OpenAI's client sends them
    const headers = { 'Content-Type': 'application/json', Authorization: 'Bearer none', 'x-stainless-lang': 'js' };
    const answer = await fetch(`http://127.0.0.1:${port}/v1/completions`, { method: 'POST', headers, body })
      .then(async (r) => (await r.json()).choices[0].finish_reason, () => 'refused');
    const greeting = await new Promise((yes) => {
      const ws = new WebSocket(`ws://127.0.0.1:${port}`);
      ws.onmessage = (m) => (yes(JSON.parse(m.data).op), ws.close());
      ws.onerror = () => yes('refused');
    });
    return [answer, greeting];
  }, port);
  for (const [args, want] of [[[], ['refused', 'hello']], [['--origins', origin], ['length', 'hello']], [['--origins', '*'], ['length', 'hello']],
    [['--origins', 'https://a.example'], ['refused', 'refused']]])
    await withServer(args, async (s) => assert.deepEqual(await ask(s.port), want, args.join(' ')));
});

test('the server has survived', () => server.stop());
