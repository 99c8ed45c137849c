/* Who waits, and whose turn it is.
 *
 * Priorities are strict. Within one, clients take turns: a round robin in which each admission is one turn, and a client
 * pays with what is really computed for it, prompt tokens that were not cached and sampled ones alike. Whoever has used up
 * its balance is passed over until the others have used up theirs (a deficit round robin that pays afterwards, because the
 * price is not known before; as surplus round robin in the literature). So a client with one request waits for one
 * admission of each other client at most, however many they have waiting. */
#include <stdlib.h>

#include "sched/text_sched_int.h"

/* ---- clients ----------------------------------------------------------------------------------------------- */

static void forget_client(struct ic_text_sched *s, struct ic_text_client *c)
{
    struct ic_text_client **p = &s->clients;

    while (*p != c)
        p = &(*p)->next;
    *p = c->next;
    if (s->turn == c)
        s->turn = c->next;
    s->n_clients--;
    free(c);
}

static bool is_idle(const struct ic_text_client *c)
{
    return c->n_waiting == 0 && c->n_running == 0;
}

/* Debts are remembered, or a client could pay them by going away and coming back. */
void ic_queue_leave(struct ic_text_sched *s, struct ic_text_client *c)
{
    if (c && is_idle(c) && c->balance >= 0)
        forget_client(s, c);
}

struct ic_text_client *ic_queue_client(struct ic_text_sched *s, uint64_t key)
{
    struct ic_text_client *c = s->clients, **end = &s->clients, *idle = NULL;

    for (; c && c->key != key; c = c->next) {
        end = &c->next;
        if (is_idle(c))
            idle = c;
    }
    if (c)
        return c;
    if (s->n_clients >= IC_CLIENTS_MAX && idle) {
        forget_client(s, idle);
        for (end = &s->clients; *end;)
            end = &(*end)->next;
    }
    if (!(c = calloc(1, sizeof *c)))
        return NULL;
    c->key = key;
    c->balance = IC_TURN_TOKENS;
    *end = c;
    s->n_clients++;
    return c;
}

void ic_queue_charge(struct ic_text_client *c, int32_t tokens)
{
    c->balance -= tokens;
}

void ic_queue_clear(struct ic_text_sched *s)
{
    while (s->clients)
        forget_client(s, s->clients);
}

/* ---- the list --------------------------------------------------------------------------------------------- */

void ic_queue_put(struct ic_text_sched *s, struct run *r, bool first_of_class)
{
    struct run **p = &s->waiting;

    while (*p && ((*p)->req->priority > r->req->priority ||
                  (!first_of_class && (*p)->req->priority == r->req->priority)))
        p = &(*p)->next;
    r->next = *p;
    *p = r;
    r->client->n_waiting++;
    atomic_fetch_add(&s->c->waiting, 1);
}

void ic_queue_remove(struct ic_text_sched *s, struct run *r)
{
    for (struct run **p = &s->waiting; *p; p = &(*p)->next)
        if (*p == r) {
            *p = r->next;
            r->client->n_waiting--;
            atomic_fetch_sub(&s->c->waiting, 1);
            return;
        }
    IC_ASSERT(!"run is waiting");
}

/* ---- whose turn it is --------------------------------------------------------------------------------------- */

static bool could_begin(const struct run *r)
{
    return r->prepared || !r->session || !r->session->busy;
}

/* The next client in the ring, from s->turn on, that has something to begin and tokens left. */
static struct ic_text_client *with_balance(const struct ic_text_sched *s)
{
    struct ic_text_client *from = s->turn ? s->turn : s->clients;

    for (struct ic_text_client *c = from; c; c = c->next)
        if (c->first && c->balance > 0)
            return c;
    for (struct ic_text_client *c = s->clients; c && c != from; c = c->next)
        if (c->first && c->balance > 0)
            return c;
    return NULL;
}

/* Everybody who could begin has had theirs: so many rounds begin as it takes for one of them to have tokens again. */
static void new_rounds(struct ic_text_sched *s)
{
    int64_t rounds = INT64_MAX;

    for (const struct ic_text_client *c = s->clients; c; c = c->next)
        if (c->first && -c->balance / IC_TURN_TOKENS + 1 < rounds)
            rounds = -c->balance / IC_TURN_TOKENS + 1;
    for (struct ic_text_client *c = s->clients, *next; c; c = next) {
        next = c->next;
        c->balance += rounds * IC_TURN_TOKENS;
        if (c->balance > IC_TURN_TOKENS) /* nothing is saved up */
            c->balance = IC_TURN_TOKENS;
        ic_queue_leave(s, c);
    }
}

struct run *ic_queue_pick(struct ic_text_sched *s)
{
    struct run *any = NULL;

    for (struct ic_text_client *c = s->clients; c; c = c->next)
        c->first = NULL;
    for (struct run *r = s->waiting; r && (!any || r->req->priority == any->req->priority); r = r->next) {
        if (!could_begin(r))
            continue;
        if (r->admitted_once) /* it has been put back and is owed its place */
            return r;
        any = any ? any : r;
        if (!r->client->first)
            r->client->first = r;
    }
    if (!any)
        return NULL;
    struct ic_text_client *c = with_balance(s);
    if (!c) {
        new_rounds(s);
        c = with_balance(s);
    }
    return c->first;
}

void ic_queue_served(struct ic_text_sched *s, struct run *r)
{
    s->turn = r->client->next;
}

int32_t ic_queue_place(const struct ic_text_sched *s, const struct run *r)
{
    int32_t place = 1, mine = 0;
    bool behind = false;

    for (const struct run *o = s->waiting; o != r; o = o->next)
        mine += o->client == r->client && o->req->priority == r->req->priority;
    for (struct ic_text_client *c = s->clients; c; c = c->next)
        c->seen = 0;
    /* In its class everybody else has a turn before each of mine. */
    for (const struct run *o = s->waiting; o && o->req->priority >= r->req->priority; o = o->next) {
        behind |= o == r;
        if (o->req->priority > r->req->priority)
            place++;
        else if (o->client == r->client)
            place += !behind;
        else
            place += o->client->seen++ < mine + 1;
    }
    return place;
}
