/* Proposals in a tick: who gets how many, from its own text or from a draft model. See text_draft.h. */
#include "sched/text_draft.h"

#include <math.h>

#include "base/least.h"
#include "sched/text_sched_int.h"

#define KEEP 0.9      /* of what was known of a stream */
#define KEEP_ALL 0.97 /* … and of all streams together */
#define KEEP_READ 0.8
#define KEEP_PLAIN 0.95
#define MARGIN 1.1     /* a proposal must be worth more than its price by so much: both are estimates */
#define FIRST_HITS 0.6 /* of a draft that has not been seen */
#define FIRST_SURE 0.8
#define SURE_MIN 0.05
#define OUTLIER 4 /* times what was known: the machine was elsewhere */

/* ---- what is known of the draft --------------------------------------------------------------------------------- */

void ic_drafter_init(struct ic_drafter *d)
{
    *d = (struct ic_drafter){.hits = FIRST_HITS, .sure = FIRST_SURE, .credit = IC_DRAFT_LOAN};
}

void ic_draft_begin(const struct ic_drafter *d, struct ic_draft_stream *r)
{
    *r = (struct ic_draft_stream){.hits = d->hits, .sure = d->sure, .next_rest = IC_DRAFT_REST_MIN};
}

static void move(double *v, double keep, double x)
{
    *v = keep * *v + (1 - keep) * x;
}

void ic_draft_checked(struct ic_drafter *d, struct ic_draft_stream *r, bool right)
{
    move(&r->hits, KEEP, right);
    move(&d->hits, KEEP_ALL, right);
    d->kept += right;
    if (!right)
        return;
    r->next_rest = IC_DRAFT_REST_MIN;
    if (r->rest > IC_DRAFT_REST_MIN)
        r->rest = IC_DRAFT_REST_MIN;
}

void ic_draft_computed(struct ic_drafter *d, struct ic_draft_stream *r, int32_t n, bool unsure)
{
    for (int32_t i = 0; i < n + unsure; i++) {
        move(&r->sure, KEEP, i < n);
        move(&d->sure, KEEP_ALL, i < n);
    }
}

void ic_draft_rest(struct ic_draft_stream *r)
{
    r->rest = r->next_rest;
    r->next_rest = r->next_rest < IC_DRAFT_REST_MAX / 2 ? 2 * r->next_rest : IC_DRAFT_REST_MAX;
}

/* What took much longer than it should have did so because the machine was elsewhere: nobody is to pay for that. */
static double clipped(double ns, double expected)
{
    return expected > 0 && ns > OUTLIER * expected ? OUTLIER * expected : ns;
}

static void pay(struct ic_drafter *d, double ns)
{
    if (d->alone_ns > 0)
        d->credit -= ns / d->alone_ns;
    if (d->credit > IC_DRAFT_CREDIT_MAX)
        d->credit = IC_DRAFT_CREDIT_MAX;
    if (d->credit < -IC_DRAFT_DEBT_MAX)
        d->credit = -IC_DRAFT_DEBT_MAX;
}

void ic_draft_settle(struct ic_drafter *d, double ns, int32_t n_decode, int32_t n_prompt, int32_t n_drafts,
                     double rows_ns)
{
    IC_ASSERT(n_decode >= 0 && n_decode <= IC_PREFIX_SEQS_MAX);
    double *plain = &d->plain_ns[n_decode], cost = rows_ns - d->kept * d->value_ns;

    if (n_decode > 0 && n_prompt == 0 && n_drafts == 0)
        *plain = *plain > 0 ? KEEP_PLAIN * *plain + (1 - KEEP_PLAIN) * clipped(ns, *plain) : ns;
    else if (n_decode > 0 && n_prompt == 0 && n_drafts == d->rows && *plain > 0)
        cost = clipped(ns, *plain + rows_ns) - *plain - d->kept * *plain / n_decode;
    pay(d, cost - IC_DRAFT_STAKE * ns);
    d->rows = d->kept = 0;
}

