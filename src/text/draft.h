/* A second, smaller model of the same vocabulary, which guesses what the first one will say. What it guesses is worth
 * nothing until the first one has checked it (sched/text_draft.h says when it is asked at all).
 *
 * It keeps, for each sequence of the first model, what it has read of it; on the next call it cuts that back to what
 * still holds and reads what is missing. Its KV cells are bounded: those that were not needed for longest go first.
 *
 *   open ──► bind (the first model is there too) ──► behind, propose … ──► close, before the first model is
 *
 * One thread, that of the first model: both compute with the same threads, one after the other. */
#ifndef IC_TEXT_DRAFT_H
#define IC_TEXT_DRAFT_H

#include <stdbool.h>
#include <stdint.h>

#include "text/model.h"

#define IC_DRAFT_SURE 0.4f       /* probability under the draft below which a token is not proposed */
#define IC_DRAFT_CTX_MAX 8192    /* tokens of a stream that it follows; longer ones go on without it */
#define IC_DRAFT_BATCH 256       /* tokens of one of its decodes at most */
#define IC_DRAFT_STREAMS_MAX 223 /* requests at once; further ones get no proposals */
/* Calls during which a sequence keeps its cells though others want them: else those that do not all fit would take
 * them from each other for ever. */
#define IC_DRAFT_FRESH 32

struct ic_draft;

/* What is wanted for one stream, and what has become of it. */
struct ic_draft_req {
    int32_t seq;
    const int32_t *tokens; /* all of the stream so far; borrowed for the call */
    int32_t n;
    int32_t read;  /* in: tokens of these that may be read at most; out: that were */
    int32_t max;   /* proposals wanted; there are none before all n tokens have been read */
    int32_t *out;  /* room for max; may be NULL where that is 0 */
    int32_t n_out; /* out */
    /* out: there are fewer because the next one would be below IC_DRAFT_SURE, or ends the text */
    bool unsure;
};

/* How the draft of this model is opened, for whoever plans. */
struct ic_text_config ic_draft_config(const struct ic_text_config *model);

/* Loads model->draft, before the model, which then takes what is left of the GPUs. Errors as ic_text_model_open's, and
 * they name the draft; IC_BAD_REQUEST also for one with a recurrent state or a sliding window. */
enum ic_status ic_draft_open(struct ic_draft **out, const struct ic_text_config *model, struct ic_err *err);
/* `m` is what it drafts for: lends its threads, and must outlive the draft. IC_BAD_REQUEST: another vocabulary, or a
 * model that cannot take proposals back. Close it then. */
enum ic_status ic_draft_bind(struct ic_draft *d, struct ic_text_model *m, struct ic_err *err);
void ic_draft_close(struct ic_draft **d); /* accepts NULL and *d == NULL */

const struct ic_text_info *ic_draft_info(const struct ic_draft *d);
/* As ic_text_set_abort, for its decodes. */
void ic_draft_set_abort(struct ic_draft *d, bool (*test)(void *), void *arg);

/* Tokens of a stream that are still to be read, 1 at least; INT32_MAX: it cannot follow this one. */
int32_t ic_draft_behind(const struct ic_draft *d, int32_t seq, const int32_t *tokens, int32_t n);

/* Reads and proposes, greedily, for n streams (each once), all of them together in each decode; blocks until done. What
 * finds no free cells has read 0 and n_out 0. Told to stop, it leaves all n_out at 0. False: the model failed; it is to
 * be closed. */
bool ic_draft_propose(struct ic_draft *d, struct ic_draft_req *reqs, int32_t n);

#endif
