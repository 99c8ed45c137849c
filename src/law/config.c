#include "law/config.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/json.h"
#include "model/tensors.h"

/* The value of a key, or NULL where it is absent or null. */
static const json_t *value_of(const json_t *root, const char *key)
{
    const json_t *v = json_object_get(root, key);
    return json_is_null(v) ? NULL : v;
}

static enum ic_status get_text(const json_t *root, const char *key, char *out, size_t size,
                               struct ic_err *err)
{
    const json_t *v = value_of(root, key);
    if (!v)
        return IC_OK;
    if (!json_is_string(v) || json_string_length(v) >= size ||
        strlen(json_string_value(v)) != json_string_length(v))
        return ic_fail(err, IC_BAD_REQUEST, "config: %s is not a string of less than %zu bytes", key, size);
    memcpy(out, json_string_value(v), json_string_length(v) + 1);
    return IC_OK;
}

static enum ic_status get_count(const json_t *root, const char *key, unsigned max, unsigned *out,
                                struct ic_err *err)
{
    const json_t *v = value_of(root, key);
    if (!v)
        return IC_OK;
    double x = json_is_number(v) ? json_number_value(v) : -1; /* a trainer may write 64.0 */
    if (!(x >= 1) || x > max || x != floor(x))
        return ic_fail(err, IC_BAD_REQUEST, "config: %s is not a whole number from 1 to %u", key, max);
    *out = (unsigned)x;
    return IC_OK;
}

static enum ic_status get_gamma(const json_t *root, double *out, struct ic_err *err)
{
    const json_t *v = value_of(root, "GAMMA_DECAY");
    if (!v)
        return IC_OK;
    if (!json_is_number(v) || fabs(json_number_value(v)) > 1e6)
        return ic_fail(err, IC_BAD_REQUEST, "config: GAMMA_DECAY is not a number of sensible size");
    *out = json_number_value(v);
    return IC_OK;
}

/* CARTESIAN, QUANTUM, HOLOGRAPHIC and whatever get_motor does not know step as CartesianEngine does. These
 * four mean something else by the same network, or use none. */
static enum ic_status check_engine(const json_t *root, struct ic_err *err)
{
    static const char *const others[] = {"POLAR", "LATTICE", "HARMONIC", "LAGRANGIAN"};
    char engine[64] = "";
    enum ic_status s = get_text(root, "ENGINE_TYPE", engine, sizeof engine, err);
    for (size_t i = 0; s == IC_OK && i < sizeof others / sizeof others[0]; i++)
        if (strcmp(engine, others[i]) == 0)
            s = ic_fail(err, IC_BAD_REQUEST, "config: ENGINE_TYPE %s steps by other rules than CARTESIAN",
                        engine);
    return s;
}

static enum ic_status read_sizes(const json_t *root, struct ic_law_config *c, struct ic_err *err)
{
    const json_t *params = value_of(root, "MODEL_PARAMS");
    if (params && !json_is_object(params))
        return ic_fail(err, IC_BAD_REQUEST, "config: MODEL_PARAMS is not an object");
    enum ic_status s = get_count(root, "D_STATE", IC_LAW_D_MAX, &c->d, err);
    if (s == IC_OK)
        s = get_count(root, "HIDDEN_CHANNELS", IC_LAW_B_MAX, &c->b, err);
    if (s == IC_OK && params) /* what the network was built with: the last word */
        s = get_count(params, "d_state", IC_LAW_D_MAX, &c->d, err);
    if (s == IC_OK && params)
        s = get_count(params, "hidden_channels", IC_LAW_B_MAX, &c->b, err);
    return s;
}