/* ---- who may get some ------------------------------------------------------------------------------------------- */

bool ic_drafts_looks_up(const struct ic_text_sched *s)
{
    return s->be->window == 0 && !s->be->policy.no_speculation;
}

static bool has_draft(const struct ic_text_sched *s)
{
    return s->be->window == 0 && s->be->draft && !s->drafter.failed;
}

/* Proposals that would be of use to it; 0: it is not where any could be. */
static int32_t wanted(const struct ic_text_sched *s, const struct run *r)
{
    const struct ic_text_params *p = &r->req->params;
    int32_t more = p->max_tokens < 0 ? INT32_MAX : p->max_tokens - r->n_gen - 1;

    if (r->at < 0 || r->rows != 1 || r->n_gen == 0 || r->n_draft > 0)
        return 0;
    more = ic_least(ic_least(more, s->be->ctx_size - r->n_tokens - 1), IC_SPEC_MAX);
    return more > 0 ? more : 0;
}

static void add_rows(struct ic_text_sched *s, struct run *r, bool by_model, int32_t *left, int32_t *n)
{
    r->draft_at = *n;
    r->draft_by_model = by_model;
    *left -= r->n_draft;
    s->drafts += r->n_draft;
    for (int32_t d = 0; d < r->n_draft; d++)
        s->rows[(*n)++] = (struct ic_row){r->draft[d], r->n_tokens + d, r->slot, true, false};
}

/* Whether the draft has known it better of late than its own text. */
static bool is_drafts(const struct ic_text_sched *s, const struct run *r)
{
    return has_draft(s) && r->draft_stream.rest == 0 && ic_spec_chance(&r->spec, 0) < r->draft_stream.hits;
}

/* Out of their own texts for those that are not the draft's, before it is asked, or (drafts) for those that are, after:
 * maybe it had nothing. */
static void look_up(struct ic_text_sched *s, struct ic_spec_tick *tick, bool drafts, int32_t *left,
                    int32_t *n)
{
    for (int32_t i = 0; i<s->n_running && * left> 0; i++) {
        struct run *r = s->order[i];
        int32_t max = ic_least(wanted(s, r), *left);
        if (max == 0 || is_drafts(s, r) != drafts)
            continue;
        int32_t k = ic_spec_count(&r->spec, tick, &s->hope, max);
        r->n_draft = ic_spec_guess(&r->spec, r->tokens, r->n_tokens, r->draft, k);
        add_rows(s, r, false, left, n);
    }
}

/* ---- the draft model -------------------------------------------------------------------------------------------- */

/* A stream that the draft may be asked for. */
struct asked {
    struct run *r;
    int32_t behind; /* tokens that the draft has not read */
};

/* *ns: expected, 0: not known; then what it took. */
static bool ask(struct ic_text_sched *s, struct ic_draft_req *q, int32_t n, double *ns)
{
    const struct ic_text_backend *be = s->be;
    int64_t t0 = be->now_ns(be->arg);
    bool ok = be->draft(be->arg, q, n);

    double took = (double)(be->now_ns(be->arg) - t0);
    s->drafter.spent_ns += took;
    *ns = clipped(took, *ns);
    pay(&s->drafter, *ns);
    s->drafter.failed = !ok;
    return ok;
}

/* Whether what it has not read is to be read: it must be able to pay, and be paid. */
static bool worth_reading(const struct ic_text_sched *s, const struct asked *a)
{
    const struct ic_drafter *d = &s->drafter;
    int32_t max = a->r->req->params.max_tokens, more = max < 0 ? IC_DRAFT_EXPECTED : max - a->r->n_gen;
    double decodes = a->behind * d->read_ns / d->alone_ns;

    more = ic_least(more, s->be->ctx_size - a->r->n_tokens);
    return decodes < d->credit && decodes <= IC_DRAFT_READ_SHARE * more;
}

