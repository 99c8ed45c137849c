/* UTF-8: validity and whole characters (RFC 3629: no overlong forms, no surrogates, <= U+10FFFF).
 * Pure functions over caller-owned bytes; any thread. */
#ifndef IC_BASE_UTF8_H
#define IC_BASE_UTF8_H

#include <stdbool.h>
#include <stddef.h>

bool ic_utf8_valid(const char *s, size_t len);

/* How many leading bytes of s[0..len) can be sent now: everything but an incomplete character at
 * the very end that further bytes could still complete. Invalid bytes count as sendable (they are
 * replaced by ic_utf8_scrub, never waited for). */
size_t ic_utf8_whole(const char *s, size_t len);

/* Copies s[0..len) to `out`, each maximal invalid subpart replaced by U+FFFD (Unicode's recommended
 * practice). `out` must hold 3*len bytes. Returns the bytes written; writes no NUL. */
size_t ic_utf8_scrub(char *out, const char *s, size_t len);

#endif
