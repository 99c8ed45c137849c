/* HTTP/1 request heads (RFC 9112) and chunked bodies.
 *
 * Strict where leniency lets two parties read one message differently (request smuggling): a space
 * before the colon, folded lines, both Content-Length and Transfer-Encoding, two lengths, control
 * characters. Lenient only with bare line feeds in a head, which people type into nc.
 *
 * Thread: any; no state outside the arguments. Owner: the caller. */
#include "net/head.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

size_t ic_head_end(const char *p, size_t len, size_t from)
{
    size_t i = from > 3 ? from - 3 : 0;
    while (i < len) {
        const char *nl = memchr(p + i, '\n', len - i);
        if (!nl)
            return 0;
        i = (size_t)(nl - p) + 1;
        if (i < len && p[i] == '\n')
            return i + 1;
        if (i + 1 < len && p[i] == '\r' && p[i + 1] == '\n')
            return i + 2;
    }
    return 0;
}

static bool is_token_char(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
           (c && strchr("!#$%&'*+-.^_`|~", c));
}

bool ic_head_begins(char c)
{
    return is_token_char(c);
}

static bool is_token(const char *s)
{
    if (!*s)
        return false;
    while (is_token_char(*s))
        s++;
    return !*s;
}

/* Whether the comma separated list holds the word, without regard to case. */
static bool list_has(const char *list, const char *word)
{
    size_t n = strlen(word);
    while (*list) {
        list += strspn(list, " \t,");
        size_t len = strcspn(list, ",");
        size_t used = len;
        while (len && (list[len - 1] == ' ' || list[len - 1] == '\t'))
            len--;
        if (len == n && !strncasecmp(list, word, n))
            return true;
        list += used;
    }
    return false;
}

static int hex(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    if (c >= 'A' && c <= 'F')
        return c - 'A' + 10;
    return -1;
}

/* Percent-decodes in place. False: malformed, or a control character came out. */
static bool decode_path(char *s)
{
    char *out = s;
    for (; *s; s++) {
        int c = (unsigned char)*s;
        if (c == '%') {
            int hi = hex(s[1]), lo = hi < 0 ? -1 : hex(s[2]);
            if (lo < 0)
                return false;
            c = hi * 16 + lo;
            s += 2;
        }
        if (c < 0x20 || c == 0x7f)
            return false;
        *out++ = (char)c;
    }
    *out = 0;
    return true;
}

/* Splits off the next line of [*at, end), without its line end. */
static char *next_line(char **at, char *end)
{
    char *line = *at;
    char *nl = memchr(line, '\n', (size_t)(end - line));
    if (!nl)
        return NULL;
    *at = nl + 1;
    if (nl > line && nl[-1] == '\r')
        nl--;
    *nl = 0;
    return line;
}

static int parse_request_line(struct ic_req *r, char *line, const char **why)
{
    char *target = strchr(line, ' ');
    char *version = target ? strchr(target + 1, ' ') : NULL;
    *why = "malformed request line";
    if (!version)
        return 400;
    *target++ = 0;
    *version++ = 0;
    if (strlen(version) != 8 || strncmp(version, "HTTP/", 5) || version[6] != '.' ||
        !strchr("0123456789", version[7]))
        return 400;
    if (version[5] != '1') {
        *why = "only HTTP/1.x is spoken here";
        return 505;
    }
    r->http11 = version[7] != '0';
    if (!is_token(line))
        return 400;
    r->method = line;
    r->head = !strcmp(line, "HEAD");
    if (!strncasecmp(target, "http://", 7) || !strncasecmp(target, "https://", 8)) {
        target = strstr(target, "//") + 2;
        target += strcspn(target, "/?");
        if (*target != '/') /* http://host or http://host?query: the slash may be missing */
            *--target = '/';
    }
    if (!strcmp(target, "*") && !strcmp(line, "OPTIONS"))
        *target = '/';
    *why = "malformed request target";
    if (*target != '/')
        return 400;
    target[strcspn(target, "#")] = 0;
    char *query = target + strcspn(target, "?");
    if (*query)
        *query++ = 0;
    r->path = target;
    r->query = query;
    return decode_path(target) ? 0 : 400;
}

static const char *const kept_names[] = {
    "authorization", "x-client-id", "x-api-key", "content-type",
    "origin",        "accept",      "host",      "access-control-request-method"};

static bool is_kept(const char *name)
{
    if (!strncasecmp(name, "x-ic-", 5))
        return true;
    for (size_t i = 0; i < sizeof kept_names / sizeof *kept_names; i++)
        if (!strcasecmp(name, kept_names[i]))
            return true;
    return false;
}

struct head_scan {
    const char *name[IC_HEAD_FIELDS_MAX], *value[IC_HEAD_FIELDS_MAX]; /* the kept ones */
    size_t kept;
    unsigned hosts;
    bool has_length, has_coding, has_key, upgrade_ws, connection_upgrade, close, stay;
};

