/* On a GPU: every operator against formulas written out in double precision. Without one it ends with 77: skipped. */

#include <cuda.h>
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gim_kernels.h"

#define STRING(name) STRING_(name)
#define STRING_(name) #name
/* cuda.h renames some functions to their second version: the expanded name is the one to look for. */
#define DECLARE(name) static __typeof__(name) *p_##name;
DECLARE(cuInit)
DECLARE(cuDeviceGet)
DECLARE(cuDevicePrimaryCtxRetain)
DECLARE(cuCtxSetCurrent)
static __typeof__(cuMemAlloc) *p_alloc;
static __typeof__(cuMemFree) *p_free;
static __typeof__(cuMemcpyHtoD) *p_to_device;
static __typeof__(cuMemcpyDtoH) *p_to_host;
static __typeof__(cuMemsetD8) *p_fill;
DECLARE(cuCtxSynchronize)

static int failures;

static void *find(void *library, const char *name)
{
    void *found = dlsym(library, name);
    if (found == NULL) {
        printf("the driver has no %s\n", name);
        exit(77);
    }
    return found;
}

static void start(void)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (library == NULL) {
        printf("no CUDA driver\n");
        exit(77);
    }
    *(void **)&p_cuInit = find(library, STRING(cuInit));
    *(void **)&p_cuDeviceGet = find(library, STRING(cuDeviceGet));
    *(void **)&p_cuDevicePrimaryCtxRetain = find(library, STRING(cuDevicePrimaryCtxRetain));
    *(void **)&p_cuCtxSetCurrent = find(library, STRING(cuCtxSetCurrent));
    *(void **)&p_cuCtxSynchronize = find(library, STRING(cuCtxSynchronize));
    *(void **)&p_alloc = find(library, STRING(cuMemAlloc));
    *(void **)&p_free = find(library, STRING(cuMemFree));
    *(void **)&p_to_device = find(library, STRING(cuMemcpyHtoD));
    *(void **)&p_to_host = find(library, STRING(cuMemcpyDtoH));
    *(void **)&p_fill = find(library, STRING(cuMemsetD8));
    CUdevice device;
    CUcontext context;
    if (p_cuInit(0) || p_cuDeviceGet(&device, 0) || p_cuDevicePrimaryCtxRetain(&context, device) ||
        p_cuCtxSetCurrent(context)) {
        printf("no CUDA GPU\n");
        exit(77);
    }
}

/* ---- Numbers of each type ------------------------------------------------------------------------------------------*/

static double rounded(double x, gim_dtype dtype)
{
    if (dtype == GIM_FP32)
        return (double)(float)x;
    if (x == 0)
        return x;
    int exponent;
    frexp(x, &exponent);
    int bits = dtype == GIM_BF16 ? 8 : 11;
    if (dtype == GIM_FP16 && exponent < -13)
        exponent = -13; /* subnormal */
    double unit = ldexp(1, exponent - bits);
    return nearbyint(x / unit) * unit;
}

static uint32_t bits_of(double x, gim_dtype dtype)
{
    float narrow = (float)x;
    uint32_t bits;
    memcpy(&bits, &narrow, 4);
    if (dtype == GIM_FP32)
        return bits;
    if (dtype == GIM_BF16)
        return bits >> 16;
    uint32_t sign = bits >> 16 & 0x8000;
    int exponent;
    double fraction = frexp(fabs(x), &exponent);
    if (x == 0)
        return sign;
    if (exponent < -13)
        return sign | (uint32_t)ldexp(fabs(x), 24);
    return sign | (uint32_t)(exponent + 14) << 10 | ((uint32_t)ldexp(fraction, 11) & 0x3ff);
}

static double value_of(const unsigned char *at, gim_dtype dtype)
{
    uint32_t bits = 0;
    float wide;
    memcpy(&bits, at, dtype == GIM_FP32 ? 4 : 2);
    if (dtype == GIM_FP16) {
        int exponent = bits >> 10 & 31;
        double fraction = bits & 0x3ff;
        if (exponent == 31)
            return fraction ? NAN : INFINITY;
        double size = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
        return bits & 0x8000 ? -size : size;
    }
    if (dtype == GIM_BF16)
        bits <<= 16;
    memcpy(&wide, &bits, 4);
    return wide;
}

