/* Compiled as C99 and as C++11: the header stands alone, every function links, and bad input is refused without a GPU. */
#include "gim_kernels.h"

#include <stdio.h>
#include <string.h>

static int failures;

static void expect(int holds, const char *what)
{
    if (!holds) {
        printf("FAILED: %s\n", what);
        ++failures;
    }
}

static float memory[16] __attribute__((aligned(16)));

static gim_attention an_attention(void)
{
    gim_attention a;
    memset(&a, 0, sizeof a);
    a.dtype = GIM_BF16;
    a.batch = a.query_heads = a.key_heads = a.queries = a.keys = 1;
    a.head_size = 64;
    a.query = a.key = a.value = a.out = memory;
    a.lse = memory;
    a.scale = 1;
    return a;
}

static void attention_is_checked(void)
{
    gim_attention a = an_attention();
    expect(gim_attention_forward_workspace(&a) == 512, "workspace of one head and one row");
    expect(gim_attention_forward(&a, NULL, 0, NULL) == GIM_ERROR_WORKSPACE, "no workspace");
    expect(gim_attention_forward(NULL, NULL, 0, NULL) == GIM_ERROR_INVALID_ARGUMENT, "no arguments");
#define REFUSED(change, status) \
    a = an_attention(); \
    a.change; \
    expect(gim_attention_forward(&a, NULL, 0, NULL) == status, #change)
    REFUSED(dtype = (gim_dtype)0, GIM_ERROR_INVALID_ARGUMENT);
    REFUSED(batch = -1, GIM_ERROR_INVALID_ARGUMENT);
    REFUSED(key_heads = 0, GIM_ERROR_INVALID_ARGUMENT);
    REFUSED(key_heads = 2, GIM_ERROR_INVALID_ARGUMENT);
    REFUSED(head_size = 272, GIM_ERROR_INVALID_ARGUMENT);
    REFUSED(scale = 0, GIM_ERROR_INVALID_ARGUMENT);
    REFUSED(softcap = -1, GIM_ERROR_INVALID_ARGUMENT);
    REFUSED(window = -1, GIM_ERROR_INVALID_ARGUMENT);
    REFUSED(keys = 1 << 30, GIM_ERROR_INVALID_ARGUMENT);
    REFUSED(value = NULL, GIM_ERROR_INVALID_ARGUMENT);
    REFUSED(head_size = 72, GIM_ERROR_ALIGNMENT);
    REFUSED(query = memory + 1, GIM_ERROR_ALIGNMENT);
    a = an_attention();
    a.queries = 2;
    a.query_stride[2] = 65;
    expect(gim_attention_forward(&a, NULL, 0, NULL) == GIM_ERROR_ALIGNMENT, "a stride of 65");

    gim_attention_gradients g;
    memset(&g, 0, sizeof g);
    g.grad_out = memory;
    g.grad_query = g.grad_key = g.grad_value = memory;
    a = an_attention();
    expect(
        gim_attention_backward(&a, &g, NULL, 0, NULL) == GIM_ERROR_INVALID_ARGUMENT, "no rule for the softmax");
    g.softmax_backward = GIM_SOFTMAX_TEMPERATURE;
    expect(gim_attention_backward(&a, &g, NULL, 0, NULL) == GIM_ERROR_INVALID_ARGUMENT, "temperature 0");
    g.temperature = 2;
    expect(gim_attention_backward_workspace(&a, &g) == 5 * 256, "workspace of one query");
    expect(gim_attention_backward(&a, &g, NULL, 0, NULL) == GIM_ERROR_WORKSPACE, "no workspace");
    g.softmax_backward = GIM_SOFTMAX_CONSTANT;
    expect(
        gim_attention_backward(&a, &g, NULL, 0, NULL) == GIM_ERROR_INVALID_ARGUMENT,
        "constant softmax with a gradient of the query");
    expect(gim_attention_backward(&a, NULL, NULL, 0, NULL) == GIM_ERROR_INVALID_ARGUMENT, "no gradients");
    expect(gim_attention_backward_workspace(NULL, NULL) == 0, "workspace of nothing");
}

static void norms_are_checked(void)
{
    gim_norm n;
    memset(&n, 0, sizeof n);
    expect(gim_norm_forward(NULL, NULL) == GIM_ERROR_INVALID_ARGUMENT, "no norm");
    expect(gim_norm_forward(&n, NULL) == GIM_ERROR_INVALID_ARGUMENT, "an empty norm");
    n.kind = GIM_NORM_RMS;
    n.dtype = GIM_BF16;
    n.rows = 1;
    n.columns = 64;
    n.x = n.weight = n.y = memory;
    n.inverse = memory;
    n.bias = memory;
    expect(gim_norm_forward(&n, NULL) == GIM_ERROR_INVALID_ARGUMENT, "an RMS norm with a bias");
    n.bias = NULL;
    n.columns = 63;
    expect(gim_norm_forward(&n, NULL) == GIM_ERROR_ALIGNMENT, "63 columns");
    n.columns = 64;
    n.kind = GIM_NORM_LAYER;
    expect(gim_norm_forward(&n, NULL) == GIM_ERROR_INVALID_ARGUMENT, "a layer norm without a mean");

    gim_norm_gradients g;
    memset(&g, 0, sizeof g);
    g.grad_y = memory;
    g.grad_x = memory;
    expect(gim_norm_backward(&n, NULL, NULL, 0, NULL) == GIM_ERROR_INVALID_ARGUMENT, "no gradients");
    expect(gim_norm_backward(&n, &g, NULL, 0, NULL) == GIM_ERROR_INVALID_ARGUMENT, "a live norm without a mean");
    expect(gim_norm_backward_workspace(&n, &g) == 0, "workspace without weight gradients");
    n.mean = memory;
    g.grad_bias = memory;
    expect(gim_norm_backward(&n, &g, NULL, 0, NULL) == GIM_ERROR_INVALID_ARGUMENT, "grad_bias alone");
    g.grad_weight = memory;
    expect(gim_norm_backward_workspace(&n, &g) == 512, "workspace of one row");
    expect(gim_norm_backward(&n, &g, NULL, 0, NULL) == GIM_ERROR_WORKSPACE, "no workspace");
}

static void gated_products_are_checked(void)
{
    gim_gated p;
    gim_gated_gradients g;
    memset(&p, 0, sizeof p);
    memset(&g, 0, sizeof g);
    expect(gim_gated_forward(NULL, NULL) == GIM_ERROR_INVALID_ARGUMENT, "no product");
    p.activation = GIM_SILU;
    p.dtype = GIM_BF16;
    p.rows = 1;
    p.columns = 64;
    p.gate = p.up = memory;
    expect(gim_gated_forward(&p, NULL) == GIM_ERROR_INVALID_ARGUMENT, "nowhere to write");
    expect(gim_gated_backward(&p, NULL, NULL) == GIM_ERROR_INVALID_ARGUMENT, "no gradients");
    expect(gim_gated_backward(&p, &g, NULL) == GIM_ERROR_INVALID_ARGUMENT, "no grad_y");
    p.y = memory + 1;
    expect(gim_gated_forward(&p, NULL) == GIM_ERROR_ALIGNMENT, "y at 4 bytes");
    p.y = memory;
    gim_status status = gim_gated_forward(&p, NULL);
    expect(
        status == GIM_ERROR_NO_DRIVER || status == GIM_ERROR_NO_CONTEXT,
        "without a driver or a context nothing is launched");
}

int main(void)
{
    attention_is_checked();
    norms_are_checked();
    gated_products_are_checked();
    for (int status = GIM_SUCCESS; status <= GIM_ERROR_DRIVER; ++status)
        expect(strcmp(gim_status_string((gim_status)status), "no status of this library") != 0, "a status without words");
    expect(gim_driver_error() == 0, "a driver error from nowhere");
    expect(strstr(gim_targets(), "cuda:") == gim_targets(), "targets");
    expect(gim_variant_count() == GIM_EXPECTED_VARIANTS, "number of kernels");
    expect(gim_variant_name(0) != NULL && gim_variant_name(gim_variant_count()) == NULL, "names of kernels");
    return failures != 0;
}
