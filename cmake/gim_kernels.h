/* gim_kernels: attention, norms and gated products whose backward follows GIM's rules, for programs without Python.
 *
 * Every function queues work on a CUDA stream of the calling thread's current context and returns at once. The library
 * holds compiled code for the GPUs it was built for and finds the CUDA driver when a function is first called: it links
 * and loads on a machine without one.
 *
 * Conventions
 *   - Plain C structs. Clear them with memset or = {0} before filling them in: 0 and NULL mean "absent" throughout.
 *   - Sizes and strides count elements, never bytes. The last dimension of every tensor has stride 1.
 *   - Pointers are device addresses. Those to tensors are multiples of 16 bytes, and head sizes, columns and the strides
 *     of dimensions of more than one element are multiples of 16 elements, or GIM_ERROR_ALIGNMENT is returned.
 *   - Accumulation is float32 (IEEE products, no tf32). Results are rounded once to the tensors' type; deterministic,
 *     bit for bit. No input is written to.
 *   - Functions may be called from several threads. Code is loaded when a kernel is first used: use it once before
 *     capturing it in a CUDA graph.
 */
#ifndef GIM_KERNELS_H
#define GIM_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define GIM_API __attribute__((visibility("default")))
#else
#define GIM_API
#endif

/* CUstream of cuda.h and cudaStream_t of the runtime are this type. NULL is the default stream. */
typedef struct CUstream_st *gim_stream;

typedef enum gim_status {
    GIM_SUCCESS = 0,
    /* An argument is missing, out of range, or contradicts another. Nothing was launched. */
    GIM_ERROR_INVALID_ARGUMENT = 1,
    /* A pointer is no multiple of 16 bytes, or a size or stride no multiple of 16 elements. */
    GIM_ERROR_ALIGNMENT = 2,
    /* The library was built without this type, head size or combination of options. */
    GIM_ERROR_NOT_BUILT = 3,
    /* The library was not built for the current GPU, or it has too little shared memory for this kernel. */
    GIM_ERROR_UNSUPPORTED_DEVICE = 4,
    /* There is no CUDA driver (libcuda.so.1), or one older than CUDA 12.0. */
    GIM_ERROR_NO_DRIVER = 5,
    /* The calling thread has no current CUDA context: call cudaSetDevice or cuCtxSetCurrent first. */
    GIM_ERROR_NO_CONTEXT = 6,
    /* The workspace is smaller than the function's _workspace twin says, or its address no multiple of 256. */
    GIM_ERROR_WORKSPACE = 7,
    /* The driver reported an error; gim_driver_error() tells which. */
    GIM_ERROR_DRIVER = 8
} gim_status;

/* An English sentence for a status; never NULL. */
GIM_API const char *gim_status_string(gim_status status);
/* The CUresult behind the calling thread's last GIM_ERROR_DRIVER; 0 before any. */
GIM_API int gim_driver_error(void);

typedef enum gim_dtype { GIM_BF16 = 1, GIM_FP16 = 2, GIM_FP32 = 3 } gim_dtype;

/* ---- Attention -----------------------------------------------------------------------------------------------------
 *
 *     S = scale * Q K^T      S' = softcap * tanh(S / softcap), or S      P = softmax(S')      O = P V
 *     lse_i = log sum_j exp S'_ij
 *
 * Queries [batch, query_heads, queries, head_size], keys and values [batch, key_heads, keys, head_size]; query head h reads
 * key head h / (query_heads / key_heads). Strides are those of batch, head and token. Query i stands at key position
 * i + keys - queries (bottom-right). A query that sees no key has output 0 and lse +inf.
 */
typedef struct gim_attention {
    gim_dtype dtype;
    int32_t batch, query_heads, key_heads, queries, keys, head_size;
    const void *query, *key, *value;
    int64_t query_stride[3], key_stride[3], value_stride[3];
    /* Written by the forward, read by the backward; lse is [batch, query_heads, queries], contiguous. */
    void *out;
    int64_t out_stride[3];
    float *lse;
    /* > 0. */
    float scale;
    /* Bound of the scores, > 0; 0 for none. Built for causal attention. */
    float softcap;
    /* Not 0: a query sees no key after its own position. */
    int32_t causal;
    /* > 0: a query at position p sees keys after p - window only; 0 for all. */
    int32_t window;
    /* [query_heads], a score for each head that takes probability and has no value; NULL for none. */
    const float *sinks;
    /* [batch, 2], the first and one past the last key that exist in each row; NULL for all. */
    const int32_t *key_range;
} gim_attention;

/* The gradient of the scores, with dP = dO V^T and P_T = softmax(S' / T). */
typedef enum gim_softmax_backward {
    /* dS' = P * (dP - rowsum(P * dP)): the ordinary gradient. */
    GIM_SOFTMAX_EXACT = 1,
    /* dS' = P_T * (dP - rowsum(P_T * dP)), without a factor 1 / T; the value path keeps P. */
    GIM_SOFTMAX_TEMPERATURE = 2,
    /* dS' = 0: only the value has a gradient. */
    GIM_SOFTMAX_CONSTANT = 3
} gim_softmax_backward;

typedef struct gim_attention_gradients {
    const void *grad_out;
    int64_t grad_out_stride[3];
    gim_softmax_backward softmax_backward;
    /* T of GIM_SOFTMAX_TEMPERATURE, > 0; with a softcap 1 or 2. */
    float temperature;
    /* Factors of the gradients of query, key and value; 1 for the ordinary ones. */
    float query_factor, key_factor, value_factor;
    /* In the tensors' type. All three are written; with GIM_SOFTMAX_CONSTANT only grad_value, and the others, being 0,
     * must be NULL. Sinks have no gradient here. */
    void *grad_query, *grad_key, *grad_value;
    int64_t grad_query_stride[3], grad_key_stride[3], grad_value_stride[3];
} gim_attention_gradients;

