/* Decimal bounds and the grammars of digits between them.
 *
 * Bounds are compared as decimals, digit by digit, never as doubles: 0.1 in a schema means one
 * tenth. A range of whole numbers is split by length and then by the first digit that leaves a
 * bound's path, so the text grows with the digits of the bounds, not with their distance. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "text/schema_int.h"

#define FREE_WHOLE 18u /* digits where no bound asks for more */
#define FREE_FRAC 17u

/* The shortest "%.*e" that reads back as v. */
static void shortest(double v, char *out, size_t size)
{
    for (int digits = 0; digits < 17; digits++) {
        snprintf(out, size, "%.*e", digits, v);
        if (strtod(out, NULL) == v)
            return;
    }
}

/* Splits v into its digits and the power of ten of the first one; returns the number of digits. */
static uint32_t split_real(double v, uint8_t digits[20], int *exponent)
{
    char text[40];
    uint32_t n = 0;
    char *p = text;

    shortest(fabs(v), text, sizeof text);
    for (; *p && *p != 'e'; p++)
        if (*p >= '0' && *p <= '9')
            digits[n++] = (uint8_t)(*p - '0');
    *exponent = *p ? atoi(p + 1) : 0;
    while (n > 1 && digits[n - 1] == 0)
        n--;
    return n;
}

void sc_put_real(struct ic_buf *out, double v)
{
    uint8_t d[20];
    int e;
    uint32_t n = split_real(v, d, &e);

    if (signbit(v))
        ic_buf_puts(out, "-");
    bool plain = e >= -5 && e < 17;
    int point = plain ? e : 0; /* digits stand at powers point, point-1, … */
    if (plain && e < 0)
        ic_buf_puts(out, "0");
    for (int k = plain && e < 0 ? -1 : point; k >= 0 || point - k < (int)n; k--) {
        if (k == -1)
            ic_buf_puts(out, ".");
        int at = point - k;
        ic_buf_printf(out, "%d", at >= 0 && at < (int)n ? d[at] : 0);
    }
    if (!plain)
        ic_buf_printf(out, "e%d", e);
}

static bool place_digits(struct sc_dec *out, const uint8_t *d, uint32_t n, int exponent)
{
    if (exponent >= SC_DIGITS || (int)n - exponent - 1 > SC_DIGITS)
        return false;
    for (int k = exponent > 0 ? exponent : 0; k >= 0; k--) {
        int at = exponent - k;
        out->whole[out->nw++] = at >= 0 && at < (int)n ? d[at] : 0;
    }
    for (int k = -1; exponent - k < (int)n; k--)
        out->frac[out->nf++] = exponent - k >= 0 ? d[exponent - k] : 0;
    while (out->nf && !out->frac[out->nf - 1])
        out->nf--;
    if (out->nw == 1 && !out->whole[0] && !out->nf)
        out->neg = false; /* -0 is 0 */
    return true;
}

bool sc_dec_from(const json_t *number, struct sc_dec *out)
{
    uint8_t d[24];
    int e = 0;
    uint32_t n = 0;

    memset(out, 0, sizeof *out);
    if (json_is_integer(number)) {
        char text[32];
        snprintf(text, sizeof text, "%lld", (long long)json_integer_value(number));
        out->neg = text[0] == '-';
        for (const char *p = text + out->neg; *p; p++)
            d[n++] = (uint8_t)(*p - '0');
        return place_digits(out, d, n, (int)n - 1);
    }
    double v = json_real_value(number);
    out->neg = v < 0;
    n = split_real(v, d, &e);
    if (v == 0)
        e = 0;
    return isfinite(v) && place_digits(out, d, n, e);
}

static int cmp_abs(const struct sc_dec *a, const struct sc_dec *b)
{
    if (a->nw != b->nw)
        return a->nw < b->nw ? -1 : 1;
    int r = memcmp(a->whole, b->whole, a->nw);
    for (uint32_t i = 0; !r && (i < a->nf || i < b->nf); i++)
        r = (i < a->nf ? a->frac[i] : 0) - (i < b->nf ? b->frac[i] : 0);
    return r;
}

int sc_dec_cmp(const struct sc_dec *a, const struct sc_dec *b)
{
    if (a->neg != b->neg)
        return a->neg ? -1 : 1;
    return a->neg ? cmp_abs(b, a) : cmp_abs(a, b);
}