static size_t width(gim_dtype dtype)
{
    return dtype == GIM_FP32 ? 4 : 2;
}

/* A tensor: its numbers here, and memory on the GPU. */
typedef struct tensor {
    gim_dtype dtype;
    size_t size;
    double *at;
    CUdeviceptr there;
} tensor;

static uint64_t state = 1;

static double normal(void)
{
    double sum = -6;
    for (int i = 0; i < 12; ++i) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        sum += (double)(state >> 40) / (1 << 24);
    }
    return sum;
}

static void check(CUresult result)
{
    if (result != CUDA_SUCCESS) {
        printf("the driver reported %d\n", (int)result);
        exit(1);
    }
}

/* Of NaN on the GPU, so that what is not written shows. */
static tensor empty(size_t size, gim_dtype dtype)
{
    tensor t = {dtype, size, calloc(size, sizeof(double)), 0};
    check(p_alloc(&t.there, size * width(dtype) + 256));
    check(p_fill(t.there, 0xff, size * width(dtype)));
    return t;
}

static tensor random_tensor(size_t size, gim_dtype dtype, double mean)
{
    tensor t = empty(size, dtype);
    unsigned char *raw = calloc(size, width(dtype));
    for (size_t i = 0; i < size; ++i) {
        t.at[i] = rounded(normal() + mean, dtype);
        uint32_t bits = bits_of(t.at[i], dtype);
        memcpy(raw + i * width(dtype), &bits, width(dtype));
    }
    check(p_to_device(t.there, raw, size * width(dtype)));
    free(raw);
    return t;
}

static void drop(tensor *t)
{
    free(t->at);
    check(p_free(t->there));
}

static void *pointer(tensor t)
{
    return (void *)t.there;
}

/* The GPU's numbers against those here: the norm of the difference. */
static void compare(tensor t, double tolerance, const char *what, const char *which)
{
    unsigned char *raw = malloc(t.size * width(t.dtype));
    check(p_cuCtxSynchronize());
    check(p_to_host(raw, t.there, t.size * width(t.dtype)));
    double difference = 0, norm = 0;
    for (size_t i = 0; i < t.size; ++i) {
        double apart = value_of(raw + i * width(t.dtype), t.dtype) - t.at[i];
        difference += apart * apart;
        norm += t.at[i] * t.at[i];
    }
    free(raw);
    double error = sqrt(difference) / (norm > 0 ? sqrt(norm) : 1);
    if (!(error <= tolerance)) {
        printf("FAILED: %s of %s: relative error %g > %g\n", what, which, error, tolerance);
        ++failures;
    }
}

static double tolerance(gim_dtype dtype)
{
    return dtype == GIM_FP32 ? 2e-5 : dtype == GIM_FP16 ? 4e-3 : 3e-2;
}

/* Whether a call did its work; what is not built is passed over. */
static int worked(gim_status status, const char *which)
{
    if (status == GIM_SUCCESS)
        return 1;
    if (status != GIM_ERROR_NOT_BUILT) {
        printf("FAILED: %s: %s (driver: %d)\n", which, gim_status_string(status), gim_driver_error());
        ++failures;
    }
    return 0;
}

/* ---- Attention -----------------------------------------------------------------------------------------------------*/

enum { BATCH = 2, HEADS = 6, KEY_HEADS = 2, MOST_KEYS = 90 };

typedef struct options {
    int causal, window, ranged, sunk;
    double softcap;
    gim_softmax_backward rule;
    double temperature;
    int queries, keys;
} options;

