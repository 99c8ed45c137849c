/* Cells: which sequence holds what, and who has to go when they run out.
 *
 * Every sequence of the model is a slot. One that no run uses keeps what it holds: a prompt that begins alike takes it over
 * whole or shares its first cells (prefix.h counts each once), be it a session that goes on, a system prompt or the
 * same question again. When cells are needed, the sequence whose end was used longest ago loses its end: the part that
 * nobody else holds. That part goes to host memory (spill.h), and from there maybe to a disk, if there is room for it, and comes
 * back when somebody asks for it and copying is quicker than computing.
 *
 * Cells in use never exceed kv_size. One run alone always fits, because ctx_size and what is pinned fit together. */
#include <stdlib.h>
#include <string.h>

#include "sched/text_sched_int.h"

#define NS_PER_BYTE_GUESS 1.0      /* of restoring, before one has been seen: slow */
#define DISK_NS_PER_BYTE_GUESS 1.0 /* of reading a file, likewise */
/* of its price is left each time that it was too dear: a disk that was slow once gets another chance */
#define DISK_FORGIVEN 0.9

static bool is_idle(const struct slot *sl)
{
    return !sl->run && !sl->pinned;
}

static struct ic_seq_set busy_set(const struct ic_text_sched *s, int32_t but)
{
    struct ic_seq_set set = {0};

    for (int32_t i = 0; i < s->n_slots; i++)
        if (!is_idle(&s->slots[i]) || i == but)
            set.word[i / 64] |= UINT64_C(1) << (i % 64);
    return set;
}

int32_t ic_cells_free(const struct ic_text_sched *s)
{
    return s->be->kv_size - ic_prefix_cells(s->prefix);
}

/* Free, and those that could be made free. */
static int32_t cells_possible(const struct ic_text_sched *s, int32_t but)
{
    struct ic_seq_set set = busy_set(s, but);
    return s->be->kv_size - ic_prefix_cells_of(s->prefix, &set);
}

/* Cells that the running ones will need for what they already have, beyond those they hold or will share. */
static int32_t cells_promised(const struct ic_text_sched *s)
{
    int32_t n = 0;

    for (int32_t i = 0; i < s->n_running; i++) {
        const struct run *r = s->order[i];
        int32_t has = s->slots[r->slot].n_past;
        n += r->n_tokens - (r->lead && r->lead_n > has ? r->lead_n : has) + IC_RESERVE_PER_RUN;
    }
    return n;
}

/* ---- changes, in the model and in the books ---------------------------------------------------------------------- */

void ic_cells_cut(struct ic_text_sched *s, int32_t slot, int32_t keep)
{
    struct slot *sl = &s->slots[slot];

    keep = ic_prefix_cut(s->prefix, slot, keep < sl->n_past ? keep : sl->n_past);
    if (!s->parked && !s->be->seq_rm(s->be->arg, slot, keep))
        keep = ic_prefix_cut(s->prefix, slot, 0);
    sl->n_past = keep;
    if (keep == 0)
        sl->pinned = false;
}

void ic_cells_grow(struct ic_text_sched *s, struct run *r)
{
    struct slot *sl = &s->slots[r->slot];

    if (ic_prefix_append(s->prefix, r->slot, r->req->salt, r->tokens + sl->n_past, r->rows,
                         s->be->now_ns(s->be->arg)))
        sl->n_past += r->rows;
    else
        ic_cells_cut(s, r->slot, 0); /* no memory to remember it by: as if it had never been computed */
    r->reached = sl->n_past > r->reached ? sl->n_past : r->reached;
}

void ic_cells_credit(struct ic_text_sched *s, struct run *r)
{
    int32_t has = s->slots[r->slot].n_past;

    if (has > r->reached && r->n_gen == 0) {
        r->cached += has - r->reached;
        atomic_fetch_add(&s->c->cached_tokens, (uint64_t)(has - r->reached));
    }
    r->reached = has > r->reached ? has : r->reached;
}

static void share(struct ic_text_sched *s, int32_t from, int32_t to, int32_t len)
{
    ic_cells_cut(s, to, 0);
    len = ic_prefix_share(s->prefix, from, to, len, s->be->now_ns(s->be->arg));
    if (len > 0)
        s->be->seq_cp(s->be->arg, from, to, 0, len);
    s->slots[to].n_past = len;
}

