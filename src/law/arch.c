#include "law/arch.h"

#include <stdio.h>
#include <string.h>

static const struct ic_law_arch_info infos[IC_LAW_ARCH_COUNT] = {
    [IC_LAW_UNET] = {"UNET", "U-Net, GroupNorm, added to the field", false, false, 4},
    [IC_LAW_UNET_UNITARY] = {"UNET_UNITARY", "the same U-Net, multiplied with the field", true, false, 4},
    [IC_LAW_UNET_UNITARY_RMSNORM] = {"UNET_UNITARY_RMSNORM", "U-Net, RMSNorm, added (despite its name)",
                                     false, false, 4},
    [IC_LAW_UNET_CONVLSTM] = {"UNET_CONVLSTM", "U-Net with a ConvLSTM memory at the bottom", false, true,
                              4},
    [IC_LAW_MLP] = {"MLP", "three 1x1 convolutions", false, false, 1},
    [IC_LAW_DEEP_QCA] = {"DEEP_QCA", "sum of 8 neighbours, then three 1x1 convolutions", false, false, 1},
    [IC_LAW_SNN_UNET] = {"SNN_UNET", "spiking net: every delta component is 0 or 1", false, false, 1},
};

const struct ic_law_arch_info *ic_law_arch_info(enum ic_law_arch arch)
{
    IC_ASSERT((unsigned)arch < IC_LAW_ARCH_COUNT);
    return &infos[arch];
}

enum ic_status ic_law_arch_parse(const char *name, enum ic_law_arch *out, struct ic_err *err)
{
    char list[160] = "";
    size_t at = 0;
    for (unsigned i = 0; i < IC_LAW_ARCH_COUNT; i++) {
        if (strcmp(infos[i].name, name) == 0)
            return *out = (enum ic_law_arch)i, IC_OK;
        at += (size_t)snprintf(list + at, sizeof list - at, "%s%s", i ? ", " : "", infos[i].name);
    }
    return ic_fail(err, IC_BAD_REQUEST, "architecture %.30s is none of %s", name, list);
}

unsigned ic_law_groups(unsigned c)
{
    unsigned g = c > 8 ? c / 8 : 1;
    return c % g == 0 ? g : 1;
}

/* ---- The tensors of each family -------------------------------------------------------------- */

struct list {
    struct ic_law_spec *out;
    size_t n;
};

static struct ic_law_spec *add(struct list *l, const char *prefix, const char *name, unsigned ndim,
                               unsigned a, unsigned b, unsigned k)
{
    IC_ASSERT(l->n < IC_LAW_SPECS_MAX);
    struct ic_law_spec *s = &l->out[l->n++];
    *s = (struct ic_law_spec){.ndim = ndim, .dim = {1, 1, 1, 1}, .parameter = true};
    int len = snprintf(s->name, sizeof s->name, "%s%s", prefix, name);
    IC_ASSERT(len > 0 && (size_t)len < sizeof s->name);
    if (ndim >= 1)
        s->dim[0] = a;
    if (ndim == 4) {
        s->dim[1] = b;
        s->dim[2] = s->dim[3] = k;
    }
    return s;
}

/* `<name>.weight [a,b,k,k]` and `<name>.bias [biased]` */
static void add_conv(struct list *l, const char *name, unsigned a, unsigned b, unsigned k, unsigned biased)
{
    add(l, name, ".weight", 4, a, b, k);
    if (biased)
        add(l, name, ".bias", 1, biased, 0, 0);
}

static void add_norm(struct list *l, const char *block, const char *at, unsigned c, bool rms)
{
    char name[IC_LAW_TENSOR_NAME_MAX];
    snprintf(name, sizeof name, "%s.conv_block.%s", block, at);
    add(l, name, ".weight", 1, c, 0, 0);
    if (!rms)
        add(l, name, ".bias", 1, c, 0, 0);
}

/* ConvBlock (law-m.md §2.1, §2.3) */
static void add_block(struct list *l, const char *block, unsigned cin, unsigned cout, bool rms)
{
    add(l, block, ".conv_block.0.weight", 4, cout, cin, 3);
    add_norm(l, block, "1", cout, rms);
    add(l, block, ".conv_block.3.weight", 4, cout, cout, 3);
    add_norm(l, block, "4", cout, rms);
}

