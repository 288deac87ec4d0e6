/* With a driver that only writes down launches: contexts and devices are told apart, and every kernel that is built can be
 * reached by arguments that ask for it. */

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gim_kernels.h"

typedef int (*launch_function)(const void *, const char *, unsigned, unsigned, unsigned, void **);

static int failures;
static unsigned launches;
static char symbols[1024];

static int note(const void *image, const char *symbol, unsigned grid, unsigned block, unsigned shared, void **parameters)
{
    (void)image, (void)grid, (void)block, (void)shared, (void)parameters;
    ++launches;
    if (strlen(symbols) + strlen(symbol) + 2 < sizeof symbols) {
        strcat(symbols, symbol);
        strcat(symbols, " ");
    }
    return 0;
}

static int fail(const void *image, const char *symbol, unsigned grid, unsigned block, unsigned shared, void **parameters)
{
    (void)image, (void)symbol, (void)grid, (void)block, (void)shared, (void)parameters;
    return 719;
}

static void expect(int holds, const char *what, const char *of)
{
    if (!holds) {
        printf("FAILED: %s (%s); launched: %s\n", what, of, symbols);
        ++failures;
    }
}

static char memory[1 << 16] __attribute__((aligned(256)));

/* Calls the function that a kernel's name belongs to, with arguments that lead to it; the status. */
static gim_status ask_for(const char *name)
{
    char part[8][32] = {{0}};
    const char *key = strchr(name, ' ') + 1;
    sscanf(
        key, "%31[^/]/%31[^/]/%31[^/]/%31[^/]/%31[^/]/%31[^/]", part[0], part[1], part[2], part[3], part[4], part[5]);
    gim_dtype dtype = !strcmp(part[1], "bf16") ? GIM_BF16 : !strcmp(part[1], "fp16") ? GIM_FP16 : GIM_FP32;
    launches = 0;
    symbols[0] = 0;
    if (!strncmp(key, "attention", 9)) {
        gim_attention a;
        memset(&a, 0, sizeof a);
        a.dtype = dtype;
        a.batch = 1;
        a.query_heads = 2;
        a.key_heads = 1;
        a.queries = a.keys = 4;
        a.head_size = atoi(part[2]);
        a.query = a.key = a.value = memory;
        a.out = memory;
        a.lse = (float *)memory;
        a.query_stride[1] = a.query_stride[2] = a.key_stride[2] = a.value_stride[2] = a.out_stride[1] =
            a.out_stride[2] = a.head_size;
        a.scale = 1;
        a.causal = !strcmp(part[3], "causal");
        a.window = strcmp(part[4], "plain") ? 2 : 0;
        a.softcap = strcmp(part[4], "softcap") ? 0 : 30;
        if (!strcmp(part[0], "attention_forward"))
            return gim_attention_forward(&a, memory, sizeof memory, NULL);
        gim_attention_gradients g;
        memset(&g, 0, sizeof g);
        g.grad_out = g.grad_value = memory;
        memcpy(g.grad_out_stride, a.query_stride, sizeof g.grad_out_stride);
        memcpy(g.grad_query_stride, a.query_stride, sizeof g.grad_out_stride);
        memcpy(g.grad_key_stride, a.key_stride, sizeof g.grad_out_stride);
        memcpy(g.grad_value_stride, a.key_stride, sizeof g.grad_out_stride);
        g.softmax_backward = GIM_SOFTMAX_CONSTANT;
        if (strcmp(part[0], "attention_grad_value")) {
            g.softmax_backward = GIM_SOFTMAX_TEMPERATURE;
            g.grad_query = g.grad_key = memory;
            g.temperature = !strcmp(part[5], "exact")    ? 1.0f
                            : !strcmp(part[5], "square") ? 2.0f
                            : !strcmp(part[5], "warm")   ? 1.5f
                                                         : 0.5f;
        }
        return gim_attention_backward(&a, &g, memory, sizeof memory, NULL);
    }
    if (!strncmp(key, "gated", 5)) {
        gim_gated p;
        memset(&p, 0, sizeof p);
        p.activation = !strcmp(part[2], "silu") ? GIM_SILU : !strcmp(part[2], "gelu") ? GIM_GELU : GIM_GELU_TANH;
        p.dtype = dtype;
        p.rows = 2;
        p.columns = 32;
        p.gate = p.up = memory;
        p.y = memory;
        p.gate_stride = p.up_stride = 64;
        p.y_stride = 32;
        if (!strcmp(part[0], "gated_forward"))
            return gim_gated_forward(&p, NULL);
        gim_gated_gradients g;
        memset(&g, 0, sizeof g);
        g.grad_y = memory;
        g.grad_gate = g.grad_up = memory;
        g.grad_y_stride = g.grad_gate_stride = g.grad_up_stride = 32;
        g.ratio = !strcmp(part[3], "ratio");
        return gim_gated_backward(&p, &g, NULL);
    }
    gim_norm n;
    memset(&n, 0, sizeof n);
    n.kind = !strncmp(part[2], "layer", 5) ? GIM_NORM_LAYER : GIM_NORM_RMS;
    n.dtype = dtype;
    n.rows = 3;
    n.columns = 64;
    n.x_stride = 64;
    n.x = n.weight = memory;
    n.y = memory;
    n.bias = strcmp(part[2], "layer_bias") ? NULL : memory;
    n.mean = n.inverse = (float *)memory;
    if (!strcmp(part[0], "norm_forward"))
        return gim_norm_forward(&n, NULL);
    gim_norm_gradients g;
    memset(&g, 0, sizeof g);
    g.grad_y = memory;
    g.grad_y_stride = 64;
    g.frozen = !strcmp(part[3], "frozen");
    if (!strcmp(part[0], "norm_backward"))
        g.grad_x = memory;
    else
        g.grad_weight = (float *)memory;
    return gim_norm_backward(&n, &g, memory, sizeof memory, NULL);
}