/* ---- eviction -------------------------------------------------------------------------------------------------------- */

/* Copies [from, its end) of a slot to host memory. */
static void put_away(struct ic_text_sched *s, int32_t slot, int32_t from)
{
    const struct ic_text_backend *be = s->be;
    int32_t to = s->slots[slot].n_past;
    void *data = NULL;

    if (s->spill.max == 0 || !be->seq_save || to - from < IC_SPILL_MIN)
        return;
    int32_t *tokens = malloc(sizeof *tokens * (size_t)to);
    const char *salt = ic_prefix_salt(s->prefix, slot);
    bool whole = be->window != 0;
    size_t bytes = 0;

    if (tokens) {
        ic_prefix_tokens(s->prefix, slot, 0, to, tokens);
        if (!ic_spill_has(&s->spill, salt, tokens, from, to, whole))
            bytes = be->seq_save(be->arg, slot, from, to, s->spill.max, &data);
    }
    if (bytes == 0) {
        free(tokens);
        return;
    }
    if (ic_spill_put(&s->spill, salt, tokens, from, to, data, bytes, whole))
        atomic_fetch_add(&s->c->spilled, (uint64_t)(to - from));
}

/* An idle sequence loses its end, as far as nobody else holds it, and about `most` cells of that. */
static void shrink(struct ic_text_sched *s, int32_t slot, int32_t most)
{
    int32_t from, own = ic_prefix_own(s->prefix, slot, &from);

    if (own - IC_SPILL_MIN > most) { /* no rest that is too short to be kept */
        from += own - most;
        own = most;
    }
    if (s->be->window != 0) { /* whole or not at all */
        from = 0;
        own = s->slots[slot].n_past;
    }
    if (own > 0)
        put_away(s, slot, from);
    ic_cells_cut(s, slot, own > 0 ? from : 0);
}

static int32_t oldest_idle(const struct ic_text_sched *s, int32_t but)
{
    int32_t best = -1;

    for (int32_t i = 0; i < s->n_slots; i++) {
        const struct slot *sl = &s->slots[i];
        if (is_idle(sl) && sl->n_past > 0 && i != but &&
            (best < 0 || ic_prefix_used(s->prefix, i) < ic_prefix_used(s->prefix, best)))
            best = i;
    }
    return best;
}

bool ic_cells_make_room(struct ic_text_sched *s, int32_t need, int32_t but)
{
    int32_t victim;

    while (ic_cells_free(s) < need && (victim = oldest_idle(s, but)) >= 0)
        shrink(s, victim, INT32_MAX);
    return ic_cells_free(s) >= need;
}

bool ic_cells_trim(struct ic_text_sched *s, int32_t stay)
{
    struct ic_seq_set busy = busy_set(s, -1);
    int32_t idle = ic_prefix_cells(s->prefix) - ic_prefix_cells_of(s->prefix, &busy), victim;

    if (!s->be->seq_save || s->be->window < 0 ||
        s->spill.sum >= s->spill.max - s->spill.max / IC_TRIM_SPARE)
        return false; /* what goes would be lost, or others in its stead */
    if (idle <= stay || (victim = oldest_idle(s, -1)) < 0)
        return false;
    shrink(s, victim, IC_TRIM_CELLS);
    return true;
}

bool ic_cells_evict(struct ic_text_sched *s, int32_t slot)
{
    if (slot < 0 && (slot = oldest_idle(s, -1)) < 0)
        return false;
    while (s->slots[slot].n_past > 0)
        shrink(s, slot, INT32_MAX);
    return true;
}

/* ---- a place for a run ------------------------------------------------------------------------------------------------- */