void sc_bound_lo(struct sc_bounds *b, const struct sc_dec *v, bool open)
{
    int r = b->has_lo ? sc_dec_cmp(v, &b->lo) : 1;

    if (r > 0)
        b->lo = *v;
    if (r >= 0)
        b->lo_open = open || (r == 0 && b->lo_open);
    b->has_lo = true;
}

void sc_bound_hi(struct sc_bounds *b, const struct sc_dec *v, bool open)
{
    int r = b->has_hi ? sc_dec_cmp(v, &b->hi) : -1;

    if (r < 0)
        b->hi = *v;
    if (r <= 0)
        b->hi_open = open || (r == 0 && b->hi_open);
    b->has_hi = true;
}

bool sc_in_bounds(const struct sc_bounds *b, const struct sc_dec *v)
{
    int lo = b->has_lo ? sc_dec_cmp(v, &b->lo) : 1, hi = b->has_hi ? sc_dec_cmp(v, &b->hi) : -1;

    return (lo > 0 || (lo == 0 && !b->lo_open)) && (hi < 0 || (hi == 0 && !b->hi_open));
}

/* ---- whole numbers ---- */

static bool is_zero(const struct sc_dec *d)
{
    return d->nw == 1 && d->whole[0] == 0 && d->nf == 0;
}

static void add_one(struct sc_dec *d)
{
    uint32_t i = d->nw;

    while (i > 0 && d->whole[i - 1] == 9)
        d->whole[--i] = 0;
    if (i) {
        d->whole[i - 1]++;
        return;
    }
    memmove(d->whole + 1, d->whole, d->nw);
    d->whole[0] = 1;
    d->nw++;
}

static void take_one(struct sc_dec *d) /* from a positive whole number */
{
    uint32_t i = d->nw;

    while (d->whole[i - 1] == 0)
        d->whole[--i] = 9;
    d->whole[i - 1]--;
    if (d->nw > 1 && d->whole[0] == 0)
        memmove(d->whole, d->whole + 1, --d->nw);
}

/* Most readers take a number for a double, and must not read what is written just past an open bound as the bound itself. So
 * it becomes a closed one at the next double; but not at 0, far from all that can be written, nor where that takes too
 * many digits. */
static void close_bound(struct sc_dec *d, bool *open, double towards)
{
    char text[2 * sizeof d->whole + 4], *p = text;
    uint8_t of[20];
    int e;

    if (!*open || is_zero(d))
        return;
    if (d->neg)
        *p++ = '-';
    for (uint32_t i = 0; i < d->nw; i++)
        *p++ = (char)('0' + d->whole[i]);
    *p++ = '.';
    for (uint32_t i = 0; i < d->nf; i++)
        *p++ = (char)('0' + d->frac[i]);
    *p = 0;
    double v = nextafter(strtod(text, NULL), towards);
    struct sc_dec next = {.neg = v < 0};
    uint32_t n = split_real(v, of, &e);
    if (v != 0 && isfinite(v) && place_digits(&next, of, n, e)) {
        *d = next;
        *open = false;
    }
}

static void negate(struct sc_dec *d)
{
    d->neg = !d->neg && !is_zero(d);
}

/* The least whole number that is >= d, or > d if open. */
static void round_up(struct sc_dec *d, bool open)
{
    bool exact = d->nf == 0;

    d->nf = 0;
    if (d->neg) {
        if (exact && open)
            take_one(d);
        if (is_zero(d))
            d->neg = false;
    } else if (!exact || open) {
        add_one(d);
    }
}

static struct sc_dec nines(uint32_t n)
{
    struct sc_dec d = {.nw = n};
    memset(d.whole, 9, n);
    return d;
}

static struct sc_dec small(uint8_t v)
{
    return (struct sc_dec){.nw = 1, .whole = {v}};
}

static bool all_of(const uint8_t *d, uint32_t n, uint8_t v)
{
    for (uint32_t i = 0; i < n; i++)
        if (d[i] != v)
            return false;
    return true;
}

static uint32_t digits(struct sc *c, uint32_t lo, uint32_t hi)
{
    return sc_range1(c, '0' + lo, '0' + hi);
}