static void attention(gim_dtype dtype, int size, options o)
{
    const int queries = o.queries, key_count = o.keys;
    char which[160];
    snprintf(
        which, sizeof which,
        "attention dtype %d size %d %dx%d causal %d window %d range %d sinks %d softcap %g rule %d T %g", (int)dtype,
        size, queries, key_count, o.causal, o.window, o.ranged, o.sunk, o.softcap, (int)o.rule, o.temperature);
    size_t rows = (size_t)BATCH * HEADS * queries, columns = (size_t)BATCH * KEY_HEADS * key_count;
    tensor q = random_tensor(rows * size, dtype, 0), k = random_tensor(columns * size, dtype, 0);
    tensor v = random_tensor(columns * size, dtype, 0.5), grad_out = random_tensor(rows * size, dtype, 0);
    tensor out = empty(rows * size, dtype), lse = empty(rows, GIM_FP32);
    tensor grad_q = empty(rows * size, dtype), grad_k = empty(columns * size, dtype);
    tensor grad_v = empty(columns * size, dtype), sinks = random_tensor(HEADS, GIM_FP32, 0);
    const int32_t range[BATCH][2] = {{0, key_count - 7}, {20, key_count}};
    CUdeviceptr range_there, workspace;
    check(p_alloc(&range_there, sizeof range));
    check(p_to_device(range_there, range, sizeof range));

    gim_attention a;
    gim_attention_gradients g;
    memset(&a, 0, sizeof a);
    memset(&g, 0, sizeof g);
    a.dtype = dtype;
    a.batch = BATCH, a.query_heads = HEADS, a.key_heads = KEY_HEADS, a.queries = queries, a.keys = key_count;
    a.head_size = size;
    a.query = pointer(q), a.key = pointer(k), a.value = pointer(v), a.out = pointer(out);
    a.lse = pointer(lse);
    /* [batch, token, head, size]: what projections give. */
    const int64_t by_query[3] = {(int64_t)queries * HEADS * size, size, (int64_t)HEADS * size};
    const int64_t by_key[3] = {(int64_t)key_count * KEY_HEADS * size, size, (int64_t)KEY_HEADS * size};
    memcpy(a.query_stride, by_query, sizeof by_query);
    memcpy(a.out_stride, by_query, sizeof by_query);
    memcpy(a.key_stride, by_key, sizeof by_key);
    memcpy(a.value_stride, by_key, sizeof by_key);
    a.scale = 1 / sqrtf((float)size);
    a.softcap = (float)o.softcap;
    a.causal = o.causal;
    a.window = o.window;
    a.sinks = o.sunk ? pointer(sinks) : NULL;
    a.key_range = o.ranged ? (void *)range_there : NULL;
    g.grad_out = pointer(grad_out);
    memcpy(g.grad_out_stride, by_query, sizeof by_query);
    memcpy(g.grad_query_stride, by_query, sizeof by_query);
    memcpy(g.grad_key_stride, by_key, sizeof by_key);
    memcpy(g.grad_value_stride, by_key, sizeof by_key);
    g.softmax_backward = o.rule;
    g.temperature = (float)o.temperature;
    g.query_factor = 0.25f, g.key_factor = 0.25f, g.value_factor = 0.5f;
    g.grad_value = pointer(grad_v);
    if (o.rule != GIM_SOFTMAX_CONSTANT)
        g.grad_query = pointer(grad_q), g.grad_key = pointer(grad_k);

    size_t bytes = gim_attention_backward_workspace(&a, &g);
    check(p_alloc(&workspace, bytes + 256));
    void *aligned = (void *)((workspace + 255) / 256 * 256);
    if (worked(gim_attention_forward(&a, aligned, bytes, NULL), which) &&
        worked(gim_attention_backward(&a, &g, aligned, bytes, NULL), which)) {
        static double score[MOST_KEYS], p[MOST_KEYS], soft[MOST_KEYS], grad_p[MOST_KEYS];
        double temperature = o.rule == GIM_SOFTMAX_TEMPERATURE ? o.temperature : 1;
        for (int b = 0; b < BATCH; ++b)
            for (int h = 0; h < HEADS; ++h)
                for (int i = 0; i < queries; ++i) {
                    size_t row = b * by_query[0] + h * by_query[1] + i * by_query[2];
                    size_t keys = b * by_key[0] + h / (HEADS / KEY_HEADS) * by_key[1];
                    int position = i + key_count - queries;
                    double sink = o.sunk ? sinks.at[h] : -INFINITY, top = sink;
                    for (int j = 0; j < key_count; ++j) {
                        int hidden = (o.causal && j > position) || (o.window && j <= position - o.window) ||
                                     (o.ranged && (j < range[b][0] || j >= range[b][1]));
                        score[j] = 0;
                        for (int d = 0; d < size; ++d)
                            score[j] += a.scale * q.at[row + d] * k.at[keys + j * by_key[2] + d];
                        if (o.softcap > 0)
                            score[j] = o.softcap * tanh(score[j] / o.softcap);
                        if (hidden)
                            score[j] = -INFINITY;
                        top = fmax(top, score[j]);
                    }
                    double total = 0, soft_total = 0, delta = 0;
                    if (top > -INFINITY) {
                        total = exp(sink - top), soft_total = exp((sink - top) / temperature);
                        for (int j = 0; j < key_count; ++j) {
                            total += p[j] = exp(score[j] - top);
                            soft_total += soft[j] = exp((score[j] - top) / temperature);
                        }
                    }
                    lse.at[((size_t)b * HEADS + h) * queries + i] = top + log(total);
                    for (int j = 0; j < key_count; ++j) {
                        p[j] = total > 0 ? p[j] / total : 0;
                        soft[j] = total > 0 ? soft[j] / soft_total : 0;
                        grad_p[j] = 0;
                        size_t key = keys + j * by_key[2];
                        for (int d = 0; d < size; ++d) {
                            out.at[row + d] += p[j] * v.at[key + d];
                            grad_v.at[key + d] += 0.5 * p[j] * grad_out.at[row + d];
                            grad_p[j] += grad_out.at[row + d] * v.at[key + d];
                        }
                        delta += soft[j] * grad_p[j];
                    }
                    for (int j = 0; j < key_count; ++j) {
                        double grad_s = a.scale * 0.25 * soft[j] * (grad_p[j] - delta);
                        if (o.softcap > 0 && score[j] > -INFINITY)
                            grad_s *= 1 - score[j] / o.softcap * (score[j] / o.softcap);
                        size_t key = keys + j * by_key[2];
                        for (int d = 0; d < size; ++d) {
                            grad_q.at[row + d] += grad_s * k.at[key + d];
                            grad_k.at[key + d] += grad_s * q.at[row + d];
                        }
                    }
                }
        compare(out, tolerance(dtype), "out", which);
        compare(lse, tolerance(GIM_FP16), "lse", which);
        compare(grad_v, tolerance(dtype), "grad_value", which);
        if (o.rule != GIM_SOFTMAX_CONSTANT) {
            compare(grad_q, tolerance(dtype), "grad_query", which);
            compare(grad_k, tolerance(dtype), "grad_key", which);
        }
    }
    check(p_cuCtxSynchronize());
    check(p_free(range_there));
    check(p_free(workspace));
    tensor *all[] = {&q, &k, &v, &grad_out, &out, &lse, &grad_q, &grad_k, &grad_v, &sinks};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; ++i)
        drop(all[i]);
}