/* Lets the draft read on for those that lack much. Returns how many lack little now, at the beginning of a[]. */
static int32_t catch_up(struct ic_text_sched *s, struct ic_spec_tick *tick, struct asked *a, int32_t n)
{
    struct ic_draft_req q[IC_PREFIX_SEQS_MAX];
    struct ic_drafter *d = &s->drafter;
    int32_t of[IC_PREFIX_SEQS_MAX], room = IC_DRAFT_READ_MAX, n_q = 0, near = 0, rows = 0;
    double ns = 0, time = tick->limit_ns - tick->ns;

    if (d->read_ns <= 0)
        room = IC_DRAFT_READ_FIRST;
    if (d->read_ns * room > time)
        room = time > 0 ? (int32_t)(time / d->read_ns) : 0;
    for (int32_t i = 0; i < n; i++) {
        if (a[i].behind <= IC_DRAFT_NEAR || room == 0 || !worth_reading(s, &a[i]))
            continue;
        of[n_q] = i;
        q[n_q] =
            (struct ic_draft_req){.seq = a[i].r->slot, .tokens = a[i].r->tokens, .n = a[i].r->n_tokens};
        q[n_q].read = ic_least(a[i].behind - 1, room);
        room -= q[n_q].read;
        ns += q[n_q++].read * d->read_ns;
    }
    if (n_q > 0) {
        if (!ask(s, q, n_q, &ns))
            return 0;
        tick->ns += ns;
        for (int32_t i = 0; i < n_q; i++) {
            rows += q[i].read;
            a[of[i]].behind -= q[i].read;
            if (q[i].read == 0)
                ic_draft_rest(&a[of[i]].r->draft_stream); /* others have the cells */
        }
        if (rows > 0)
            d->read_ns = d->read_ns > 0 ? KEEP_READ * d->read_ns + (1 - KEEP_READ) * ns / rows : ns / rows;
    }
    for (int32_t i = 0; i < n; i++)
        if (a[i].behind <= IC_DRAFT_NEAR)
            a[near++] = a[i];
    return near;
}

/* How many to ask for; a try where it does not pay. */
static int32_t count(struct ic_text_sched *s, struct ic_spec_tick *tick, struct run *r, double step_ns,
                     int32_t max)
{
    struct ic_draft_stream *ds = &r->draft_stream;
    double sure = ds->sure > SURE_MIN ? ds->sure : SURE_MIN, chance[IC_SPEC_MAX];

    if (s->drafter.credit <= 0)
        return 0;
    if (step_ns <= 0) /* not known: this will tell */
        return ic_least(max, IC_DRAFT_PROBE);
    max = ic_least(max, IC_SPEC_MAX);
    for (int32_t i = 0; i < max; i++)
        chance[i] = ds->hits;
    int32_t k = ic_spec_worth(tick, chance, max, MARGIN * step_ns / sure, MARGIN);
    if (k > 0)
        return k;
    k = ic_least(max, IC_DRAFT_PROBE);
    double rows = ic_text_cost_of(tick->cost, tick->rows + k) - ic_text_cost_of(tick->cost, tick->rows);
    double price = MARGIN * (rows + k * step_ns / sure);
    if (price > s->drafter.credit * s->drafter.alone_ns || tick->ns + price > tick->limit_ns)
        return 0;
    tick->rows += k;
    tick->ns += price;
    ic_draft_rest(ds);
    return k;
}