static enum ic_status read_root(const json_t *root, struct ic_law_config *c, struct ic_err *err)
{
    if (!json_is_object(root))
        return ic_fail(err, IC_BAD_REQUEST, "config: not a JSON object");
    enum ic_status s = read_sizes(root, c, err);
    if (s == IC_OK)
        s = get_text(root, "EXPERIMENT_NAME", c->name, sizeof c->name, err);
    if (s == IC_OK)
        s = get_text(root, "MODEL_ARCHITECTURE", c->arch, sizeof c->arch, err);
    if (s == IC_OK)
        s = get_text(root, "INITIAL_STATE_MODE_INFERENCE", c->initial_mode, sizeof c->initial_mode, err);
    if (s == IC_OK)
        s = get_gamma(root, &c->gamma, err);
    if (s == IC_OK)
        s = get_count(root, "GRID_SIZE_TRAINING", 1u << 20, &c->grid_training, err);
    if (s == IC_OK)
        s = get_count(root, "QCA_STEPS_TRAINING", 1u << 30, &c->steps_training, err);
    return s == IC_OK ? check_engine(root, err) : s;
}

/* Python writes NaN, Infinity and integers of any size, JSON has none of them: a key that nobody asks for may hold one.
 * They become empty strings, which no key of ours takes. */
static void mend_python(char *text, size_t len)
{
    static const char *const words[] = {"-Infinity", "Infinity", "NaN"};
    bool quoted = false;
    for (size_t i = 0; i < len; i++) {
        if (quoted && text[i] == '\\')
            i++;
        else if (text[i] == '"')
            quoted = !quoted;
        for (size_t k = 0; !quoted && k < sizeof words / sizeof words[0]; k++) {
            const size_t n = strlen(words[k]);
            if (len - i < n || memcmp(text + i, words[k], n) != 0)
                continue;
            memset(text + i, ' ', n);
            text[i] = text[i + 1] = '"';
            i += n - 1;
            break;
        }
    }
}

enum ic_status ic_law_config_parse(const char *text, size_t len, struct ic_law_config *out,
                                   struct ic_err *err)
{
    *out = (struct ic_law_config){.gamma = (double)NAN};
    if (len > IC_LAW_CONFIG_MAX)
        return ic_fail(err, IC_TOO_LARGE, "config: past IC_LAW_CONFIG_MAX (%zu bytes)", IC_LAW_CONFIG_MAX);
    char *mended = malloc(len + 1);
    if (!mended)
        return ic_fail(err, IC_OOM, "no memory for a config");
    memcpy(mended, text, len);
    mend_python(mended, len);
    json_error_t je;
    json_t *root = ic_json_load(mended, len, JSON_REJECT_DUPLICATES | JSON_DECODE_INT_AS_REAL, &je);
    enum ic_status s =
        root ? read_root(root, out, err)
             : ic_fail(err, json_error_code(&je) == json_error_out_of_memory ? IC_OOM : IC_BAD_REQUEST,
                       "config: line %d: %s", je.line, je.text);
    json_decref(root);
    free(mended);
    return s;
}

enum ic_status ic_law_config_read(const char *path, struct ic_law_config *out, struct ic_err *err)
{
    *out = (struct ic_law_config){.gamma = (double)NAN};
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return ic_fail(err, errno == ENOENT || errno == ENOTDIR ? IC_NOT_FOUND : IC_INTERNAL, "%s: %s",
                       path, strerror(errno));
    struct stat st;
    enum ic_status s = IC_OK;
    char *text = NULL;
    if (fstat(fd, &st) || !S_ISREG(st.st_mode))
        s = ic_fail(err, IC_BAD_REQUEST, "%s is not a regular file", path);
    else if (st.st_size > (off_t)IC_LAW_CONFIG_MAX)
        s = ic_fail(err, IC_TOO_LARGE, "%s is past IC_LAW_CONFIG_MAX (%zu bytes)", path, IC_LAW_CONFIG_MAX);
    else if (!(text = malloc((size_t)st.st_size + 1)))
        s = ic_fail(err, IC_OOM, "no memory for %s", path);
    else
        s = ic_pread_all(fd, 0, text, (size_t)st.st_size, err);
    close(fd);
    struct ic_err why = {0};
    if (s == IC_OK && (s = ic_law_config_parse(text, (size_t)st.st_size, out, &why)) != IC_OK)
        ic_fail(err, s, "%s: %s", path, why.msg); /* of several laws, which */
    free(text);
    return s;
}
