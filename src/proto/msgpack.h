/* Writing MessagePack (msgpack.org) into a buffer: what Atheria's frames need. */
#ifndef IC_PROTO_MSGPACK_H
#define IC_PROTO_MSGPACK_H

#include <string.h>

#include "base/buf.h"

static inline void ic_mp_be(struct ic_buf *b, unsigned char type, uint64_t v, int bytes)
{
    unsigned char raw[9] = {type};
    for (int i = 0; i < bytes; i++)
        raw[1 + i] = (unsigned char)(v >> (8 * (bytes - 1 - i)));
    ic_buf_put(b, raw, (size_t)bytes + 1);
}

static inline void ic_mp_map(struct ic_buf *b, uint32_t n) /* n keys, each followed by its value */
{
    ic_mp_be(b, 0xDF, n, 4);
}

static inline void ic_mp_array(struct ic_buf *b, uint32_t n)
{
    if (n < 16)
        ic_mp_be(b, (unsigned char)(0x90 | n), 0, 0);
    else
        ic_mp_be(b, 0xDD, n, 4);
}

static inline void ic_mp_str(struct ic_buf *b, const char *s)
{
    size_t n = strlen(s);
    if (n < 32)
        ic_mp_be(b, (unsigned char)(0xA0 | n), 0, 0);
    else
        ic_mp_be(b, 0xDB, n, 4);
    ic_buf_put(b, s, n);
}

static inline void ic_mp_nil(struct ic_buf *b)
{
    ic_mp_be(b, 0xC0, 0, 0);
}

static inline void ic_mp_bool(struct ic_buf *b, bool v)
{
    ic_mp_be(b, v ? 0xC3 : 0xC2, 0, 0);
}

static inline void ic_mp_int(struct ic_buf *b, int64_t v)
{
    if (v >= 0 && v < 128)
        ic_mp_be(b, (unsigned char)v, 0, 0);
    else if (v >= INT32_MIN && v <= INT32_MAX) /* browsers read 64-bit integers as BigInt or not at all */
        ic_mp_be(b, 0xD2, (uint32_t)v, 4);
    else
        ic_mp_be(b, 0xD3, (uint64_t)v, 8);
}

static inline void ic_mp_f32(struct ic_buf *b, float v)
{
    uint32_t u;
    memcpy(&u, &v, sizeof u);
    ic_mp_be(b, 0xCA, u, 4);
}

static inline void ic_mp_f64(struct ic_buf *b, double v)
{
    uint64_t u;
    memcpy(&u, &v, sizeof u);
    ic_mp_be(b, 0xCB, u, 8);
}

#endif
