#!/usr/bin/env python3
"""A GGUF model with random weights, for its speed: metadata and tokens of a small llama model, blown up.

    tools/random-model.py SMALL.gguf OUT.gguf [--layers 16] [--width 2048] [--ff 5632] [--heads 32] [--kv-heads 8]
                          [--vocab 32000] [--context 4096]

Weights are f16 (norms f32: ones), one random tile of 2^20 values repeated, so that it takes seconds. The defaults are a model
of a billion parameters. Only the standard library is needed.
"""
import argparse
import random
import struct

U32, F32, STRING, ARRAY = 4, 6, 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
ALIGN = 32


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, n):
        self.at += n
        return self.data[self.at - n:self.at]

    def number(self, form):
        return struct.unpack('<' + form, self.take(struct.calcsize(form)))[0]

    def string(self):
        return self.take(self.number('Q'))

    def value(self, kind):
        """Raw bytes, but arrays: (kind of elements, [raw elements])."""
        if kind == STRING:
            s = self.string()
            return struct.pack('<Q', len(s)) + s
        if kind == ARRAY:
            inner, n = self.number('I'), self.number('Q')
            return inner, [self.value(inner) for _ in range(n)]
        return self.take(SIZES[kind])


def text(s):
    s = s.encode()
    return struct.pack('<Q', len(s)) + s


def pad_vocab(meta, n):
    """Tokens that stand for nothing, so that the output has the width of a real one."""
    have = len(meta['tokenizer.ggml.tokens'][1][1])
    more = range(have, n)
    filler = {'tokenizer.ggml.tokens': lambda i: text(f'<{i}>'), 'tokenizer.ggml.scores': lambda i: struct.pack('<f', -1e6),
              'tokenizer.ggml.token_type': lambda i: struct.pack('<i', 1)}
    for key, make in filler.items():
        if key in meta:
            kind, (inner, values) = meta[key]
            meta[key] = kind, (inner, values[:n] + [make(i) for i in more])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('small')
    p.add_argument('out')
    for name, default in [('layers', 16), ('width', 2048), ('ff', 5632), ('heads', 32), ('kv-heads', 8), ('vocab', 32000), ('context', 4096)]:
        p.add_argument('--' + name, type=int, default=default)
    o = p.parse_args()

    r = Reader(open(o.small, 'rb').read())
    if r.take(4) != b'GGUF' or r.number('I') != 3:
        raise SystemExit(f'{o.small}: not a GGUF file of version 3')
    r.number('Q')
    meta = {}
    for _ in range(r.number('Q')):
        key, kind = r.string().decode(), r.number('I')
        meta[key] = kind, r.value(kind)
    for key, v in [('embedding_length', o.width), ('block_count', o.layers), ('feed_forward_length', o.ff), ('context_length', o.context),
                   ('attention.head_count', o.heads), ('attention.head_count_kv', o.kv_heads), ('rope.dimension_count', o.width // o.heads)]:
        meta['llama.' + key] = U32, struct.pack('<I', v)
    if 'llama.vocab_size' in meta:
        meta['llama.vocab_size'] = U32, struct.pack('<I', o.vocab)
    pad_vocab(meta, o.vocab)

    kv = o.width // o.heads * o.kv_heads
    tensors = [('token_embd.weight', (o.width, o.vocab)), ('output_norm.weight', (o.width,)), ('output.weight', (o.width, o.vocab))]
    for i in range(o.layers):
        for name, shape in [('attn_norm', (o.width,)), ('attn_q', (o.width, o.width)), ('attn_k', (o.width, kv)), ('attn_v', (o.width, kv)),
                            ('attn_output', (o.width, o.width)), ('ffn_norm', (o.width,)), ('ffn_gate', (o.width, o.ff)),
                            ('ffn_up', (o.width, o.ff)), ('ffn_down', (o.ff, o.width))]:
            tensors.append((f'blk.{i}.{name}.weight', shape))

    random.seed(1)
    tile = struct.pack(f'<{1 << 20}e', *(random.gauss(0, 0.02) for _ in range(1 << 20)))
    with open(o.out, 'wb') as f:
        f.write(b'GGUF' + struct.pack('<IQQ', 3, len(tensors), len(meta)))
        for key, (kind, v) in meta.items():
            f.write(text(key) + struct.pack('<I', kind))
            f.write(struct.pack('<IQ', v[0], len(v[1])) + b''.join(v[1]) if kind == ARRAY else v)
        at, sizes = 0, []
        for name, shape in tensors:
            n = shape[0] * (shape[1] if len(shape) > 1 else 1)
            sizes.append(n * (4 if len(shape) == 1 else 2))
            f.write(text(name) + struct.pack('<I', len(shape)) + b''.join(struct.pack('<Q', d) for d in shape))
            f.write(struct.pack('<IQ', 0 if len(shape) == 1 else 1, at))
            at += (sizes[-1] + ALIGN - 1) // ALIGN * ALIGN
        f.write(bytes(-f.tell() % ALIGN))
        for (name, shape), size in zip(tensors, sizes):
            if len(shape) == 1:
                f.write(struct.pack('<f', 1) * shape[0])
            else:
                whole, rest = divmod(size, len(tile))
                for _ in range(whole):
                    f.write(tile)
                f.write(tile[:rest])
            f.write(bytes(-size % ALIGN))


main()