bool ic_cells_would_fit(const struct ic_text_sched *s, const struct run *r, enum ic_priority prio)
{
    struct ic_seq_set set = {0};
    int32_t n = 0, need = r->n_tokens;

    for (int32_t i = 0; i < s->n_slots; i++) {
        const struct run *o = s->slots[i].run;
        if ((o && o->req->priority >= prio) || s->slots[i].pinned)
            set.word[i / 64] |= UINT64_C(1) << (i % 64);
        if (o && o->req->priority >= prio) {
            need += o->n_tokens - s->slots[i].n_past + 2 * IC_RESERVE_PER_RUN;
            n++;
        }
    }
    return n < s->be->parallel && s->be->kv_size - ic_prefix_cells_of(s->prefix, &set) >= need;
}

static int32_t share_min(const struct ic_text_sched *s, const struct run *r)
{
    int32_t min = s->be->policy.share_min;

    return r->session && r->session->n_tokens > 0 ? IC_GO_ON_MIN : min ? min : IC_SHARE_MIN;
}

/* How many of its tokens may come from the cache. The last one is computed in any case: its logits are wanted. */
static int32_t findable(const struct run *r)
{
    return r->req->pooling ? ic_pool_may_skip(&r->pool) : r->n_tokens - 1;
}

static int32_t match(const struct ic_text_sched *s, const struct run *r, int32_t *holder)
{
    int32_t n = ic_prefix_match(s->prefix, r->req->salt, r->tokens, findable(r), s->be->window, holder);
    bool goes_on = n > 0 && is_idle(&s->slots[*holder]) && s->slots[*holder].n_past == n;

    /* Where all of it can be gone on with, however little. A recurrent memory can be gone on with only. */
    if (!goes_on && (n < share_min(s, r) || s->be->window < 0)) {
        *holder = -1;
        return 0;
    }
    return n;
}

/* Somebody who runs before it and will have computed more of its tokens than there are now. */
static struct run *better_lead(const struct ic_text_sched *s, const struct run *r, int32_t have,
                               int32_t *common)
{
    struct run *best = NULL;

    *common = have;
    for (int32_t i = 0; i < s->n_running && s->order[i] != r && s->be->window == 0; i++) {
        struct run *o = s->order[i];
        int32_t k = 0, most = findable(r), end = o->n_tokens < most ? o->n_tokens : most;
        if (end <= *common || s->slots[o->slot].n_past >= end || strcmp(o->req->salt, r->req->salt) != 0)
            continue;
        while (k < end && o->tokens[k] == r->tokens[k])
            k++;
        if (k > *common && k >= have + share_min(s, r) && k > s->slots[o->slot].n_past) {
            *common = k;
            best = o;
        }
    }
    return best;
}

void ic_cells_find_lead(struct ic_text_sched *s, struct run *r)
{
    r->lead = better_lead(s, r, s->slots[r->slot].n_past, &r->lead_n);
}

static void take_what_is_there(struct ic_text_sched *s, struct run *r)
{
    struct slot *sl = &s->slots[r->slot];
    int32_t holder, before = sl->n_past, n = match(s, r, &holder);

    if (n >= before + share_min(s, r) && holder != r->slot)
        share(s, holder, r->slot, n);
    ic_cells_credit(s, r);
}

void ic_cells_join(struct ic_text_sched *s, struct run *r)
{
    if (r->lead && s->slots[r->lead->slot].n_past >= r->lead_n) {
        r->lead = NULL;
        r->look = true;
    }
    if (!r->look)
        return;
    r->look = false;
    if (s->be->window != 0)
        return;
    take_what_is_there(s, r);
    ic_cells_find_lead(s, r);
}

static int32_t empty_slot(const struct ic_text_sched *s)
{
    for (int32_t i = 0; i < s->n_slots; i++)
        if (!s->slots[i].run && s->slots[i].n_past == 0)
            return i;
    return -1;
}

/* A slot that holds the first `len` tokens, which `holder` has. */
static int32_t slot_with(struct ic_text_sched *s, int32_t holder, int32_t len)
{
    bool own = holder >= 0 && is_idle(&s->slots[holder]);
    int32_t slot;

    if (own && s->slots[holder].n_past == len)
        return holder; /* it goes on from there: nothing to copy */
    slot = empty_slot(s);
    if (slot < 0 && (slot = oldest_idle(s, holder)) >= 0)
        ic_cells_evict(s, slot);
    if (slot >= 0) {
        if (len > 0)
            share(s, holder, slot, len);
        return slot;
    }
    if (own && s->be->window == 0)
        ic_cells_cut(s, holder, len);
    else if (own)
        ic_cells_cut(s, holder, 0);
    return own ? holder : -1;
}