int main(int count, char **arguments)
{
    void *driver = count > 1 ? dlopen(arguments[1], RTLD_NOW | RTLD_GLOBAL) : NULL;
    void (*set)(launch_function, int, int) = NULL;
    if (driver != NULL)
        *(void **)&set = dlsym(driver, "gim_test_driver");
    if (set == NULL) {
        printf("no driver for the test\n");
        return 1;
    }
    for (size_t i = 0; i < gim_variant_count(); ++i) {
        const char *name = gim_variant_name(i);
        if (strstr(name, " fold") != NULL || strstr(name, "attention_fold") != NULL)
            continue; /* launched with the weight's gradient, and after those of keys and values */
        set(note, atoi(name + 5), 1);
        gim_status status = ask_for(name);
        /* A library of some kernels alone may miss what else the function would launch. */
        if (status == GIM_ERROR_NOT_BUILT && gim_variant_count() < 100)
            continue;
        expect(status == GIM_SUCCESS && launches > 0, name, gim_status_string(status));
        char part[32] = {0};
        sscanf(strchr(name, ' ') + 1, "%31[^/]", part);
        const char *symbol = !strncmp(part, "attention_grad_query", 20) ? "grad_query_kernel"
                             : !strncmp(part, "attention_grad", 14)     ? "grad_key_value_kernel"
                                                                        : part;
        expect(strstr(symbols, symbol) != NULL, name, symbol);
    }
    const char *name = gim_variant_name(0);
    set(note, 70, 1);
    expect(ask_for(name) == GIM_ERROR_UNSUPPORTED_DEVICE, "an old GPU", name);
    set(note, atoi(name + 5), 0);
    expect(ask_for(name) == GIM_ERROR_NO_CONTEXT, "no context", name);
    set(fail, atoi(name + 5), 1);
    gim_status status = ask_for(name);
    expect(status == GIM_ERROR_DRIVER || status == GIM_ERROR_NOT_BUILT, "a failing launch", name);
    expect(status != GIM_ERROR_DRIVER || gim_driver_error() == 719, "the driver's error", name);
    return failures != 0;
}