static void add_unet(struct list *l, enum ic_law_arch arch, unsigned d, unsigned b)
{
    bool rms = arch == IC_LAW_UNET_UNITARY_RMSNORM;
    add_block(l, "inc", 2 * d, b, rms);
    add_block(l, "down1.1", b, 2 * b, rms);
    add_block(l, "down2.1", 2 * b, 4 * b, rms);
    if (arch == IC_LAW_UNET_CONVLSTM)
        add_conv(l, "conv_gates", 16 * b, 8 * b, 3, 16 * b);
    add_block(l, "bot", 4 * b, 8 * b, rms);
    add_conv(l, "up1", 8 * b, 4 * b, 2, 4 * b);
    add_block(l, "conv_up1", 6 * b, 4 * b, rms);
    add_conv(l, "up2", 4 * b, 2 * b, 2, 2 * b);
    add_block(l, "conv_up2", 3 * b, b, rms);
    add_conv(l, "outc", 2 * d, b, 1, 2 * d);
}

static void add_lif(struct list *l, const char *name)
{
    static const struct {
        const char *tail;
        float standard;
    } buffers[] = {{".threshold", 1.0f}, {".beta", 0.85f}, {".graded_spikes_factor", 1.0f}};
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++) {
        struct ic_law_spec *s = add(l, name, buffers[i].tail, 0, 0, 0, 0);
        s->parameter = false;
        s->optional = true;
        s->standard = buffers[i].standard;
    }
}

static void add_snn(struct list *l, unsigned d, unsigned b)
{
    add_conv(l, "conv1", b, 2 * d, 3, b);
    add_lif(l, "lif1");
    add_conv(l, "conv_bottom", 2 * b, b, 3, 2 * b);
    add_lif(l, "lif_bottom");
    add_conv(l, "upconv", 2 * b, b, 2, b);
    add_conv(l, "conv2", b, 2 * b, 3, b);
    add_lif(l, "lif2");
    add_conv(l, "conv_out", 2 * d, b, 1, 2 * d);
    add_lif(l, "lif_out");
}

size_t ic_law_arch_specs(enum ic_law_arch arch, unsigned d, unsigned b, struct ic_law_spec *out)
{
    struct list l = {.out = out};
    IC_ASSERT(d >= 1 && d <= IC_LAW_D_MAX && b >= 1 && b <= IC_LAW_B_MAX);
    switch (arch) {
    case IC_LAW_UNET:
    case IC_LAW_UNET_UNITARY:
    case IC_LAW_UNET_UNITARY_RMSNORM:
    case IC_LAW_UNET_CONVLSTM: add_unet(&l, arch, d, b); break;
    case IC_LAW_MLP:
        add_conv(&l, "net.0", b, 2 * d, 1, b);
        add_conv(&l, "net.2", b, b, 1, b);
        add_conv(&l, "net.4", 2 * d, b, 1, 2 * d);
        break;
    case IC_LAW_DEEP_QCA:
        add_conv(&l, "conv_neighbors", 16 * d, 1, 3, 0);
        add_conv(&l, "processing_net.0", b, 16 * d, 1, b);
        add_conv(&l, "processing_net.2", b, b, 1, b);
        add_conv(&l, "processing_net.4", 2 * d, b, 1, 2 * d);
        break;
    case IC_LAW_SNN_UNET: add_snn(&l, d, b); break;
    case IC_LAW_ARCH_COUNT: IC_ASSERT(!"an architecture");
    }
    return l.n;
}

uint64_t ic_law_macs_per_cell(enum ic_law_arch arch, unsigned d, unsigned b)
{
    uint64_t D = d, B = b;
    switch (arch) {
    case IC_LAW_UNET:
    case IC_LAW_UNET_UNITARY:
    case IC_LAW_UNET_UNITARY_RMSNORM: return 232 * B * B + 20 * B * D;
    case IC_LAW_UNET_CONVLSTM: return 304 * B * B + 20 * B * D;
    case IC_LAW_MLP: return B * B + 4 * B * D;
    case IC_LAW_DEEP_QCA: return B * B + 20 * B * D; /* neighbours and first layer as one 3x3 */
    case IC_LAW_SNN_UNET: return 44 * B * B + 20 * B * D;
    case IC_LAW_ARCH_COUNT: break;
    }
    return 0;
}