static void propose(struct ic_text_sched *s, struct ic_spec_tick *tick, struct asked *a, int32_t n_a,
                    int32_t *left, int32_t *n)
{
    struct ic_draft_req q[IC_PREFIX_SEQS_MAX];
    struct run *of[IC_PREFIX_SEQS_MAX];
    struct ic_drafter *d = &s->drafter;
    double step_ns = n_a > 0 ? ic_text_cost_of(&d->cost, n_a) / n_a : 0, ns;
    int32_t n_q = 0, room = *left, steps = 0;

    for (int32_t i = 0; i < n_a && room > 0; i++) {
        struct run *r = a[i].r;
        int32_t k = count(s, tick, r, step_ns, ic_least(wanted(s, r), room));
        if (k == 0)
            continue;
        of[n_q] = r;
        q[n_q++] = (struct ic_draft_req){.seq = r->slot,
                                         .tokens = r->tokens,
                                         .n = r->n_tokens,
                                         .read = IC_DRAFT_NEAR,
                                         .max = k,
                                         .out = r->draft};
        room -= k;
    }
    ns = step_ns * (*left - room);
    if (n_q == 0 || !ask(s, q, n_q, &ns))
        return;
    for (int32_t i = 0; i < n_q; i++) {
        int32_t computed = q[i].n_out + q[i].unsure;
        IC_ASSERT(q[i].n_out <= q[i].max);
        of[i]->n_draft = q[i].n_out;
        add_rows(s, of[i], true, left, n);
        d->rows += q[i].n_out;
        ic_draft_computed(d, &of[i]->draft_stream, q[i].n_out, q[i].unsure);
        steps = computed > steps ? computed : steps;
        if (q[i].read == 0)
            ic_draft_rest(&of[i]->draft_stream);
    }
    if (steps > 0)
        ic_text_cost_learn(&d->cost, ns / steps, n_q);
}

static void ask_draft(struct ic_text_sched *s, struct ic_spec_tick *tick, int32_t *left, int32_t *n)
{
    const struct ic_text_backend *be = s->be;
    struct asked a[IC_PREFIX_SEQS_MAX];
    int32_t n_a = 0;

    for (int32_t i = 0; i < s->n_running; i++) {
        struct run *r = s->order[i];
        if (wanted(s, r) == 0 || (r->draft_stream.rest > 0 && --r->draft_stream.rest > 0))
            continue;
        a[n_a] = (struct asked){r, be->draft_behind(be->arg, r->slot, r->tokens, r->n_tokens)};
        n_a += a[n_a].behind < INT32_MAX;
    }
    if (s->drafter.credit > 0 && n_a > 0) {
        n_a = catch_up(s, tick, a, n_a);
        propose(s, tick, a, n_a, left, n);
    }
}

/* ---- the tick --------------------------------------------------------------------------------------------------- */

void ic_drafts_add(struct ic_text_sched *s, int32_t n_decode, int32_t *n)
{
    struct ic_drafter *d = &s->drafter;
    bool looks_up = ic_drafts_looks_up(s);

    if (!looks_up && !has_draft(s))
        return;
    double base = ic_text_cost_of(&s->cost, n_decode), bound = s->be->policy.itl_bound_ns;
    /* With others there they must not stretch the tick beyond the bound of a gap. */
    struct ic_spec_tick tick = {.cost = &s->cost,
                                .rows = *n,
                                .useful = *n,
                                .ns = ic_text_cost_of(&s->cost, *n),
                                .limit_ns = n_decode == 1 ? INFINITY
                                            : bound > 0   ? bound
                                                          : IC_GAP_FACTOR * base};
    int32_t left = ic_least(ic_least(s->be->batch - *n, ic_cells_free(s) - *n), IC_SPEC_ROWS_MAX);
    bool draft = has_draft(s) && tick.ns > 0, plain = draft && d->since_plain >= IC_DRAFT_PLAIN;

    left = plain ? 0 : ic_least(left, s->be->outputs - s->be->parallel);
    d->rows = d->kept = 0;
    d->alone_ns = ic_text_cost_of(&s->cost, 1);
    d->value_ns = tick.ns / tick.useful;
    if (looks_up)
        look_up(s, &tick, false, &left, n);
    if (draft && left > 0)
        ask_draft(s, &tick, &left, n);
    if (looks_up)
        look_up(s, &tick, true, &left, n);
    d->since_plain = s->drafts > 0 ? d->since_plain + 1 : 0;
    atomic_fetch_add(&s->c->drafted, (uint64_t)s->drafts);
}