/* n digits d with lo <= d <= hi, all of the same length */
static uint32_t same_length(struct sc *c, const uint8_t *lo, const uint8_t *hi, uint32_t n)
{
    static const uint8_t zero[SC_DIGITS + 8];
    uint32_t alts[3], m = 0, from = lo[0], to = hi[0];

    if (n == 0)
        return SC_NODE_EMPTY;
    if (lo[0] == hi[0])
        return SC_SEQ(c, digits(c, lo[0], lo[0]), same_length(c, lo + 1, hi + 1, n - 1));
    struct sc_dec nine = nines(n);
    if (!all_of(lo + 1, n - 1, 0)) {
        alts[m++] = SC_SEQ(c, digits(c, from, from), same_length(c, lo + 1, nine.whole, n - 1));
        from++;
    }
    bool cut = !all_of(hi + 1, n - 1, 9);
    if (cut)
        to--;
    if (from <= to)
        alts[m++] = SC_SEQ(c, digits(c, from, to), sc_rep(c, digits(c, 0, 9), n - 1, n - 1));
    if (cut)
        alts[m++] = SC_SEQ(c, digits(c, hi[0], hi[0]), same_length(c, zero, hi + 1, n - 1));
    return sc_alt(c, alts, m);
}

/* whole numbers lo <= x <= hi, neither negative */
static uint32_t natural_range(struct sc *c, const struct sc_dec *lo, const struct sc_dec *hi)
{
    if (cmp_abs(lo, hi) > 0)
        return SC_NODE_NEVER;
    if (lo->nw == hi->nw)
        return same_length(c, lo->whole, hi->whole, lo->nw);
    struct sc_dec top = nines(lo->nw), bottom = {.nw = hi->nw, .whole = {1}};
    uint32_t alts[3], m = 0;
    alts[m++] = same_length(c, lo->whole, top.whole, lo->nw);
    if (hi->nw - lo->nw > 1)
        alts[m++] = SC_SEQ(c, digits(c, 1, 9), sc_rep(c, digits(c, 0, 9), lo->nw, hi->nw - 2));
    alts[m++] = same_length(c, bottom.whole, hi->whole, hi->nw);
    return sc_alt(c, alts, m);
}

uint32_t sc_integer_range(struct sc *c, const struct sc_bounds *b)
{
    struct sc_dec lo = b->lo, hi = b->hi, none = small(0), one = small(1);
    bool lo_open = b->lo_open, hi_open = b->hi_open;
    uint32_t k = FREE_WHOLE;

    if (!b->has_lo && !b->has_hi)
        return sc_integer(c);
    if (b->has_lo) {
        close_bound(&lo, &lo_open, INFINITY);
        round_up(&lo, lo_open);
    }
    if (b->has_hi) {
        close_bound(&hi, &hi_open, -INFINITY);
        negate(&hi);
        round_up(&hi, hi_open);
        negate(&hi);
    }
    if (b->has_lo && lo.nw > k)
        k = lo.nw;
    if (b->has_hi && hi.nw > k)
        k = hi.nw;
    if (!b->has_hi)
        hi = nines(k);
    if (!b->has_lo) {
        lo = nines(k);
        lo.neg = true;
    }
    uint32_t plus = hi.neg ? SC_NODE_NEVER : natural_range(c, lo.neg ? &none : &lo, &hi);
    uint32_t minus = SC_NODE_NEVER;
    if (lo.neg && sc_dec_cmp(&lo, &hi) <= 0)
        minus = SC_SEQ(c, sc_lits(c, "-"), natural_range(c, hi.neg ? &hi : &one, &lo));
    return SC_ALT(c, plus, minus);
}

/* ---- fractions ---- */

/* A fraction whose whole part equals that of a bound: `lo`, `hi`, or NULL where that bound is past. */
struct tail {
    struct sc *c;
    const struct sc_dec *lo, *hi;
    bool lo_open, hi_open;
    uint32_t max; /* digits at most */
};

/* May the number end after i digits that all equal the bounds still in force? */
static bool may_end(const struct tail *t, uint32_t i, bool at_lo, bool at_hi)
{
    return (!at_lo || (i >= t->lo->nf && !t->lo_open)) && (!at_hi || i < t->hi->nf || !t->hi_open);
}