/* Bytes of workspace that gim_attention_forward needs: a few for each head and row of the batch; 0 for invalid arguments. */
GIM_API size_t gim_attention_forward_workspace(const gim_attention *attention);
/* Writes out and lse. */
GIM_API gim_status gim_attention_forward(
    const gim_attention *attention, void *workspace, size_t workspace_bytes, gim_stream stream);

/* Bytes of workspace that gim_attention_backward needs: three numbers for each query and head, a little, and for few keys
 * and heads the sums of programs that share a group of query heads. */
GIM_API size_t gim_attention_backward_workspace(
    const gim_attention *attention, const gim_attention_gradients *gradients);
/* Reads what the forward read and wrote; writes the gradients. */
GIM_API gim_status gim_attention_backward(
    const gim_attention *attention, const gim_attention_gradients *gradients, void *workspace,
    size_t workspace_bytes, gim_stream stream);

/* ---- Norms ---------------------------------------------------------------------------------------------------------
 *
 *     y = n * (weight + weight_offset) + bias      n = (x - mean) * inverse      inverse = 1 / sqrt(mean((x - mean)^2) + eps)
 *
 * over the last dimension of x [rows, columns]. An RMS norm has no mean and no bias.
 */
typedef enum gim_norm_kind { GIM_NORM_RMS = 1, GIM_NORM_LAYER = 2 } gim_norm_kind;

typedef struct gim_norm {
    gim_norm_kind kind;
    gim_dtype dtype;
    int64_t rows;
    int32_t columns;
    /* Rows are x_stride apart. The backward reads x unless the statistic is frozen and no weight gradient is asked for. */
    const void *x;
    int64_t x_stride;
    /* [columns], in x's type; bias may be NULL. */
    const void *weight, *bias;
    float eps;
    /* 1 for models that store weight - 1; 0 with GIM_NORM_LAYER. */
    float weight_offset;
    /* [rows, columns], contiguous; the forward's alone. */
    void *y;
    /* [rows] each: written by the forward, read by the backward. mean is for GIM_NORM_LAYER; a frozen backward that
     * computes no weight gradient does not read it. */
    float *mean, *inverse;
} gim_norm;

/*     grad_x = inverse * (g - rowmean(g) - n * rowmean(g * n))      g = grad_y * (weight + weight_offset)
 *
 * without rowmean(g) for an RMS norm, and without the last term where the statistic is frozen: a constant.
 */
typedef struct gim_norm_gradients {
    const void *grad_y;
    int64_t grad_y_stride;
    /* Not 0: inverse is a constant of the backward. */
    int32_t frozen;
    /* [rows, columns], contiguous; NULL if not wanted. */
    void *grad_x;
    /* [columns], float32: sum(grad_y * n) and sum(grad_y); NULL if not wanted. grad_bias needs grad_weight. */
    float *grad_weight, *grad_bias;
} gim_norm_gradients;

GIM_API gim_status gim_norm_forward(const gim_norm *norm, gim_stream stream);
/* Bytes of workspace that gim_norm_backward needs; 0 without weight gradients. */
GIM_API size_t gim_norm_backward_workspace(const gim_norm *norm, const gim_norm_gradients *gradients);
GIM_API gim_status gim_norm_backward(
    const gim_norm *norm, const gim_norm_gradients *gradients, void *workspace, size_t workspace_bytes,
    gim_stream stream);

/* ---- Gated product -------------------------------------------------------------------------------------------------
 *
 *     y = act(gate) * up, the activation rounded to the tensors' type before the product
 *
 * of [rows, columns]; rows are a stride apart, so that gate and up may be halves of one tensor.
 */
typedef enum gim_activation { GIM_SILU = 1, GIM_GELU = 2, GIM_GELU_TANH = 3 } gim_activation;

typedef struct gim_gated {
    gim_activation activation;
    gim_dtype dtype;
    int64_t rows, columns;
    const void *gate, *up;
    int64_t gate_stride, up_stride;
    /* The forward's alone. */
    void *y;
    int64_t y_stride;
} gim_gated;

/*     grad_gate = gate_factor * grad_y * up * act'(gate)      grad_up = up_factor * grad_y * act(gate) */
typedef struct gim_gated_gradients {
    const void *grad_y;
    int64_t grad_y_stride;
    /* Not 0: act(gate) / gate takes the place of act'(gate). */
    int32_t ratio;
    float gate_factor, up_factor;
    void *grad_gate, *grad_up;
    int64_t grad_gate_stride, grad_up_stride;
} gim_gated_gradients;

GIM_API gim_status gim_gated_forward(const gim_gated *gated, gim_stream stream);
GIM_API gim_status gim_gated_backward(
    const gim_gated *gated, const gim_gated_gradients *gradients, gim_stream stream);

/* ---- What is built in ----------------------------------------------------------------------------------------------*/

/* The GPUs the library launches on, e.g. "cuda:80:32;cuda:90:32". */
GIM_API const char *gim_targets(void);
/* How many kernels it holds, over all of them. */
GIM_API size_t gim_variant_count(void);
/* The target and name of one, e.g. "cuda:90:32 attention_forward/bf16/128/causal/plain", NULL past the last. */
GIM_API const char *gim_variant_name(size_t index);

#ifdef __cplusplus
}
#endif

#endif