/* ---- Norms ---------------------------------------------------------------------------------------------------------*/

static void norm(gim_dtype dtype, gim_norm_kind kind, int frozen, int rows, int columns)
{
    char which[120];
    snprintf(
        which, sizeof which, "norm kind %d dtype %d frozen %d %dx%d", (int)kind, (int)dtype, frozen, rows, columns);
    int centred = kind == GIM_NORM_LAYER;
    size_t size = (size_t)rows * columns;
    tensor x = random_tensor(size, dtype, 1), weight = random_tensor(columns, dtype, 0);
    tensor bias = random_tensor(columns, dtype, 0), grad_y = random_tensor(size, dtype, 0);
    tensor y = empty(size, dtype), grad_x = empty(size, dtype), grad_weight = empty(columns, GIM_FP32);
    tensor grad_bias = empty(columns, GIM_FP32), mean = empty(rows, GIM_FP32), inverse = empty(rows, GIM_FP32);
    gim_norm n;
    gim_norm_gradients g;
    memset(&n, 0, sizeof n);
    memset(&g, 0, sizeof g);
    n.kind = kind, n.dtype = dtype, n.rows = rows, n.columns = columns, n.x_stride = columns;
    n.x = pointer(x), n.weight = pointer(weight), n.bias = centred ? pointer(bias) : NULL;
    n.eps = 1e-5f, n.weight_offset = centred ? 0 : 1;
    n.y = pointer(y), n.mean = pointer(mean), n.inverse = pointer(inverse);
    g.grad_y = pointer(grad_y), g.grad_y_stride = columns, g.frozen = frozen, g.grad_x = pointer(grad_x);
    g.grad_weight = pointer(grad_weight), g.grad_bias = centred ? pointer(grad_bias) : NULL;
    CUdeviceptr workspace;
    size_t bytes = gim_norm_backward_workspace(&n, &g);
    check(p_alloc(&workspace, bytes + 256));
    if (worked(gim_norm_forward(&n, NULL), which) &&
        worked(gim_norm_backward(&n, &g, (void *)((workspace + 255) / 256 * 256), bytes, NULL), which)) {
        for (int r = 0; r < rows; ++r) {
            const double *in = x.at + (size_t)r * columns, *dy = grad_y.at + (size_t)r * columns;
            double m = 0, square = 0, g_mean = 0, product = 0;
            for (int c = 0; c < columns && centred; ++c)
                m += in[c] / columns;
            for (int c = 0; c < columns; ++c)
                square += (in[c] - m) * (in[c] - m) / columns;
            double s = 1 / sqrt(square + n.eps);
            for (int c = 0; c < columns; ++c) {
                double scaled = dy[c] * (weight.at[c] + n.weight_offset), unit = (in[c] - m) * s;
                g_mean += centred ? scaled / columns : 0;
                product += frozen ? 0 : scaled * unit / columns;
                y.at[(size_t)r * columns + c] = unit * (weight.at[c] + n.weight_offset) + (centred ? bias.at[c] : 0);
                grad_weight.at[c] += dy[c] * unit;
                grad_bias.at[c] += dy[c];
            }
            for (int c = 0; c < columns; ++c)
                grad_x.at[(size_t)r * columns + c] =
                    s * (dy[c] * (weight.at[c] + n.weight_offset) - g_mean - (in[c] - m) * s * product);
        }
        compare(y, tolerance(dtype), "y", which);
        compare(grad_x, tolerance(dtype), "grad_x", which);
        compare(grad_weight, tolerance(GIM_FP32), "grad_weight", which);
        if (centred)
            compare(grad_bias, tolerance(GIM_FP32), "grad_bias", which);
    }
    check(p_cuCtxSynchronize());
    check(p_free(workspace));
    tensor *all[] = {&x, &weight, &bias, &grad_y, &y, &grad_x, &grad_weight, &grad_bias, &mean, &inverse};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; ++i)
        drop(all[i]);
}