static uint32_t fraction(const struct tail *t, uint32_t i, bool at_lo, bool at_hi, bool must)
{
    struct sc *c = t->c;
    uint32_t alts[4], m = 0;

    if (at_lo && i >= t->lo->nf && !t->lo_open)
        at_lo = false;                     /* whatever follows keeps it at or above */
    if (at_hi && !at_lo && i >= t->hi->nf) /* only zeros may follow */
        return t->hi_open ? SC_NODE_NEVER : sc_rep(c, digits(c, 0, 0), must, t->max - i);
    if (!at_lo && !at_hi)
        return sc_rep(c, digits(c, 0, 9), must, t->max - i);
    if (!must && may_end(t, i, at_lo, at_hi))
        alts[m++] = SC_NODE_EMPTY;
    if (i < t->max) {
        uint32_t low = at_lo && i < t->lo->nf ? t->lo->frac[i] : 0;
        uint32_t high = !at_hi ? 9 : i < t->hi->nf ? t->hi->frac[i] : 0;
        if (at_lo && at_hi && low == high) {
            alts[m++] = SC_SEQ(c, digits(c, low, low), fraction(t, i + 1, true, true, false));
        } else if (low <= high) {
            uint32_t from = low + at_lo, to = high + 1 - at_hi; /* [from, to) is free */
            if (at_lo)
                alts[m++] = SC_SEQ(c, digits(c, low, low), fraction(t, i + 1, true, false, false));
            if (from < to)
                alts[m++] = SC_SEQ(c, digits(c, from, to - 1), fraction(t, i + 1, false, false, false));
            if (at_hi)
                alts[m++] = SC_SEQ(c, digits(c, high, high), fraction(t, i + 1, false, true, false));
        }
    }
    return sc_alt(c, alts, m);
}

static uint32_t with_point(const struct tail *t)
{
    uint32_t some = SC_SEQ(t->c, sc_lits(t->c, "."), fraction(t, 0, t->lo, t->hi, true));

    return may_end(t, 0, t->lo, t->hi) ? SC_ALT(t->c, SC_NODE_EMPTY, some) : some;
}

static uint32_t max2(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

/* lo .. hi, neither negative, either end open */
static uint32_t positive_range(struct sc *c, const struct sc_dec *lo, bool lo_open, const struct sc_dec *hi,
                               bool hi_open)
{
    struct tail t = {.c = c, .lo_open = lo_open, .hi_open = hi_open};
    struct sc_dec wl = *lo, wh = *hi;
    uint32_t alts[3];

    if (cmp_abs(lo, hi) > 0)
        return SC_NODE_NEVER;
    t.max = max2(FREE_FRAC, max2(lo->nf, hi->nf) + 4);
    wl.nf = wh.nf = 0;
    if (!cmp_abs(&wl, &wh)) {
        t.lo = lo;
        t.hi = hi;
        return SC_SEQ(c, natural_range(c, &wl, &wl), with_point(&t));
    }
    t.lo = lo;
    alts[0] = SC_SEQ(c, natural_range(c, &wl, &wl), with_point(&t));
    t.lo = NULL;
    t.hi = hi;
    alts[2] = SC_SEQ(c, natural_range(c, &wh, &wh), with_point(&t));
    t.hi = NULL;
    add_one(&wl);
    take_one(&wh);
    alts[1] = SC_SEQ(c, natural_range(c, &wl, &wh), with_point(&t));
    return sc_alt(c, alts, 3);
}

uint32_t sc_number_range(struct sc *c, const struct sc_bounds *b)
{
    struct sc_dec lo = b->lo, hi = b->hi, none = small(0), limit = small(1);
    bool lo_open = b->lo_open, hi_open = b->hi_open;
    uint32_t k = FREE_WHOLE;

    if (!b->has_lo && !b->has_hi)
        return sc_number(c);
    if (b->has_lo)
        close_bound(&lo, &lo_open, INFINITY);
    if (b->has_hi)
        close_bound(&hi, &hi_open, -INFINITY);
    k = max2(k, max2(b->has_lo ? lo.nw : 0, b->has_hi ? hi.nw : 0));
    limit.nw = k + 1; /* 10^k: below it means at most k digits */
    if (!b->has_hi) {
        hi = limit;
        hi_open = true;
    }
    if (!b->has_lo) {
        lo = limit;
        lo.neg = lo_open = true;
    }
    uint32_t plus = SC_NODE_NEVER, minus = SC_NODE_NEVER;
    if (!hi.neg)
        plus = positive_range(c, lo.neg ? &none : &lo, !lo.neg && lo_open, &hi, hi_open);
    if (lo.neg && sc_dec_cmp(&lo, &hi) <= 0)
        minus = SC_SEQ(c, sc_lits(c, "-"),
                       positive_range(c, hi.neg ? &hi : &none, !hi.neg || hi_open, &lo, lo_open));
    return SC_ALT(c, plus, minus);
}