static int parse_length(struct ic_req *r, struct head_scan *s, const char *v, const char **why)
{
    uint64_t n = 0;
    *why = "bad Content-Length";
    if (!*v || strlen(v) > 18)
        return 400;
    for (; *v; v++) {
        if (*v < '0' || *v > '9')
            return 400;
        n = n * 10 + (uint64_t)(*v - '0');
    }
    if (s->has_length && n != r->length)
        return 400;
    s->has_length = true;
    r->length = n;
    return 0;
}

static void copy_fitting(char *dst, size_t size, const char *src, size_t len)
{
    if (len < size) {
        memcpy(dst, src, len);
        dst[len] = 0;
    }
}

/* Remembers what a field says. 0 or the HTTP status to refuse with. */
static int take_field(struct ic_req *r, struct head_scan *s, const char *name, const char *v,
                      const char **why)
{
    if (!strcasecmp(name, "host")) {
        s->hosts++;
        *why = "malformed Host";
        if (v[strcspn(v, " \t/?#@\\")])
            return 400;
    }
    if (is_kept(name) && s->kept < IC_HEAD_FIELDS_MAX) {
        s->name[s->kept] = name;
        s->value[s->kept++] = v;
    } else if (!strcasecmp(name, "content-length")) {
        return parse_length(r, s, v, why);
    } else if (!strcasecmp(name, "transfer-encoding")) {
        *why = "only the chunked transfer coding is known";
        if (s->has_coding || strcasecmp(v, "chunked"))
            return 501;
        s->has_coding = r->chunked = true;
    } else if (!strcasecmp(name, "connection")) {
        s->close |= list_has(v, "close");
        s->stay |= list_has(v, "keep-alive");
        s->connection_upgrade |= list_has(v, "upgrade");
    } else if (!strcasecmp(name, "upgrade")) {
        s->upgrade_ws |= list_has(v, "websocket");
    } else if (!strcasecmp(name, "expect")) {
        r->expect_continue |= !strcasecmp(v, "100-continue");
    } else if (!strcasecmp(name, "sec-websocket-key")) {
        *why = "two Sec-WebSocket-Key fields";
        if (s->has_key)
            return 400;
        s->has_key = true;
        copy_fitting(r->ws_key, sizeof r->ws_key, v, strlen(v));
    } else if (!strcasecmp(name, "sec-websocket-version")) {
        r->ws_version = strlen(v) < 4 ? atoi(v) : -1;
    } else if (!strcasecmp(name, "sec-websocket-protocol") && !r->ws_protocol[0]) {
        copy_fitting(r->ws_protocol, sizeof r->ws_protocol, v, strcspn(v, ", \t"));
        if (!is_token(r->ws_protocol))
            r->ws_protocol[0] = 0;
    } else if (!strcasecmp(name, "if-none-match")) {
        copy_fitting(r->etag, sizeof r->etag, v, strlen(v));
    }
    return 0;
}

static int parse_field(struct ic_req *r, struct head_scan *s, char *line, const char **why)
{
    char *v = strchr(line, ':');
    *why = "malformed header field";
    if (!v)
        return 400;
    *v++ = 0;
    if (!is_token(line)) /* also a space before the colon, and a folded line */
        return 400;
    v += strspn(v, " \t");
    size_t len = strlen(v);
    while (len && (v[len - 1] == ' ' || v[len - 1] == '\t'))
        v[--len] = 0;
    for (const char *p = v; *p; p++)
        if (((unsigned char)*p < 0x20 && *p != '\t') || *p == 0x7f)
            return 400;
    return take_field(r, s, line, v, why);
}

/* Moves what is kept into one allocation of its own size: a WebSocket keeps it as long as it lives. */
static bool pack(struct ic_req *r, const struct head_scan *s)
{
    const char *fixed[3] = {r->method, r->path, r->query};
    size_t size = 0;
    for (size_t i = 0; i < 3; i++)
        size += strlen(fixed[i]) + 1;
    for (size_t i = 0; i < s->kept; i++)
        size += strlen(s->name[i]) + strlen(s->value[i]) + 2;
    char *at = r->text = malloc(size);
    if (!at)
        return false;
    const char **out[3] = {&r->method, &r->path, &r->query};
    for (size_t i = 0; i < 3; i++) {
        *out[i] = at;
        at = stpcpy(at, fixed[i]) + 1;
    }
    r->kept = at;
    for (size_t i = 0; i < s->kept; i++) {
        at = stpcpy(at, s->name[i]) + 1;
        at = stpcpy(at, s->value[i]) + 1;
    }
    r->kept_len = (size_t)(at - r->kept);
    return true;
}

