/* The monitor's thread and what it leaves for others to see.
 *
 * `lock` guards all fields behind it; it is not held while sensors are read. Locks are taken in the order
 * monitor, governor; the governor calls poke without its own. The thread sleeps only after
 * ic_governor_sleep has said, under `lock`, that nobody has worked meanwhile: work that begins later pokes,
 * and the poke has to wait for `lock` until the thread is asleep. So no work goes unwatched. */
#include "hw/monitor.h"

#include <stdlib.h>

#include "base/clock.h"

struct ic_monitor {
    struct ic_monitor_config cfg;
    struct ic_governor governor;
    struct ic_hw_sample sample; /* the thread's own: what is being read */
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    bool stop, watched, asked;
    struct ic_hw_view view;
};

/* Everything `what` names, into m->sample, the view and the governor. The thread's. */
static void read_sensors(struct ic_monitor *m, int what)
{
    bool gpus = false;

    for (unsigned i = 0; i < m->cfg.n_sources; i++) {
        const struct ic_sensor_source *s = &m->cfg.sources[i];
        if (what & s->what) {
            s->read(s->arg, what & s->what, &m->sample);
            gpus |= (what & s->what & IC_READ_GPU) != 0;
        }
    }
    int64_t now = ic_now_ns();
    bool changed = ic_governor_update(&m->governor, &m->sample, what, now);
    pthread_mutex_lock(&m->lock);
    m->view.sample = m->sample;
    m->view.reads++;
    m->view.gpu_reads += gpus;
    if (what & IC_READ_GPU)
        m->view.gpu_ns = now;
    if (what & IC_READ_CPU)
        m->view.cpu_ns = now;
    pthread_mutex_unlock(&m->lock);
    if (changed && m->cfg.changed)
        m->cfg.changed(m->cfg.changed_arg);
}

/* What is to be read now (IC_READ_*), 0: nothing, until something happens. Under the lock; `last` is when
 * the last reading began. */
static int wanted(struct ic_monitor *m, int64_t last, int64_t now)
{
    struct ic_thermal t;

    ic_governor_view(&m->governor, now, &t);
    if (m->watched || t.state != IC_THERMAL_NORMAL ||
        !ic_governor_sleep(&m->governor, now - IC_MONITOR_LINGER_NS))
        return IC_READ_ALL;
    if (m->asked && now - last >= IC_MONITOR_IDLE_NS) {
        m->asked = false;
        return IC_READ_CPU;
    }
    m->asked = false;
    return 0;
}

static void wait_until(struct ic_monitor *m, int64_t until)
{
    struct timespec ts = {(time_t)(until / 1000000000), (long)(until % 1000000000)};
    pthread_cond_timedwait(&m->wake, &m->lock, &ts);
}

static void *monitor_main(void *arg)
{
    struct ic_monitor *m = arg;
    int64_t last = ic_now_ns();

    if (m->cfg.add)
        m->cfg.n_sources = m->cfg.add(m->cfg.add_arg, m->cfg.sources, m->cfg.n_sources);
    IC_ASSERT(m->cfg.n_sources <= IC_MONITOR_SOURCES_MAX);
    read_sensors(m, IC_READ_ALL);
    pthread_mutex_lock(&m->lock);
    while (!m->stop) {
        int64_t now = ic_now_ns();
        if (now - last < m->cfg.period_ns) {
            wait_until(m, last + m->cfg.period_ns);
            continue;
        }
        int what = wanted(m, last, now);
        if (!what) {
            pthread_cond_wait(&m->wake, &m->lock);
            continue;
        }
        last = now;
        pthread_mutex_unlock(&m->lock);
        read_sensors(m, what);
        pthread_mutex_lock(&m->lock);
    }
    pthread_mutex_unlock(&m->lock);
    return NULL;
}

static void wake(void *arg)
{
    struct ic_monitor *m = arg;

    pthread_mutex_lock(&m->lock);
    pthread_cond_signal(&m->wake);
    pthread_mutex_unlock(&m->lock);
}

static void close_sources(const struct ic_monitor_config *cfg)
{
    for (unsigned i = 0; i < cfg->n_sources; i++)
        cfg->sources[i].close(cfg->sources[i].arg);
}

static void destroy(struct ic_monitor *m)
{
    close_sources(&m->cfg);
    pthread_mutex_destroy(&m->lock);
    pthread_cond_destroy(&m->wake);
    ic_governor_deinit(&m->governor);
    free(m);
}

enum ic_status ic_monitor_open(struct ic_monitor **out, const struct ic_monitor_config *cfg,
                               struct ic_err *err)
{
    struct ic_monitor *m = calloc(1, sizeof *m);
    pthread_condattr_t attr;

    *out = NULL;
    IC_ASSERT(cfg->n_sources <= IC_MONITOR_SOURCES_MAX);
    if (!m) {
        close_sources(cfg);
        return ic_fail(err, IC_OOM, "out of memory");
    }
    m->cfg = *cfg;
    if (m->cfg.period_ns <= 0)
        m->cfg.period_ns = IC_MONITOR_PERIOD_NS;
    ic_hw_sample_clear(&m->sample);
    m->view.sample = m->sample;
    ic_governor_init(&m->governor, &cfg->governor);
    ic_governor_set_poke(&m->governor, wake, m);
    pthread_mutex_init(&m->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&m->wake, &attr);
    pthread_condattr_destroy(&attr);
    if (pthread_create(&m->thread, NULL, monitor_main, m) != 0) {
        destroy(m);
        return ic_fail(err, IC_OOM, "no thread for the hardware monitor");
    }
    pthread_setname_np(m->thread, "ic-hw");
    *out = m;
    return IC_OK;
}

void ic_monitor_close(struct ic_monitor **mp)
{
    struct ic_monitor *m = *mp;

    if (!m)
        return;
    pthread_mutex_lock(&m->lock);
    m->stop = true;
    pthread_cond_signal(&m->wake);
    pthread_mutex_unlock(&m->lock);
    pthread_join(m->thread, NULL);
    destroy(m);
    *mp = NULL;
}

struct ic_governor *ic_monitor_governor(struct ic_monitor *m)
{
    return &m->governor;
}

void ic_monitor_watch(struct ic_monitor *m, bool somebody)
{
    pthread_mutex_lock(&m->lock);
    bool news = somebody && !m->watched;
    m->watched = somebody;
    if (news)
        pthread_cond_signal(&m->wake);
    pthread_mutex_unlock(&m->lock);
}

void ic_monitor_ask(struct ic_monitor *m)
{
    pthread_mutex_lock(&m->lock);
    m->asked = true;
    pthread_cond_signal(&m->wake);
    pthread_mutex_unlock(&m->lock);
}

void ic_monitor_view(struct ic_monitor *m, struct ic_hw_view *out)
{
    int64_t now = ic_now_ns();

    pthread_mutex_lock(&m->lock);
    *out = m->view;
    pthread_mutex_unlock(&m->lock);
    if (now - out->gpu_ns > IC_MONITOR_FRESH_NS)
        for (unsigned i = 0; i < out->sample.n_gpus; i++)
            ic_gpu_sample_clear(&out->sample.gpu[i]);
}
