/* When a draft model (text/draft.h) is asked, and for how much. What it says is checked like any other guess, so this
 * is about time only: with a draft that is of no use nothing may become more than a few percent slower.
 *
 *   price     of a proposal: the model's row more, and the draft's own time for it, both as measured
 *   worth     as in text_spec.h: its chance to be kept, of what the tick's rows are worth on average
 *   credit    time that may be lost: a small share of all time goes onto it, and what kept proposals have saved; what
 *             the draft and its rows have taken comes off it. By the clock and not by the price: estimates are acted on
 *             most when they are wrong. At zero nobody is proposed for, so a loss is bounded whatever the reason.
 *   resting   a stream for which it does not pay is tried again after some ticks, and after twice as many when that was
 *             wrong too
 *
 * No thread, no clock. */
#ifndef IC_SCHED_TEXT_DRAFT_H
#define IC_SCHED_TEXT_DRAFT_H

#include "sched/prefix.h"
#include "sched/text_cost.h"
#include "sched/text_spec.h"

#define IC_DRAFT_NEAR 4        /* tokens that a stream may lack and be proposed for: more are read first */
#define IC_DRAFT_READ_MAX 128  /* tokens that the draft reads in a tick to catch up */
#define IC_DRAFT_READ_FIRST 16 /* … as long as their price is not known */
#define IC_DRAFT_PROBE 2       /* proposals of a try */
#define IC_DRAFT_REST_MIN 32   /* ticks with a token of the stream, between two tries */
#define IC_DRAFT_REST_MAX 2048
/* one tick in so many has no proposals: what the others cost without is to be known */
#define IC_DRAFT_PLAIN 32
#define IC_DRAFT_STAKE 0.02 /* of all time may be lost */
#define IC_DRAFT_LOAN 16.0  /* decodes of one stream: credit at the start */
#define IC_DRAFT_DEBT_MAX 8.0
#define IC_DRAFT_CREDIT_MAX 256.0
/* tokens of a stream without a bound of its own, when asked what reading it may bring */
#define IC_DRAFT_EXPECTED 256
/* of the time of a stream's tokens to come, that reading what it lacks may take */
#define IC_DRAFT_READ_SHARE 0.25

/* Of one stream. */
struct ic_draft_stream {
    double hits; /* of the proposals that were checked, those that were right: moving average */
    double sure; /* of the tokens that the draft computed, those that it proposed: moving average */
    /* ticks with a token of it until it is tried again, and how many the next time */
    int32_t rest, next_rest;
};

/* Of all together. Times in ns, credit in decodes of one stream. */
struct ic_drafter {
    struct ic_text_cost cost; /* of a step of the draft by the number of streams */
    double read_ns;           /* of a token that it reads to catch up; 0: not known */
    double plain_ns[IC_PREFIX_SEQS_MAX +
                    1]; /* of ticks without proposals, by the number of streams: slow averages */
    double hits, sure;  /* what a stream begins with: averages of all */
    double credit;
    int32_t since_plain; /* ticks with proposals, since one without */
    bool failed;         /* not to be asked before the model is opened anew */
    /* of the tick under way */
    double alone_ns, value_ns; /* of a decode of one stream; what a token kept is worth */
    double spent_ns;           /* by the draft */
    int32_t rows, kept;        /* its proposals, and those of them that were right */
};

void ic_drafter_init(struct ic_drafter *d);
void ic_draft_begin(const struct ic_drafter *d, struct ic_draft_stream *r);
/* A proposal for this stream has been checked. */
void ic_draft_checked(struct ic_drafter *d, struct ic_draft_stream *r, bool right);
/* The draft has proposed n tokens for it, and (unsure) computed one more that it did not propose. */
void ic_draft_computed(struct ic_drafter *d, struct ic_draft_stream *r, int32_t n, bool unsure);
/* It was tried though it does not pay, or could not be: not again soon. */
void ic_draft_rest(struct ic_draft_stream *r);
/* A tick is over that took ns, the draft's own time not among it. n_drafts: proposals, others than the draft's
 * included; rows_ns: the price of the draft's, where nothing better is known. */
void ic_draft_settle(struct ic_drafter *d, double ns, int32_t n_decode, int32_t n_prompt, int32_t n_drafts,
                     double rows_ns);

/* ---- in the scheduler (sched/text_sched_int.h) ---- */
struct ic_text_sched;

bool ic_drafts_looks_up(
    const struct ic_text_sched *s); /* whether texts are searched for what they repeat */
/* Adds proposals behind the streams' next tokens to the n rows of a tick, n_decode of them streams', as far as they pay
 * and fit into free cells: nobody loses any for them. Sets run.draft … and s->drafts. May ask the draft, which takes
 * its time (s->drafter.spent_ns). */
void ic_drafts_add(struct ic_text_sched *s, int32_t n_decode, int32_t *n);

#endif
