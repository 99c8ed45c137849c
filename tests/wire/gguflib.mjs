// GGUF files made byte by byte: what is in one, and another with some of it changed.
import assert from 'node:assert/strict';
import fs from 'node:fs';

export const [T_U32, T_BOOL, T_STRING, T_ARRAY] = [4, 7, 8, 9];
const SIZES = { 0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8 };
const ALIGN = 32;

export const u32 = (v) => Buffer.from(Uint32Array.of(v).buffer);
const u64 = (v) => Buffer.from(BigUint64Array.of(BigInt(v)).buffer);
const str = (s) => Buffer.concat([u64(s.length), s]);
const padded = (n) => Math.ceil(n / ALIGN) * ALIGN;

/** Keys (with raw values, arrays of strings as lists) and tensors of a GGUF file. */
export function parse(file) {
  const data = fs.readFileSync(file);
  let at = 8;
  const number = (size) => ((at += size), size === 4 ? data.readUInt32LE(at - 4) : Number(data.readBigUInt64LE(at - 8)));
  const take = (n) => data.subarray(at, (at += n));
  const string = () => take(number(8));
  const value = (type) => {
    if (type === T_STRING) return str(string());
    if (type !== T_ARRAY) return take(SIZES[type]);
    const [inner, n] = [number(4), number(8)];
    return inner === T_STRING ? Array.from({ length: n }, string) : Buffer.concat([u32(inner), u64(n), take(n * SIZES[inner])]);
  };
  const [n_tensors, n_keys] = [number(8), number(8)];
  const keys = Array.from({ length: n_keys }, () => {
    const [key, type] = [string().toString(), number(4)];
    return { key, type, value: value(type) };
  });
  const tensors = Array.from({ length: n_tensors }, () => {
    const t = { name: string().toString(), ne: Array.from({ length: number(4) }, () => number(8)), type: number(4), at: number(8) };
    return { ...t, bytes: 4 * t.ne.reduce((a, b) => a * b) };
  });
  const start = padded(at);
  for (const t of tensors) {
    assert.equal(t.type, 0, 'float32 only');
    t.data = data.subarray(start + t.at, start + t.at + t.bytes);
  }
  return { keys, tensors };
}

export function write(file, { keys, tensors }) {
  const head = [Buffer.from('GGUF'), u32(3), u64(tensors.length), u64(keys.length)];
  for (const k of keys) {
    const v = Array.isArray(k.value) ? Buffer.concat([u32(T_STRING), u64(k.value.length), ...k.value.map(str)]) : k.value;
    head.push(str(Buffer.from(k.key)), u32(k.type), v);
  }
  let at = 0;
  for (const t of tensors) {
    head.push(str(Buffer.from(t.name)), u32(t.ne.length), ...t.ne.map(u64), u32(0), u64(at));
    at += padded(t.bytes);
  }
  const all = Buffer.concat(head);
  const body = tensors.flatMap((t) => [t.data, Buffer.alloc(padded(t.bytes) - t.bytes)]);
  fs.writeFileSync(file, Buffer.concat([all, Buffer.alloc(padded(all.length) - all.length), ...body]));
  return file;
}
