/* Which web pages may use the server from a browser: an origin is scheme://host[:port], as browsers send it. */
#include <string.h>
#include <strings.h>

#include "net/net_i.h"

/* One item of [*at, end of text): its start, *len bytes; NULL: there is no more. */
static const char *next_item(const char **at, size_t *len)
{
    const char *s = *at + strspn(*at, " \t,");

    *len = strcspn(s, " \t,");
    *at = s + *len;
    return *len ? s : NULL;
}

/* scheme "://" authority, and nothing after it */
static bool is_origin(const char *s, size_t len)
{
    static const char *const schemes[] = {
        "http://", "https://", "chrome-extension://", "moz-extension://", "app://", "tauri://", "file://"};

    if ((len == 1 && *s == '*') || (len == 4 && !strncmp(s, "null", 4)))
        return true;
    for (size_t i = 0; i < sizeof schemes / sizeof *schemes; i++) {
        size_t n = strlen(schemes[i]);
        if (len >= n && !strncasecmp(s, schemes[i], n))
            return !memchr(s + n, '/', len - n) && (len > n || schemes[i][0] == 'f');
    }
    return false;
}

enum ic_status ic_net_check_origins(const char *list, struct ic_err *err)
{
    size_t len;
    const char *s;

    while (list && (s = next_item(&list, &len)))
        if (!is_origin(s, len))
            return ic_fail(err, IC_BAD_REQUEST,
                           "--origins takes * or origins like https://example.org:8443, not \"%.*s\"",
                           len < 60 ? (int)len : 60, s);
    return IC_OK;
}

const char *origin_answer(const struct ic_net_config *cfg, const struct ic_req *r)
{
    const char *list = cfg->origins, *origin = ic_req_field(r, "origin"), *s;
    size_t len;

    while (*origin && list && (s = next_item(&list, &len))) {
        if (len == 1 && *s == '*')
            return "*";
        if (len == strlen(origin) && !strncasecmp(s, origin, len))
            return origin;
    }
    return NULL;
}

bool origin_may_connect(const struct ic_net_config *cfg, const struct ic_req *r)
{
    const char *origin = ic_req_field(r, "origin"), *host = strstr(origin, "://");

    return !cfg->origins || !*origin || origin_answer(cfg, r) ||
           (host && !strcasecmp(host + 3, ic_req_field(r, "host"))); /* a page of our own */
}

bool origin_preflight(struct conn *c)
{
    const struct ic_req *r = &c->http.req;

    if (strcmp(r->method, "OPTIONS") != 0 || !*ic_req_field(r, "access-control-request-method") ||
        !origin_answer(c->net->cfg, r))
        return false;
    /* "*" does not cover Authorization (the Fetch standard) */
    http_answer(c, 204, NULL,
                "Access-Control-Allow-Methods: GET, HEAD, POST\r\n"
                "Access-Control-Allow-Headers: Authorization, *\r\nAccess-Control-Max-Age: 600\r\n",
                NULL, 0);
    return true;
}