/* ---- Gated product -------------------------------------------------------------------------------------------------*/

static double ratio_of(double x, gim_activation activation)
{
    if (activation == GIM_SILU)
        return 1 / (1 + exp(-x));
    if (activation == GIM_GELU)
        return 0.5 * (1 + erf(x / sqrt(2)));
    return 0.5 * (1 + tanh(sqrt(2 / acos(-1)) * (x + 0.044715 * x * x * x)));
}

static void gated(gim_dtype dtype, gim_activation activation, int ratio)
{
    enum { ROWS = 37, COLUMNS = 2064 };
    char which[80];
    snprintf(which, sizeof which, "gated dtype %d activation %d ratio %d", (int)dtype, (int)activation, ratio);
    size_t size = (size_t)ROWS * COLUMNS;
    tensor both = random_tensor(2 * size, dtype, 0), grad_y = random_tensor(size, dtype, 0);
    tensor y = empty(size, dtype), grad_gate = empty(size, dtype), grad_up = empty(size, dtype);
    gim_gated p;
    gim_gated_gradients g;
    memset(&p, 0, sizeof p);
    memset(&g, 0, sizeof g);
    p.activation = activation, p.dtype = dtype, p.rows = ROWS, p.columns = COLUMNS;
    p.gate = pointer(both), p.up = (char *)pointer(both) + COLUMNS * width(dtype);
    p.gate_stride = p.up_stride = 2 * COLUMNS, p.y = pointer(y), p.y_stride = COLUMNS;
    g.grad_y = pointer(grad_y), g.ratio = ratio, g.gate_factor = 0.5f, g.up_factor = 0.25f;
    g.grad_gate = pointer(grad_gate), g.grad_up = pointer(grad_up);
    g.grad_y_stride = g.grad_gate_stride = g.grad_up_stride = COLUMNS;
    if (worked(gim_gated_forward(&p, NULL), which) && worked(gim_gated_backward(&p, &g, NULL), which)) {
        for (size_t i = 0; i < size; ++i) {
            size_t at = i / COLUMNS * 2 * COLUMNS + i % COLUMNS;
            double x = both.at[at], up = both.at[at + COLUMNS], step = 1e-5;
            double act = x * ratio_of(x, activation);
            double slope = ((x + step) * ratio_of(x + step, activation) - (x - step) * ratio_of(x - step, activation)) /
                           (2 * step);
            y.at[i] = rounded(act, dtype) * up;
            grad_gate.at[i] = 0.5 * grad_y.at[i] * up * (ratio ? ratio_of(x, activation) : slope);
            grad_up.at[i] = 0.25 * grad_y.at[i] * act;
        }
        compare(y, tolerance(dtype), "y", which);
        compare(grad_gate, tolerance(dtype), "grad_gate", which);
        compare(grad_up, tolerance(dtype), "grad_up", which);
    }
    check(p_cuCtxSynchronize());
    tensor *all[] = {&both, &grad_y, &y, &grad_gate, &grad_up};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; ++i)
        drop(all[i]);
}