int ic_req_parse(struct ic_req *r, char *head, size_t len, const char **why)
{
    *r = (struct ic_req){0};
    struct head_scan s = {0};
    *why = "NUL in the request head";
    if (memchr(head, 0, len))
        return 400;
    char *at = head, *end = head + len;
    *why = "malformed request line";
    char *line = next_line(&at, end);
    int status = line ? parse_request_line(r, line, why) : 400;
    for (unsigned fields = 0; !status && (line = next_line(&at, end)) && *line; fields++) {
        *why = "too many header fields";
        status = fields < IC_HEAD_FIELDS_MAX ? parse_field(r, &s, line, why) : 431;
    }
    if (status)
        return status;
    *why = "Host must be given once";
    if (s.hosts > 1 || (r->http11 && !s.hosts))
        return 400;
    *why = "both Content-Length and Transfer-Encoding";
    if (s.has_length && s.has_coding)
        return 400;
    /* a proxy of that age would look for the next request in the body */
    *why = "HTTP/1.0 has no Transfer-Encoding";
    if (s.has_coding && !r->http11)
        return 400;
    r->keep_alive = r->http11 ? !s.close : s.stay && !s.close;
    r->upgrade = s.upgrade_ws && s.connection_upgrade && r->http11;
    r->expect_continue &= r->http11;
    *why = "out of memory";
    return pack(r, &s) ? 0 : 507;
}

const char *ic_req_field(const struct ic_req *r, const char *name)
{
    const char *end = r->kept + r->kept_len;
    for (const char *at = r->kept; at < end;) {
        const char *value = at + strlen(at) + 1;
        if (!strcasecmp(at, name))
            return value;
        at = value + strlen(value) + 1;
    }
    return "";
}

void ic_req_deinit(struct ic_req *r)
{
    free(r->text);
    *r = (struct ic_req){0};
}

/* Chunked coding:  SIZE [;EXT] CR LF  DATA CR LF  …  0 CR LF  (NAME:VALUE CR LF)* CR LF
 *
 * Here a bare line feed is refused too: nobody types chunks, and where a proxy in front reads on over it, the rest of
 * its line would be a request of its own. */
enum {
    K_SIZE,
    K_BLANK,
    K_EXT,
    K_SIZE_LF,
    K_DATA,
    K_DATA_CR,
    K_DATA_LF,
    K_TRAILER,
    K_NAME,
    K_VALUE,
    K_VALUE_LF,
    K_LAST_LF
};

/* One byte outside the data. False: malformed. */
static bool chunked_byte(struct ic_chunked *s, uint8_t b)
{
    bool text = b == '\t' || (b >= 0x20 && b != 0x7f);

    switch (s->state) {
    case K_SIZE: {
        int d = hex((char)b);
        if (d >= 0) {
            s->left = s->left * 16 + (uint64_t)d;
            return ++s->digits <= 15;
        }
        if (!s->digits)
            return false;
        s->state = K_BLANK;
    }
        /* fall through */
    case K_BLANK:
        text = b == ' ' || b == '\t' || b == ';';
        if (b == ';')
            s->state = K_EXT;
        /* fall through */
    case K_EXT:
        if (b != '\r')
            return text && ++s->extra < IC_HEAD_MAX;
        s->state = K_SIZE_LF;
        return true;
    case K_SIZE_LF:
        s->state = s->left ? K_DATA : K_TRAILER;
        s->digits = 0;
        return b == '\n';
    case K_DATA_CR: s->state = K_DATA_LF; return b == '\r';
    case K_DATA_LF:
        s->state = K_SIZE;
        s->extra = 0;
        return b == '\n';
    case K_TRAILER: /* at the start of a line */
        s->state = b == '\r' ? K_LAST_LF : K_NAME;
        return b == '\r' || (is_token_char((char)b) && ++s->extra < IC_HEAD_MAX);
    case K_NAME:
        if (b == ':')
            s->state = K_VALUE;
        return (b == ':' || is_token_char((char)b)) && ++s->extra < IC_HEAD_MAX;
    case K_VALUE:
        if (b != '\r')
            return text && ++s->extra < IC_HEAD_MAX;
        s->state = K_VALUE_LF;
        return true;
    case K_VALUE_LF: s->state = K_TRAILER; return b == '\n';
    default: s->done = b == '\n'; return s->done;
    }
}

long ic_chunked_feed(struct ic_chunked *s, const uint8_t *p, size_t len, const uint8_t **data,
                     size_t *data_len)
{
    size_t used = 0;
    *data_len = 0;
    while (used < len && !s->done) {
        if (s->state == K_DATA) {
            size_t n = len - used < s->left ? len - used : (size_t)s->left;
            *data = p + used;
            *data_len = n;
            s->left -= n;
            if (!s->left)
                s->state = K_DATA_CR;
            return (long)(used + n);
        }
        if (!chunked_byte(s, p[used++]))
            return -1;
    }
    return (long)used;
}