int32_t ic_cells_take_slot(struct ic_text_sched *s, struct run *r)
{
    int32_t holder, n = match(s, r, &holder), common;
    struct run *lead = better_lead(s, r, n, &common);
    int32_t others = s->n_running ? cells_promised(s) + IC_RESERVE_PER_RUN : 0;

    if (s->n_running >= s->be->parallel)
        return -1;
    if (cells_possible(s, -1) < r->n_tokens - common + others) /* nothing is given up in vain */
        return -1;
    int32_t slot = slot_with(s, holder, n);
    if (slot < 0)
        return -1;
    int32_t known = lead ? common : s->slots[slot].n_past, need = r->n_tokens - known + others;
    if (cells_possible(s, slot) < need || !ic_cells_make_room(s, need, slot)) {
        if (slot != holder)
            ic_cells_cut(s, slot, 0);
        return -1;
    }
    return slot;
}

/* Whether computing `more` tokens is quicker than bringing this part back. */
static bool too_dear(struct ic_text_sched *s, const struct ic_spill_part *p, int32_t more)
{
    double compute = ic_text_cost_row(&s->cost) * more, copy = s->ns_per_byte * (double)p->bytes;
    double read = p->file ? s->disk_ns_per_byte * (double)p->bytes : 0;

    if (compute <= 0 || copy + read <= compute)
        return false;
    if (read > 0 && copy <= compute)
        s->disk_ns_per_byte *= DISK_FORGIVEN;
    return true;
}

/* Its data is in memory now. False: it is not there any more. */
static bool fetch(struct ic_text_sched *s, struct ic_spill_part *p)
{
    bool reads = p->file != 0;
    int64_t t0 = s->be->now_ns(s->be->arg);

    if (!ic_spill_fetch(&s->spill, p))
        return false;
    double ns = (double)(s->be->now_ns(s->be->arg) - t0) / (double)p->bytes;
    if (reads)
        s->disk_ns_per_byte = 0.5 * s->disk_ns_per_byte + 0.5 * ns;
    return true;
}

void ic_cells_restore(struct ic_text_sched *s, struct run *r)
{
    const struct ic_text_backend *be = s->be;
    struct slot *sl = &s->slots[r->slot];
    struct ic_spill_part *p;
    int32_t reach;

    while (be->seq_load && (p = ic_spill_find(&s->spill, r->req->salt, r->tokens, findable(r), sl->n_past,
                                              be->window != 0, &reach)) != NULL) {
        int32_t before = sl->n_past, more = reach - before, promised = cells_promised(s) - more;
        if (more < share_min(s, r) || too_dear(s, p, more))
            break;
        if (be->window != 0 && before > 0)
            ic_cells_cut(s, r->slot, 0);
        /* All of the part passes through cells of its own, though only [before, reach) stays. */
        int32_t parts = s->spill.count, cells = ic_cells_free(s);
        if (!ic_cells_make_room(s, p->to - p->from + promised, r->slot))
            break;
        if (cells != ic_cells_free(s) || parts != s->spill.count)
            continue; /* what made room may have pushed this part out: look again */
        if (!fetch(s, p))
            continue; /* the next best */
        int64_t t0 = be->now_ns(be->arg);
        bool ok = be->seq_load(be->arg, r->slot, p->from, sl->n_past, reach, p->data, p->bytes);
        double ns = (double)(be->now_ns(be->arg) - t0) / (double)p->bytes;
        if (ok && ic_prefix_append(s->prefix, r->slot, r->req->salt, r->tokens + sl->n_past,
                                   reach - sl->n_past, t0)) {
            sl->n_past = reach;
            s->ns_per_byte = 0.5 * s->ns_per_byte + 0.5 * ns;
            atomic_fetch_add(&s->c->restored, (uint64_t)more);
        } else {
            ic_cells_cut(s, r->slot, sl->n_past); /* whatever it left */
        }
        if (!ok || reach == p->to)
            ic_spill_drop(&s->spill, p);
        if (sl->n_past <= before)
            break;
    }
}