static int built(const char *text)
{
    for (size_t i = 0; i < gim_variant_count(); ++i)
        if (strstr(gim_variant_name(i), text) != NULL)
            return 1;
    return 0;
}

int main(void)
{
    start();
    static const char *names[] = {NULL, "bf16", "fp16", "fp32"};
    for (int dtype = GIM_BF16; dtype <= GIM_FP32; ++dtype) {
        for (int size = 16; size <= 256; size += 16) {
            char key[64];
            snprintf(key, sizeof key, "attention_forward/%s/%d/", names[dtype], size);
            if (!built(key))
                continue;
            for (int mask = 0; mask < 4; ++mask)
                for (int causal = 0; causal < 2; ++causal)
                    for (int rule = 0; rule < 5; ++rule) {
                        static const double temperatures[] = {1, 1, 2, 1.5, 0.5};
                        static const gim_softmax_backward rules[] = {
                            GIM_SOFTMAX_CONSTANT, GIM_SOFTMAX_EXACT, GIM_SOFTMAX_TEMPERATURE, GIM_SOFTMAX_TEMPERATURE,
                            GIM_SOFTMAX_TEMPERATURE};
                        options o = {
                            causal, mask == 1 || mask == 3 ? 33 : 0, mask == 2 || mask == 3, mask == 2,
                            mask == 3 ? 2.0 : 0, rules[rule], temperatures[rule], 70, 90};
                        attention((gim_dtype)dtype, size, o);
                    }
            /* So few programs over keys, and so long, that they share the heads of a group. */
            options few = {0, 0, 0, 0, 0, GIM_SOFTMAX_TEMPERATURE, 2, 400, 40};
            attention((gim_dtype)dtype, size, few);
            few.rule = GIM_SOFTMAX_CONSTANT;
            attention((gim_dtype)dtype, size, few);
        }
        for (int kind = GIM_NORM_RMS; kind <= GIM_NORM_LAYER; ++kind)
            for (int frozen = 0; frozen < 2; ++frozen)
                for (int columns = 64; columns <= 20000; columns = columns * 5 / 16 * 16 + 16)
                    norm((gim_dtype)dtype, (gim_norm_kind)kind, frozen, 35, columns);
        for (int activation = GIM_SILU; activation <= GIM_GELU_TANH; ++activation)
            for (int ratio = 0; ratio < 2; ++ratio)
                gated((gim_dtype)dtype, (gim_activation)activation, ratio);
    }
    printf("%d failures\n", failures);
    return failures != 0;
}
