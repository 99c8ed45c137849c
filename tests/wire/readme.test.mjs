// The clients in README.md do what it says: they print the answer as it comes, and end.
import test from 'node:test';
import assert from 'node:assert/strict';
import fs from 'node:fs';
import path from 'node:path';
import { once } from 'node:events';
import { spawn, spawnSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { Server, tempDir, within } from './lib.mjs';

const root = path.join(path.dirname(fileURLToPath(import.meta.url)), '../..');
const readme = fs.readFileSync(path.join(root, 'README.md'), 'utf8');
const server = await Server.start();

/** The snippets of a language, with the server's port in the place of the default one. */
function snippets(language) {
  const all = [...readme.matchAll(new RegExp(`^\`\`\`${language}\\n(.*?)^\`\`\`$`, 'gms'))].map((m) => m[1]);
  assert.ok(all.length > 0, `README.md has a snippet in ${language}`);
  return all.map((s) => {
    assert.ok(s.includes('127.0.0.1:3000'), 'it speaks to the default port');
    return s.replaceAll('127.0.0.1:3000', `127.0.0.1:${server.port}`);
  });
}

async function prints(command, args, cwd) {
  const tokens = async () => (await server.metrics()).ic_text_tokens_total;
  const before = await tokens();
  const p = spawn(command, args, { cwd, stdio: ['ignore', 'pipe', 'pipe'] });
  const out = { stdout: '', stderr: '' };
  for (const s of ['stdout', 'stderr']) p[s].setEncoding('utf8').on('data', (d) => (out[s] += d));
  const [code] = await within(once(p, 'close'), `${command} to end`).finally(() => p.kill('SIGKILL'));
  assert.equal(code, 0, out.stderr);
  assert.equal(out.stderr, '');
  assert.match(out.stdout, /\w+ \w+/, 'it has printed words');
  const n = (await tokens()) - before;
  assert.ok(n > 0 && n <= 64, `max_tokens 64 is obeyed: ${n}`);
}

test('JavaScript', async (t) => {
  const dir = tempDir(t);
  fs.symlinkSync(path.join(root, 'tests/node_modules'), path.join(dir, 'node_modules'));
  for (const [i, code] of snippets('js').entries()) {
    fs.writeFileSync(path.join(dir, `${i}.mjs`), code);
    await prints(process.execPath, [`${i}.mjs`], dir);
  }
});

test('Python', async (t) => {
  const python = ['python3', '/usr/bin/python3'].find((p) => spawnSync(p, ['-c', 'import websockets'], { stdio: 'ignore' }).status === 0);
  if (!python) return t.skip('no python3 with `websockets` (Debian: python3-websockets)');
  const dir = tempDir(t);
  for (const [i, code] of snippets('python').entries()) {
    fs.writeFileSync(path.join(dir, `${i}.py`), code);
    await prints(python, ['-W', 'error', `${i}.py`], dir);
  }
});

test('every option that README.md names exists', async () => {
  const help = spawnSync(process.env.IC_BIN ?? path.join(root, 'build/inference-core'), ['help'], { encoding: 'utf8' }).stdout;
  const code = [...readme.matchAll(/^```.*?^```$/gms), ...readme.matchAll(/`[^`\n]+`/g)].map((m) => m[0]).join('\n');
  const named = new Set([...code.matchAll(/(?<![\w-])--([a-z][a-z-]*)/g)].map((m) => m[1]));
  assert.ok(named.size >= 4);
  for (const o of named) assert.match(help, new RegExp(`--${o}[ =\\n]`), `--${o}`);
});

test('the server has survived', () => server.stop());