/* ---- open, pins, park ---------------------------------------------------------------------------------------------- */

enum ic_status ic_cells_open(struct ic_text_sched *s, const struct ic_text_backend *be, struct ic_err *err)
{
    struct ic_prefix *prefix = NULL;

    IC_ASSERT(be->parallel <= be->batch && be->ctx_size <= be->kv_size && be->n_seq >= be->parallel);
    struct slot *slots = calloc((size_t)be->n_seq, sizeof *slots);
    struct run **order = calloc((size_t)be->parallel, sizeof(struct run *));
    struct ic_row *rows = calloc((size_t)be->batch, sizeof *rows);
    if (!slots || !order || !rows || ic_prefix_open(&prefix, be->n_seq, err) != IC_OK) {
        free(slots);
        free(order);
        free(rows);
        return ic_fail(err, IC_OOM, "out of memory");
    }
    free(s->slots);
    free(s->order);
    free(s->rows);
    ic_prefix_close(&s->prefix);
    s->slots = slots;
    s->order = order;
    s->rows = rows;
    s->prefix = prefix;
    s->n_slots = be->n_seq;
    s->be = be;
    s->spill.max = be->policy.cache_ram;
    IC_ASSERT(s->spill.disk_count == 0 || s->spill.disk == be->disk);
    s->spill.disk = be->disk;
    s->cost = (struct ic_text_cost){0}; /* it may have come back on another device */
    s->hope = 1;
    s->ns_per_byte = NS_PER_BYTE_GUESS;
    s->disk_ns_per_byte = DISK_NS_PER_BYTE_GUESS;
    return IC_OK;
}

/* Computes one pinned prefix; nobody else is there yet. */
enum ic_status ic_cells_pin(struct ic_text_sched *s, const struct ic_pin *p, struct ic_err *err)
{
    const struct ic_text_backend *be = s->be;
    int32_t slot = empty_slot(s), n, pinned = 0;

    for (int32_t i = 0; i < s->n_slots; i++)
        pinned += s->slots[i].pinned;
    if (be->window != 0)
        return IC_OK; /* a recurrent memory cannot be shared: the first who asks computes it */
    if (pinned >= s->n_slots - be->parallel)
        return ic_fail(err, IC_TOO_LARGE, "more than %d prefixes cannot be kept", pinned);
    if (ic_prefix_cells(s->prefix) + p->n + be->ctx_size > be->kv_size)
        return ic_fail(err, IC_TOO_LARGE,
                       "a prefix of %d tokens does not fit beside a context of %d into %d cells (try a "
                       "larger --kv-size)",
                       p->n, be->ctx_size, be->kv_size);
    for (int32_t at = 0; at < p->n; at += n) {
        n = p->n - at < be->batch ? p->n - at : be->batch;
        for (int32_t i = 0; i < n; i++)
            s->rows[i] = (struct ic_row){p->tokens[at + i], at + i, slot, i == n - 1, false};
        if (be->decode(be->arg, s->rows, n) != IC_DECODE_OK ||
            !ic_prefix_append(s->prefix, slot, "", p->tokens + at, n, be->now_ns(be->arg))) {
            ic_cells_cut(s, slot, 0);
            return ic_fail(err, IC_INTERNAL, "the prefix could not be computed");
        }
        s->slots[slot].n_past = at + n;
    }
    ic_prefix_publish(s->prefix, slot);
    s->slots[slot].pinned = true;
    return IC_OK;
}

enum ic_status ic_cells_pin_all(struct ic_text_sched *s, struct ic_err *err)
{
    enum ic_status st = IC_OK;

    for (const struct ic_pin *p = s->pins; p && st == IC_OK; p = p->next)
        st = ic_cells_pin(s, p, err);
    return st;
}

void ic_cells_park(struct ic_text_sched *s)
{
    int32_t slot;

    for (int32_t i = 0; i < s->n_slots; i++)
        s->slots[i].pinned = false;
    while ((slot = oldest_idle(s, -1)) >= 0)
        shrink(s, slot, INT32_MAX);
}
