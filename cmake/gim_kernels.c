/* Checks, the choice of a kernel, and its launch through the CUDA driver, which is found when it is first needed. */

#include "gim_kernels.h"

#include <cuda.h>
#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gim_table.h"

static const float LOG2E = 1.4426950408889634f;
/* Positions of queries and keys are int32, and a window is added to them. */
static const int32_t LARGEST_LENGTH = (1 << 30) - 1;
static const size_t WORKSPACE_UNIT = 256;
/* In elements of two bytes: a descriptor's strides are below 2^40 bytes. */
static const int64_t LARGEST_DESCRIBED_STRIDE = (int64_t)1 << 39;

/* ---- The driver ----------------------------------------------------------------------------------------------------*/

#define GIM_DRIVER(X) \
    X(cuCtxGetCurrent) X(cuCtxGetDevice) X(cuDeviceGetAttribute) X(cuLibraryLoadData) X(cuLibraryGetKernel) \
    X(cuKernelSetAttribute) X(cuLaunchKernel) X(cuMemsetD32Async) X(cuMemsetD2D32Async) \
    X(cuTensorMapEncodeTiled)

#define GIM_DECLARE(name) static __typeof__(name) *p_##name;
GIM_DRIVER(GIM_DECLARE)
#undef GIM_DECLARE

static pthread_once_t once = PTHREAD_ONCE_INIT;
static int driver_present;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
/* For each kernel of the table: it, once loaded, and the devices on which its shared memory was raised. */
typedef struct loaded {
    CUkernel kernel;
    uint64_t devices;
} loaded;
static loaded *kernels;
static __thread int driver_error;

static void find_driver(void)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == NULL)
        return;
#define GIM_FIND(name) \
    *(void **)&p_##name = dlsym(library, #name); \
    if (p_##name == NULL) \
        return;
    GIM_DRIVER(GIM_FIND)
#undef GIM_FIND
    kernels = calloc(gim_table_size, sizeof *kernels);
    driver_present = kernels != NULL;
}

static gim_status checked(CUresult result)
{
    if (result == CUDA_SUCCESS)
        return GIM_SUCCESS;
    if (result == CUDA_ERROR_NOT_INITIALIZED || result == CUDA_ERROR_INVALID_CONTEXT)
        return GIM_ERROR_NO_CONTEXT;
    driver_error = (int)result;
    return GIM_ERROR_DRIVER;
}

#define GIM_TRY(call) \
    do { \
        gim_status status_ = (call); \
        if (status_ != GIM_SUCCESS) \
            return status_; \
    } while (0)

/* ---- A launch ------------------------------------------------------------------------------------------------------*/

typedef struct device {
    CUdevice handle;
    /* Of the code that runs on it; its own for most. */
    int architecture;
    int shared;
} device;

static gim_status current_device(device *found)
{
    pthread_once(&once, find_driver);
    if (!driver_present)
        return GIM_ERROR_NO_DRIVER;
    CUcontext context = NULL;
    GIM_TRY(checked(p_cuCtxGetCurrent(&context)));
    if (context == NULL)
        return GIM_ERROR_NO_CONTEXT;
    int major = 0, minor = 0;
    GIM_TRY(checked(p_cuCtxGetDevice(&found->handle)));
    GIM_TRY(checked(p_cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, found->handle)));
    GIM_TRY(checked(p_cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, found->handle)));
    GIM_TRY(checked(p_cuDeviceGetAttribute(
        &found->shared, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, found->handle)));
    /* Code for compute capability 8.x runs on every 8.y with y >= x; that for later GPUs is specific to them. */
    int own = 10 * major + minor;
    found->architecture = 0;
    for (size_t i = 0; i < gim_table_size; ++i) {
        int built = gim_table[i].architecture;
        if (built == own || (major == 8 && built / 10 == 8 && built <= own))
            found->architecture = built; /* ascending: the last is the nearest */
    }
    return found->architecture ? GIM_SUCCESS : GIM_ERROR_UNSUPPORTED_DEVICE;
}

static int before(const gim_variant *variant, int architecture, const char *key, int64_t columns)
{
    if (variant->architecture != architecture)
        return variant->architecture < architecture;
    int order = strcmp(variant->key, key);
    return order != 0 ? order < 0 : variant->limit < columns;
}

/* The kernel of a key that takes so many columns; NULL where there is none. */
static const gim_variant *find(const device *on, const char *key, int64_t columns)
{
    size_t low = 0, high = gim_table_size;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (before(&gim_table[middle], on->architecture, key, columns))
            low = middle + 1;
        else
            high = middle;
    }
    if (low == gim_table_size)
        return NULL;
    const gim_variant *variant = &gim_table[low];
    return variant->architecture == on->architecture && strcmp(variant->key, key) == 0 ? variant : NULL;
}

/* Values of arguments by their names; those a kernel does not have are passed over. */
typedef struct values {
    const void *pointer[GIM_ARGUMENT_COUNT];
    int64_t integer[GIM_ARGUMENT_COUNT];
    float real[GIM_ARGUMENT_COUNT];
    /* Of attention: what descriptors want besides, and whether they can have it. */
    gim_dtype dtype;
    int32_t batch, head_size;
    int describable;
} values;

#define GIM_POINTER(name, value) (given.pointer[GIM_ARGUMENT_##name] = (value))
#define GIM_INTEGER(name, value) (given.integer[GIM_ARGUMENT_##name] = (value))
#define GIM_REAL(name, value) (given.real[GIM_ARGUMENT_##name] = (value))
#define GIM_STRIDES(name, token, value) \
    (GIM_INTEGER(name##_stride_b, (value)[0]), GIM_INTEGER(name##_stride_h, (value)[1]), \
     GIM_INTEGER(name##_stride_##token, (value)[2]))

/* The loaded kernel, allowed its shared memory on this device. */
static gim_status load(const device *on, const gim_variant *variant, CUkernel *kernel)
{
    loaded *entry = &kernels[variant - gim_table];
    uint64_t bit = (uint64_t)1 << (on->handle & 63);
    gim_status status = GIM_SUCCESS;
    pthread_mutex_lock(&lock);
    if (entry->kernel == NULL) {
        CUlibrary library = NULL;
        status = checked(p_cuLibraryLoadData(&library, variant->image, NULL, NULL, 0, NULL, NULL, 0));
        if (status == GIM_SUCCESS)
            status = checked(p_cuLibraryGetKernel(&entry->kernel, library, variant->symbol));
    }
    if (status == GIM_SUCCESS && !(entry->devices & bit)) {
        if (variant->shared > 48 * 1024)
            status = checked(p_cuKernelSetAttribute(
                CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, variant->shared, entry->kernel, on->handle));
        if (status == GIM_SUCCESS)
            entry->devices |= bit;
    }
    *kernel = entry->kernel;
    pthread_mutex_unlock(&lock);
    return status;
}

enum { DESCRIPTORS = 4, DIMENSIONS = 4 };

/* A tensor [batch, heads, tokens, head_size] as a kernel reads it through a descriptor. */
typedef struct described {
    CUtensorMap map;
    int32_t sizes[DIMENSIONS];
    int64_t strides[DIMENSIONS];
} described;

/* The argument that holds the stride of the batch; those of head and token follow it. */
static gim_argument_id first_stride(gim_argument_id pointer)
{
    switch (pointer) {
    case GIM_ARGUMENT_query_ptr:
        return GIM_ARGUMENT_query_stride_b;
    case GIM_ARGUMENT_key_ptr:
        return GIM_ARGUMENT_key_stride_b;
    case GIM_ARGUMENT_value_ptr:
        return GIM_ARGUMENT_value_stride_b;
    default:
        return GIM_ARGUMENT_grad_out_stride_b;
    }
}

static gim_status describe(const gim_argument *argument, const values *given, described *out)
{
    int of_keys = argument->id == GIM_ARGUMENT_key_ptr || argument->id == GIM_ARGUMENT_value_ptr;
    int64_t heads = given->integer[GIM_ARGUMENT_heads], group = given->integer[GIM_ARGUMENT_group];
    const int64_t *strides = &given->integer[first_stride((gim_argument_id)argument->id)];
    out->sizes[0] = given->batch;
    out->sizes[1] = (int32_t)(of_keys ? heads / group : heads);
    out->sizes[2] = (int32_t)given->integer[of_keys ? GIM_ARGUMENT_keys : GIM_ARGUMENT_queries];
    out->sizes[3] = given->head_size;
    /* The driver has the innermost dimension first, and bytes. That of one element may have any stride but 0. */
    cuuint64_t sizes[DIMENSIONS], bytes[DIMENSIONS - 1];
    const cuuint32_t box[DIMENSIONS] = {argument->box[1], argument->box[0], 1, 1}, each[DIMENSIONS] = {1, 1, 1, 1};
    for (int i = 0; i < DIMENSIONS; ++i) {
        out->strides[i] = i == DIMENSIONS - 1 ? 1 : strides[i] ? strides[i] : given->head_size;
        sizes[DIMENSIONS - 1 - i] = (cuuint64_t)out->sizes[i];
        if (i < DIMENSIONS - 1)
            bytes[DIMENSIONS - 2 - i] = 2 * (cuuint64_t)out->strides[i];
    }
    return checked(p_cuTensorMapEncodeTiled(
        &out->map, given->dtype == GIM_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        DIMENSIONS, (void *)given->pointer[argument->id], sizes, bytes, box, each, CU_TENSOR_MAP_INTERLEAVE_NONE,
        (CUtensorMapSwizzle)argument->swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
}

static gim_status launch(
    const device *on, const gim_variant *variant, const values *given, int64_t programs, gim_stream stream)
{
    if (programs == 0)
        return GIM_SUCCESS;
    if (programs > INT32_MAX)
        return GIM_ERROR_INVALID_ARGUMENT;
    if (variant->shared > on->shared)
        return GIM_ERROR_UNSUPPORTED_DEVICE;
    CUkernel kernel = NULL;
    GIM_TRY(load(on, variant, &kernel));

    union {
        const void *pointer;
        int64_t i64;
        int32_t i32;
        float real;
    } slots[GIM_ARGUMENT_COUNT];
    described descriptors[DESCRIPTORS];
    int count = 0, described_count = 0;
    /* Two pointers to scratch memory, which no kernel here uses, end triton's parameter lists. */
    void *parameters[GIM_ARGUMENT_COUNT + DESCRIPTORS * 2 * DIMENSIONS + 2];
    void *scratch = NULL;
    for (int i = 0; i < variant->argument_count; ++i) {
        gim_argument argument = variant->arguments[i];
        parameters[count++] = &slots[i];
        switch (argument.kind) {
        case GIM_KIND_POINTER:
            slots[i].pointer = given->pointer[argument.id];
            break;
        case GIM_KIND_I32:
            slots[i].i32 = (int32_t)given->integer[argument.id];
            break;
        case GIM_KIND_I64:
            slots[i].i64 = given->integer[argument.id];
            break;
        case GIM_KIND_DESCRIPTOR: {
            described *one = &descriptors[described_count++];
            GIM_TRY(describe(&variant->arguments[i], given, one));
            parameters[count - 1] = &one->map;
            for (int j = 0; j < DIMENSIONS; ++j)
                parameters[count++] = &one->sizes[j];
            for (int j = 0; j < DIMENSIONS; ++j)
                parameters[count++] = &one->strides[j];
            break;
        }
        default:
            slots[i].real = given->real[argument.id];
        }
    }
    parameters[count] = &scratch;
    parameters[count + 1] = &scratch;
    return checked(p_cuLaunchKernel(
        (CUfunction)kernel, (unsigned)programs, 1, 1, (unsigned)variant->threads, 1, 1,
        (unsigned)variant->shared, stream, parameters, NULL));
}

static int64_t blocks(int64_t length, int64_t block)
{
    return (length + block - 1) / block;
}

/* ---- Checks --------------------------------------------------------------------------------------------------------*/

static const char *dtype_name(gim_dtype dtype)
{
    switch (dtype) {
    case GIM_BF16:
        return "bf16";
    case GIM_FP16:
        return "fp16";
    case GIM_FP32:
        return "fp32";
    }
    return NULL;
}

static int item_size(gim_dtype dtype)
{
    return dtype == GIM_FP32 ? 4 : 2;
}

static int aligned(const void *pointer)
{
    return ((uintptr_t)pointer & 15) == 0;
}

/* Strides of batch, head and token; that of a dimension of one element counts for nothing and becomes 0. */
static int clean_strides(int64_t *out, const int64_t *strides, int32_t batch, int32_t heads, int32_t tokens)
{
    const int32_t sizes[3] = {batch, heads, tokens};
    for (int i = 0; i < 3; ++i) {
        out[i] = sizes[i] > 1 ? strides[i] : 0;
        if (out[i] & 15)
            return 0;
    }
    return 1;
}

static size_t rounded_up(size_t bytes)
{
    return (bytes + WORKSPACE_UNIT - 1) / WORKSPACE_UNIT * WORKSPACE_UNIT;
}

static gim_status check_workspace(const void *workspace, size_t given, size_t needed)
{
    if (needed == 0)
        return GIM_SUCCESS;
    if (workspace == NULL || given < needed || ((uintptr_t)workspace & (WORKSPACE_UNIT - 1)))
        return GIM_ERROR_WORKSPACE;
    return GIM_SUCCESS;
}

/* ---- Attention -----------------------------------------------------------------------------------------------------*/

static gim_status check_attention(const gim_attention *a)
{
    if (a == NULL || dtype_name(a->dtype) == NULL)
        return GIM_ERROR_INVALID_ARGUMENT;
    if (a->batch < 0 || a->query_heads < 0 || a->key_heads < 1 || a->queries < 0 || a->keys < 0 || a->head_size < 1 ||
        a->head_size > 256 || a->query_heads % a->key_heads || a->queries > LARGEST_LENGTH || a->keys > LARGEST_LENGTH)
        return GIM_ERROR_INVALID_ARGUMENT;
    if (!(a->scale > 0) || isinf(a->scale) || !(a->softcap >= 0) || isinf(a->softcap) || a->window < 0)
        return GIM_ERROR_INVALID_ARGUMENT;
    if ((a->queries && (!a->query || !a->out || !a->lse)) || (a->keys && (!a->key || !a->value)))
        return GIM_ERROR_INVALID_ARGUMENT;
    if (a->head_size % 16 || !aligned(a->query) || !aligned(a->key) || !aligned(a->value) || !aligned(a->out) ||
        !aligned(a->lse))
        return GIM_ERROR_ALIGNMENT;
    return GIM_SUCCESS;
}

/* A window that hides no key is none. */
static int32_t hiding_window(const gim_attention *a)
{
    return a->window >= a->keys ? 0 : a->window;
}

/* Whether only causality hides keys. */
static int is_plain(const gim_attention *a)
{
    return !hiding_window(a) && a->softcap == 0 && a->sinks == NULL && a->key_range == NULL;
}

/* Sinks and key range that change nothing, for kernels that must have some. */
static size_t neutral_bytes(const gim_attention *a)
{
    return rounded_up((size_t)a->query_heads * sizeof(float)) + rounded_up((size_t)a->batch * 2 * sizeof(int32_t));
}

static int has_argument(const gim_variant *variant, gim_argument_kind kind, int id)
{
    for (int i = 0; i < variant->argument_count; ++i)
        if (variant->arguments[i].kind == kind && (id < 0 || variant->arguments[i].id == id))
            return 1;
    return 0;
}

/* The kernel of an operator for this attention: plain where that was built and suffices, else general or softcap. */
static const gim_variant *attention_variant(
    const device *on, const char *operator_, const gim_attention *a, const char *rule, const values *given)
{
    char key[128];
    const char *masks[2] = {is_plain(a) ? "plain" : NULL, a->softcap > 0 ? "softcap" : "general"};
    for (int i = 0; i < 2; ++i) {
        if (masks[i] == NULL)
            continue;
        snprintf(
            key, sizeof key, "%s/%s/%d/%s/%s%s%s", operator_, dtype_name(a->dtype), (int)a->head_size,
            a->causal ? "causal" : "full", masks[i], rule ? "/" : "", rule ? rule : "");
        const gim_variant *variant = find(on, key, 0);
        if (variant != NULL && (given->describable || !has_argument(variant, GIM_KIND_DESCRIPTOR, -1)))
            return variant;
    }
    return NULL;
}

static int needs_neutral(const gim_variant *variant)
{
    return has_argument(variant, GIM_KIND_POINTER, GIM_ARGUMENT_key_range_ptr);
}

/* Whether a descriptor can hold the strides of a tensor with so many batches, heads and tokens, none of them 0. */
static int fits_descriptor(const int64_t *cleaned, int32_t batch, int32_t heads, int32_t tokens)
{
    const int32_t sizes[3] = {batch, heads, tokens};
    for (int i = 0; i < 3; ++i)
        if (sizes[i] == 0 || (sizes[i] > 1 && (cleaned[i] <= 0 || cleaned[i] >= LARGEST_DESCRIBED_STRIDE)))
            return 0;
    return 1;
}

/* Fills in what every attention kernel shares. */
static gim_status attention_values(const gim_attention *a, values *out)
{
#define given (*out)
    int64_t query[3], key[3], value[3], result[3];
    if (!clean_strides(query, a->query_stride, a->batch, a->query_heads, a->queries) ||
        !clean_strides(key, a->key_stride, a->batch, a->key_heads, a->keys) ||
        !clean_strides(value, a->value_stride, a->batch, a->key_heads, a->keys) ||
        !clean_strides(result, a->out_stride, a->batch, a->query_heads, a->queries))
        return GIM_ERROR_ALIGNMENT;
    memset(out, 0, sizeof *out);
    GIM_POINTER(query_ptr, a->query);
    GIM_POINTER(key_ptr, a->key);
    GIM_POINTER(value_ptr, a->value);
    GIM_POINTER(out_ptr, a->out);
    GIM_POINTER(lse_ptr, a->lse);
    GIM_POINTER(sinks_ptr, a->sinks);
    GIM_POINTER(key_range_ptr, a->key_range);
    GIM_STRIDES(query, t, query);
    GIM_STRIDES(key, s, key);
    GIM_STRIDES(value, s, value);
    GIM_STRIDES(out, t, result);
    GIM_INTEGER(heads, a->query_heads);
    GIM_INTEGER(group, a->query_heads / a->key_heads);
    GIM_INTEGER(queries, a->queries);
    GIM_INTEGER(keys, a->keys);
    GIM_INTEGER(window, hiding_window(a) ? hiding_window(a) : a->keys);
    GIM_REAL(factor, (a->softcap > 0 ? a->softcap : a->scale) * LOG2E);
    GIM_REAL(inner, a->softcap > 0 ? a->scale / a->softcap : 0);
    GIM_REAL(inverse_temperature, 1);
    given.dtype = a->dtype;
    given.batch = a->batch;
    given.head_size = a->head_size;
    given.describable = fits_descriptor(query, a->batch, a->query_heads, a->queries) &&
                        fits_descriptor(key, a->batch, a->key_heads, a->keys) &&
                        fits_descriptor(value, a->batch, a->key_heads, a->keys);
    return GIM_SUCCESS;
#undef given
}

/* Writes the sinks and the key range that are absent, so that they change nothing, and points to them. */
static gim_status fill_neutral(const gim_attention *a, char *workspace, values *out, gim_stream stream)
{
#define given (*out)
    if (a->sinks == NULL) {
        GIM_TRY(checked(p_cuMemsetD32Async((CUdeviceptr)workspace, 0xff800000u, (size_t)a->query_heads, stream)));
        GIM_POINTER(sinks_ptr, workspace); /* -inf */
    }
    if (a->key_range == NULL) {
        char *range = workspace + rounded_up((size_t)a->query_heads * sizeof(float));
        size_t batch = (size_t)a->batch, pitch = 2 * sizeof(int32_t);
        GIM_TRY(checked(p_cuMemsetD32Async((CUdeviceptr)range, 0, 2 * batch, stream)));
        GIM_TRY(checked(p_cuMemsetD2D32Async(
            (CUdeviceptr)(range + sizeof(int32_t)), pitch, (unsigned)a->keys, 1, batch, stream)));
        GIM_POINTER(key_range_ptr, range);
    }
    return GIM_SUCCESS;
#undef given
}

/* ---- The order of programs, as gim_kernels/triton/order.py has it --------------------------------------------------*/

/* Programs from which on it does not matter which is the last. */
static int64_t enough_programs(void)
{
    return (int64_t)gim_order.enough * gim_order.multiprocessors;
}

/* How many columns of tiles run side by side; `shared` columns next to each other read the same data, of `bytes`. */
static int64_t section_of(int64_t tiles, int64_t columns, int64_t shared, int64_t bytes, int causal)
{
    if (!causal || tiles * columns == 0)
        return 1;
    int64_t sharing = columns / shared, least = blocks(enough_programs(), tiles * shared);
    int64_t most = gim_order.cache / (bytes > 0 ? bytes : 1);
    int64_t sections = blocks(sharing, most > 0 ? most : 1);
    if (sections > sharing / least)
        sections = sharing / least > 0 ? sharing / least : 1;
    return blocks(sharing, sections) * shared;
}

/* How many query tiles the key tile that starts at `start` meets. */
static int64_t query_tiles(const gim_attention *a, int64_t start, const int *block)
{
    int64_t offset = (int64_t)a->keys - a->queries, end = start + block[1] < a->keys ? start + block[1] : a->keys;
    int64_t low = a->causal && start - offset > 0 ? start - offset : 0, high = a->queries;
    int32_t window = hiding_window(a);
    if (window && end - 1 - offset + window < high)
        high = end - 1 - offset + window;
    return blocks(high > low ? high : low, block[0]) - low / block[0];
}

/* When the last of `columns` columns of key tiles is done, each program on the multiprocessor that is free first. */
static int64_t makespan(const int64_t *met, int64_t tiles, int64_t members, int64_t columns, int causal, int64_t *free_at)
{
    int count = gim_order.multiprocessors;
    memset(free_at, 0, (size_t)count * sizeof *free_at);
    int64_t last = 0;
    for (int64_t i = 0; i < tiles * columns; ++i) {
        int64_t done = free_at[0] + members * met[causal ? i / columns : i % tiles] + gim_order.start;
        int at = 0; /* a heap: the first to be free is at the top */
        for (int child = 1; child < count; child = 2 * at + 1) {
            if (child + 1 < count && free_at[child + 1] < free_at[child])
                ++child;
            if (free_at[child] >= done)
                break;
            free_at[at] = free_at[child];
            at = child;
        }
        free_at[at] = done;
        last = done > last ? done : last;
    }
    return last;
}

/* How many of the query heads that share a key head one program sums over, for tiles of `block`; 0 without memory. */
static int64_t members_of(const gim_attention *a, const int *block)
{
    int64_t group = a->query_heads / a->key_heads, tiles = blocks(a->keys, block[1]);
    int64_t key_heads = (int64_t)a->batch * a->key_heads, sum = 0;
    if (group <= 1 || tiles * key_heads == 0 || tiles * key_heads >= enough_programs())
        return group;
    int64_t *met = malloc((size_t)(tiles + gim_order.multiprocessors) * sizeof *met);
    if (met == NULL)
        return 0;
    for (int64_t i = 0; i < tiles; ++i) {
        met[i] = query_tiles(a, i * block[1], block);
        sum += group * met[i] + gim_order.start;
    }
    double balance = (double)(key_heads * sum) / gim_order.multiprocessors;
    int64_t best = group, soonest = INT64_MAX;
    for (int64_t members = group; members > 0; --members) {
        if (group % members)
            continue;
        int64_t done = makespan(met, tiles, members, key_heads * group / members, a->causal, met + tiles);
        if ((double)done <= gim_order.balanced * balance) {
            best = members;
            break;
        }
        done += members < group ? gim_order.fold : 0;
        if (done < soonest)
            best = members, soonest = done;
    }
    free(met);
    return best;
}

/* Launches a kernel over query tiles. */
static gim_status launch_queries(
    const device *on, const gim_variant *variant, const gim_attention *a, values *out, gim_stream stream)
{
#define given (*out)
    int64_t tiles = blocks(a->queries, variant->block[0]), columns = (int64_t)a->batch * a->query_heads;
    int64_t bytes = 2 * (int64_t)a->keys * a->head_size * item_size(a->dtype);
    GIM_INTEGER(section, section_of(tiles, columns, a->query_heads / a->key_heads, bytes, a->causal));
    return launch(on, variant, out, tiles * columns, stream);
#undef given
}

/* Numbers of a gradient of keys or of values. */
static int64_t key_numbers(const gim_attention *a)
{
    return (int64_t)a->batch * a->key_heads * a->keys * a->head_size;
}

/* Adds the parts of a gradient, one after another. */
static gim_status fold_parts(
    const device *on, const gim_attention *a, int64_t parts, const void *partial, const void *grad,
    const int64_t *strides, gim_stream stream)
{
    char key[64];
    snprintf(key, sizeof key, "attention_fold/%s/%d", dtype_name(a->dtype), (int)a->head_size);
    const gim_variant *variant = find(on, key, 0);
    if (variant == NULL)
        return GIM_ERROR_NOT_BUILT;
    values given;
    memset(&given, 0, sizeof given);
    GIM_POINTER(partial_ptr, partial);
    GIM_POINTER(out_ptr, grad);
    GIM_STRIDES(out, s, strides);
    GIM_INTEGER(heads, a->key_heads);
    GIM_INTEGER(keys, a->keys);
    GIM_INTEGER(parts, parts);
    int64_t programs = blocks(a->keys, variant->block[0]) * a->batch * a->key_heads;
    return launch(on, variant, &given, programs, stream);
}

/* Launches a kernel over key tiles. Where too few of its programs would run, several share the query heads of a key head:
 * their sums go to `partial` and are folded. `grad_key` and `grad_value`: what the kernel writes, NULL where it does not. */
static gim_status launch_keys(
    const device *on, const gim_variant *variant, const gim_attention *a, const gim_attention_gradients *g,
    const void *grad_key, const void *grad_value, char *partial, const values *common, gim_stream stream)
{
    values given = *common;
    int64_t tiles = blocks(a->keys, variant->block[1]), group = a->query_heads / a->key_heads;
    int64_t members = members_of(a, variant->block);
    if (members == 0 && group > 0)
        return GIM_ERROR_WORKSPACE;
    int64_t parts = group ? group / members : 1, columns = (int64_t)a->batch * a->key_heads * parts;
    int64_t bytes = members * 2 * a->queries * a->head_size * item_size(a->dtype), numbers = key_numbers(a);
    GIM_INTEGER(members, members);
    GIM_INTEGER(section, section_of(tiles, columns, 1, bytes, a->causal));
    GIM_INTEGER(grad_stride_part, numbers);
    GIM_POINTER(partial_ptr, parts > 1 ? (const void *)partial : a->lse); /* nothing is written there without parts */
    if (parts > 1) {
        const int64_t strides[3] = {numbers / a->batch, (int64_t)a->keys * a->head_size, a->head_size};
        GIM_STRIDES(grad_key, s, strides);
        GIM_STRIDES(grad_value, s, strides);
    }
    GIM_TRY(launch(on, variant, &given, tiles * columns, stream));
    if (parts == 1)
        return GIM_SUCCESS;
    if (grad_key != NULL) {
        int64_t to[3];
        clean_strides(to, g->grad_key_stride, a->batch, a->key_heads, a->keys);
        GIM_TRY(fold_parts(on, a, parts, partial, grad_key, to, stream));
        partial += parts * numbers * (int64_t)sizeof(float);
    }
    if (grad_value != NULL) {
        int64_t to[3];
        clean_strides(to, g->grad_value_stride, a->batch, a->key_heads, a->keys);
        GIM_TRY(fold_parts(on, a, parts, partial, grad_value, to, stream));
    }
    return GIM_SUCCESS;
}

/* The most bytes of parts that a kernel over key tiles of this attention has, whatever the GPU. */
static size_t part_bytes(const gim_attention *a, int constant)
{
    static const char *operators[] = {"attention_grad_value", "attention_grad_key", "attention_grad_key_value"};
    int64_t most = 0;
    int seen[2] = {0, 0};
    for (int i = 0; i < (constant ? 1 : 3); ++i) {
        char prefix[64];
        int length = snprintf(
            prefix, sizeof prefix, "%s/%s/%d/%s/", operators[i], dtype_name(a->dtype), (int)a->head_size,
            a->causal ? "causal" : "full");
        for (size_t j = 0; j < gim_table_size; ++j) {
            const int *block = gim_table[j].block;
            /* Variants of one operator mostly have the same tile. */
            if (strncmp(gim_table[j].key, prefix, (size_t)length) != 0 || (block[0] == seen[0] && block[1] == seen[1]))
                continue;
            memcpy(seen, block, sizeof seen);
            int64_t group = a->query_heads / a->key_heads, members = members_of(a, block);
            int64_t parts = members ? group / members : 1, sums = parts > 1 ? parts * (i == 2 ? 2 : 1) : 0;
            most = sums > most ? sums : most;
        }
        seen[0] = 0;
    }
    return rounded_up((size_t)(most * key_numbers(a)) * sizeof(float));
}

static int64_t query_rows(const gim_attention *a)
{
    return (int64_t)a->batch * a->query_heads * a->queries;
}

size_t gim_attention_forward_workspace(const gim_attention *attention)
{
    return check_attention(attention) == GIM_SUCCESS ? neutral_bytes(attention) : 0;
}

gim_status gim_attention_forward(
    const gim_attention *attention, void *workspace, size_t workspace_bytes, gim_stream stream)
{
    GIM_TRY(check_attention(attention));
    values given;
    GIM_TRY(attention_values(attention, &given));
    GIM_TRY(check_workspace(workspace, workspace_bytes, gim_attention_forward_workspace(attention)));
    device on;
    GIM_TRY(current_device(&on));
    const gim_variant *variant = attention_variant(&on, "attention_forward", attention, NULL, &given);
    if (variant == NULL)
        return GIM_ERROR_NOT_BUILT;
    if (query_rows(attention) == 0)
        return GIM_SUCCESS;
    if (needs_neutral(variant))
        GIM_TRY(fill_neutral(attention, workspace, &given, stream));
    return launch_queries(&on, variant, attention, &given, stream);
}

static size_t row_bytes(const gim_attention *a)
{
    return rounded_up((size_t)query_rows(a) * sizeof(float));
}

size_t gim_attention_backward_workspace(
    const gim_attention *attention, const gim_attention_gradients *gradients)
{
    if (check_attention(attention) != GIM_SUCCESS || gradients == NULL)
        return 0;
    int constant = gradients->softmax_backward == GIM_SOFTMAX_CONSTANT;
    size_t rows = constant ? 0 : 3 * row_bytes(attention);
    return rows + neutral_bytes(attention) + part_bytes(attention, constant);
}

/* The kernels' name of the rule; NULL for arguments that are none. */
static const char *rule_of(const gim_attention_gradients *g)
{
    switch (g->softmax_backward) {
    case GIM_SOFTMAX_EXACT:
        return "exact";
    case GIM_SOFTMAX_CONSTANT:
        return "constant";
    case GIM_SOFTMAX_TEMPERATURE:
        if (!(g->temperature > 0) || isinf(g->temperature))
            return NULL;
        return g->temperature == 1 ? "exact" : g->temperature == 2 ? "square" : g->temperature > 1 ? "warm" : "sharp";
    }
    return NULL;
}

gim_status gim_attention_backward(
    const gim_attention *attention, const gim_attention_gradients *gradients, void *workspace,
    size_t workspace_bytes, gim_stream stream)
{
    const gim_attention *a = attention;
    const gim_attention_gradients *g = gradients;
    GIM_TRY(check_attention(a));
    if (g == NULL || rule_of(g) == NULL || !isfinite(g->query_factor) || !isfinite(g->key_factor) ||
        !isfinite(g->value_factor) || (a->queries && g->grad_out == NULL))
        return GIM_ERROR_INVALID_ARGUMENT;
    const char *rule = rule_of(g);
    int constant = g->softmax_backward == GIM_SOFTMAX_CONSTANT;
    if (constant ? g->grad_query != NULL || g->grad_key != NULL
                 : (a->queries && g->grad_query == NULL) || (a->keys && g->grad_key == NULL))
        return GIM_ERROR_INVALID_ARGUMENT;
    if (a->keys && g->grad_value == NULL)
        return GIM_ERROR_INVALID_ARGUMENT;
    values given;
    GIM_TRY(attention_values(a, &given));
    int64_t grad_out[3], grad_query[3], grad_key[3], grad_value[3];
    if (!aligned(g->grad_out) || !aligned(g->grad_query) || !aligned(g->grad_key) || !aligned(g->grad_value) ||
        !clean_strides(grad_out, g->grad_out_stride, a->batch, a->query_heads, a->queries) ||
        !clean_strides(grad_query, g->grad_query_stride, a->batch, a->query_heads, a->queries) ||
        !clean_strides(grad_key, g->grad_key_stride, a->batch, a->key_heads, a->keys) ||
        !clean_strides(grad_value, g->grad_value_stride, a->batch, a->key_heads, a->keys))
        return GIM_ERROR_ALIGNMENT;
    given.describable = given.describable && fits_descriptor(grad_out, a->batch, a->query_heads, a->queries);
    GIM_TRY(check_workspace(workspace, workspace_bytes, gim_attention_backward_workspace(a, g)));
    device on;
    GIM_TRY(current_device(&on));

    /* Either one kernel finds the gradients of key and value, or one each: whichever was built for this GPU. */
    const gim_variant *query_kernel = NULL, *key_kernel = NULL, *value_kernel = NULL;
    int together = 0;
    if (!constant) {
        query_kernel = attention_variant(&on, "attention_grad_query", a, rule, &given);
        const char *key_rule = strcmp(rule, "sharp") == 0 ? "warm" : rule;
        key_kernel = attention_variant(&on, "attention_grad_key_value", a, key_rule, &given);
        together = key_kernel != NULL;
        if (!together)
            key_kernel = attention_variant(&on, "attention_grad_key", a, key_rule, &given);
    }
    if (!together)
        value_kernel = attention_variant(&on, "attention_grad_value", a, NULL, &given);
    if ((!constant && (query_kernel == NULL || key_kernel == NULL)) || (!together && value_kernel == NULL))
        return GIM_ERROR_NOT_BUILT;

    char *memory = workspace;
    if ((query_kernel && needs_neutral(query_kernel)) || (key_kernel && needs_neutral(key_kernel)) ||
        (value_kernel && needs_neutral(value_kernel)))
        GIM_TRY(fill_neutral(a, memory, &given, stream));
    memory += neutral_bytes(a);
    GIM_POINTER(grad_out_ptr, g->grad_out);
    GIM_POINTER(grad_query_ptr, g->grad_query);
    GIM_POINTER(grad_key_ptr, g->grad_key);
    GIM_POINTER(grad_value_ptr, g->grad_value);
    GIM_STRIDES(grad_out, t, grad_out);
    GIM_STRIDES(grad_query, t, grad_query);
    GIM_STRIDES(grad_key, s, grad_key);
    GIM_STRIDES(grad_value, s, grad_value);
    GIM_REAL(grad_factor, a->scale * g->query_factor);
    GIM_REAL(key_factor, a->scale * g->key_factor);
    GIM_REAL(value_factor, g->value_factor);

    if (!constant) {
        if (g->softmax_backward == GIM_SOFTMAX_TEMPERATURE)
            GIM_REAL(inverse_temperature, 1 / g->temperature);
        GIM_POINTER(shift_ptr, memory);
        GIM_POINTER(norm_ptr, memory + row_bytes(a));
        GIM_POINTER(delta_ptr, memory + 2 * row_bytes(a));
        memory += 3 * row_bytes(a);
        GIM_TRY(launch_queries(&on, query_kernel, a, &given, stream));
        GIM_TRY(launch_keys(
            &on, key_kernel, a, g, g->grad_key, together ? g->grad_value : NULL, memory, &given, stream));
    }
    if (!together) {
        GIM_POINTER(shift_ptr, a->lse);
        GIM_TRY(launch_keys(&on, value_kernel, a, g, NULL, g->grad_value, memory, &given, stream));
    }
    return GIM_SUCCESS;
}

/* ---- Norms ---------------------------------------------------------------------------------------------------------*/

static const char *kind_name(gim_norm_kind kind)
{
    return kind == GIM_NORM_RMS ? "rms" : kind == GIM_NORM_LAYER ? "layer" : NULL;
}

static gim_status check_norm(const gim_norm *n)
{
    if (n == NULL || dtype_name(n->dtype) == NULL || kind_name(n->kind) == NULL)
        return GIM_ERROR_INVALID_ARGUMENT;
    if (n->rows < 0 || n->rows > INT32_MAX || n->columns < 1 || n->weight == NULL)
        return GIM_ERROR_INVALID_ARGUMENT;
    if (!(n->eps >= 0) || isinf(n->eps) || !isfinite(n->weight_offset))
        return GIM_ERROR_INVALID_ARGUMENT;
    if (n->kind == GIM_NORM_RMS ? n->bias != NULL : n->weight_offset != 0)
        return GIM_ERROR_INVALID_ARGUMENT;
    if (n->rows && n->inverse == NULL)
        return GIM_ERROR_INVALID_ARGUMENT;
    if (n->columns % 16 || !aligned(n->x) || !aligned(n->weight) || !aligned(n->bias) || !aligned(n->y) ||
        (n->rows > 1 && n->x_stride % 16))
        return GIM_ERROR_ALIGNMENT;
    return GIM_SUCCESS;
}

static void norm_values(const gim_norm *n, values *out)
{
#define given (*out)
    memset(out, 0, sizeof *out);
    GIM_POINTER(x_ptr, n->x);
    GIM_POINTER(weight_ptr, n->weight);
    GIM_POINTER(bias_ptr, n->bias);
    GIM_POINTER(y_ptr, n->y);
    GIM_POINTER(mean_ptr, n->mean);
    GIM_POINTER(inverse_ptr, n->inverse);
    GIM_INTEGER(rows, n->rows);
    GIM_INTEGER(columns, n->columns);
    GIM_INTEGER(x_stride2, n->rows > 1 ? n->x_stride : 0);
    GIM_REAL(eps, n->eps);
    GIM_REAL(weight_offset, n->weight_offset);
#undef given
}

gim_status gim_norm_forward(const gim_norm *norm, gim_stream stream)
{
    GIM_TRY(check_norm(norm));
    if (norm->rows && (norm->x == NULL || norm->y == NULL || (norm->kind == GIM_NORM_LAYER && norm->mean == NULL)))
        return GIM_ERROR_INVALID_ARGUMENT;
    device on;
    GIM_TRY(current_device(&on));
    char key[128];
    snprintf(
        key, sizeof key, "norm_forward/%s/%s%s", dtype_name(norm->dtype), kind_name(norm->kind),
        norm->bias ? "_bias" : "");
    const gim_variant *variant = find(&on, key, norm->columns);
    if (variant == NULL)
        return GIM_ERROR_NOT_BUILT;
    values given;
    norm_values(norm, &given);
    return launch(&on, variant, &given, blocks(norm->rows, variant->block[0]), stream);
}

/* How many rows a program of the weight's gradient sums, with tiles of so many rows and columns. */
static int64_t rows_per_chunk(const gim_norm *n, const int *block)
{
    int64_t row_blocks = blocks(n->rows, block[0]);
    int64_t chunks = gim_weight_gradient_programs / blocks(n->columns, block[1]);
    if (chunks < 1)
        chunks = 1;
    if (chunks > row_blocks)
        chunks = row_blocks;
    return (row_blocks + chunks - 1) / chunks * block[0];
}

size_t gim_norm_backward_workspace(const gim_norm *norm, const gim_norm_gradients *gradients)
{
    if (check_norm(norm) != GIM_SUCCESS || gradients == NULL || gradients->grad_weight == NULL)
        return 0;
    /* As many chunks as the smallest tile of any GPU could make; two sums, for the bias of a layer norm. */
    int64_t chunks = gim_weight_gradient_programs < norm->rows ? gim_weight_gradient_programs : norm->rows;
    return 2 * rounded_up((size_t)chunks * (size_t)norm->columns * sizeof(float));
}

gim_status gim_norm_backward(
    const gim_norm *norm, const gim_norm_gradients *gradients, void *workspace, size_t workspace_bytes,
    gim_stream stream)
{
    const gim_norm *n = norm;
    const gim_norm_gradients *g = gradients;
    GIM_TRY(check_norm(n));
    if (g == NULL || (n->rows && g->grad_y == NULL) || (g->grad_bias && !g->grad_weight) ||
        (g->grad_bias && n->kind == GIM_NORM_RMS))
        return GIM_ERROR_INVALID_ARGUMENT;
    int read_x = g->grad_weight != NULL || (g->grad_x != NULL && !g->frozen);
    if (n->rows && read_x && (n->x == NULL || (n->kind == GIM_NORM_LAYER && n->mean == NULL)))
        return GIM_ERROR_INVALID_ARGUMENT;
    if (!aligned(g->grad_y) || !aligned(g->grad_x) || (n->rows > 1 && g->grad_y_stride % 16) ||
        !aligned(g->grad_weight) || !aligned(g->grad_bias))
        return GIM_ERROR_ALIGNMENT;
    GIM_TRY(check_workspace(workspace, workspace_bytes, gim_norm_backward_workspace(n, g)));
    device on;
    GIM_TRY(current_device(&on));
    values given;
    norm_values(n, &given);
    GIM_POINTER(grad_y_ptr, g->grad_y);
    GIM_POINTER(grad_x_ptr, g->grad_x);
    GIM_INTEGER(grad_y_stride2, n->rows > 1 ? g->grad_y_stride : 0);
    char key[128];
    if (g->grad_x != NULL) {
        snprintf(
            key, sizeof key, "norm_backward/%s/%s/%s", dtype_name(n->dtype), kind_name(n->kind),
            g->frozen ? "frozen" : "live");
        const gim_variant *variant = find(&on, key, n->columns);
        if (variant == NULL)
            return GIM_ERROR_NOT_BUILT;
        GIM_TRY(launch(&on, variant, &given, blocks(n->rows, variant->block[0]), stream));
    }
    if (g->grad_weight == NULL)
        return GIM_SUCCESS;
    if (n->rows == 0) {
        GIM_TRY(checked(p_cuMemsetD32Async((CUdeviceptr)g->grad_weight, 0, (size_t)n->columns, stream)));
        return g->grad_bias
                   ? checked(p_cuMemsetD32Async((CUdeviceptr)g->grad_bias, 0, (size_t)n->columns, stream))
                   : GIM_SUCCESS;
    }
    snprintf(key, sizeof key, "norm_backward_weight/%s/%s", dtype_name(n->dtype), kind_name(n->kind));
    const gim_variant *sums = find(&on, key, n->columns), *fold = find(&on, "fold", n->columns);
    if (sums == NULL || fold == NULL)
        return GIM_ERROR_NOT_BUILT;
    int64_t each = rows_per_chunk(n, sums->block), chunks = (n->rows + each - 1) / each;
    char *partial_weight = workspace;
    char *partial_bias = partial_weight + gim_norm_backward_workspace(n, g) / 2;
    GIM_POINTER(partial_weight_ptr, partial_weight);
    GIM_POINTER(partial_bias_ptr, partial_bias);
    GIM_INTEGER(rows_per_chunk, each);
    GIM_TRY(launch(&on, sums, &given, chunks * blocks(n->columns, sums->block[1]), stream));
    GIM_INTEGER(chunks, chunks);
    float *totals[2] = {g->grad_weight, g->grad_bias};
    const char *partials[2] = {partial_weight, partial_bias};
    for (int i = 0; i < 2; ++i) {
        if (totals[i] == NULL)
            continue;
        GIM_POINTER(partial_ptr, partials[i]);
        GIM_POINTER(out_ptr, totals[i]);
        GIM_TRY(launch(&on, fold, &given, blocks(n->columns, fold->block[1]), stream));
    }
    return GIM_SUCCESS;
}

/* ---- Gated product -------------------------------------------------------------------------------------------------*/

static const char *activation_name(gim_activation activation)
{
    switch (activation) {
    case GIM_SILU:
        return "silu";
    case GIM_GELU:
        return "gelu";
    case GIM_GELU_TANH:
        return "gelu_tanh";
    }
    return NULL;
}

static gim_status check_gated(const gim_gated *p)
{
    if (p == NULL || dtype_name(p->dtype) == NULL || activation_name(p->activation) == NULL)
        return GIM_ERROR_INVALID_ARGUMENT;
    if (p->rows < 0 || p->rows > INT32_MAX || p->columns < 0)
        return GIM_ERROR_INVALID_ARGUMENT;
    if (p->rows && p->columns && (p->gate == NULL || p->up == NULL))
        return GIM_ERROR_INVALID_ARGUMENT;
    if (p->columns % 16 || !aligned(p->gate) || !aligned(p->up))
        return GIM_ERROR_ALIGNMENT;
    return GIM_SUCCESS;
}

/* Launches over rows that are these strides apart; over one long row where all are contiguous. */
static gim_status launch_gated(
    const char *key, const gim_gated *p, values *out, const int64_t *strides, const gim_argument_id *names, int count,
    gim_stream stream)
{
    device on;
    GIM_TRY(current_device(&on));
    const gim_variant *variant = find(&on, key, 0);
    if (variant == NULL)
        return GIM_ERROR_NOT_BUILT;
    int contiguous = 1;
    for (int i = 0; i < count; ++i) {
        if (p->rows > 1 && strides[i] % 16)
            return GIM_ERROR_ALIGNMENT;
        contiguous &= p->rows <= 1 || strides[i] == p->columns;
    }
    int64_t rows = contiguous ? 1 : p->rows, columns = contiguous ? p->rows * p->columns : p->columns;
    for (int i = 0; i < count; ++i)
        out->integer[names[i]] = contiguous ? 0 : strides[i];
    out->integer[GIM_ARGUMENT_rows] = rows;
    out->integer[GIM_ARGUMENT_columns] = columns;
    return launch(
        &on, variant, out, blocks(rows, variant->block[0]) * blocks(columns, variant->block[1]), stream);
}

gim_status gim_gated_forward(const gim_gated *gated, gim_stream stream)
{
    const gim_gated *p = gated;
    GIM_TRY(check_gated(p));
    if (p->rows && p->columns && p->y == NULL)
        return GIM_ERROR_INVALID_ARGUMENT;
    if (!aligned(p->y))
        return GIM_ERROR_ALIGNMENT;
    char key[128];
    snprintf(key, sizeof key, "gated_forward/%s/%s", dtype_name(p->dtype), activation_name(p->activation));
    values given;
    memset(&given, 0, sizeof given);
    GIM_POINTER(gate_ptr, p->gate);
    GIM_POINTER(up_ptr, p->up);
    GIM_POINTER(y_ptr, p->y);
    const int64_t strides[3] = {p->gate_stride, p->up_stride, p->y_stride};
    const gim_argument_id names[3] = {
        GIM_ARGUMENT_gate_stride2, GIM_ARGUMENT_up_stride2, GIM_ARGUMENT_y_stride2};
    return launch_gated(key, p, &given, strides, names, 3, stream);
}

gim_status gim_gated_backward(const gim_gated *gated, const gim_gated_gradients *gradients, gim_stream stream)
{
    const gim_gated *p = gated;
    const gim_gated_gradients *g = gradients;
    GIM_TRY(check_gated(p));
    if (g == NULL || !isfinite(g->gate_factor) || !isfinite(g->up_factor))
        return GIM_ERROR_INVALID_ARGUMENT;
    if (p->rows && p->columns && (g->grad_y == NULL || g->grad_gate == NULL || g->grad_up == NULL))
        return GIM_ERROR_INVALID_ARGUMENT;
    if (!aligned(g->grad_y) || !aligned(g->grad_gate) || !aligned(g->grad_up))
        return GIM_ERROR_ALIGNMENT;
    char key[128];
    snprintf(
        key, sizeof key, "gated_backward/%s/%s/%s", dtype_name(p->dtype), activation_name(p->activation),
        g->ratio ? "ratio" : "exact");
    values given;
    memset(&given, 0, sizeof given);
    GIM_POINTER(grad_y_ptr, g->grad_y);
    GIM_POINTER(gate_ptr, p->gate);
    GIM_POINTER(up_ptr, p->up);
    GIM_POINTER(grad_gate_ptr, g->grad_gate);
    GIM_POINTER(grad_up_ptr, g->grad_up);
    GIM_REAL(gate_scale, g->gate_factor);
    GIM_REAL(up_scale, g->up_factor);
    const int64_t strides[5] = {
        g->grad_y_stride, p->gate_stride, p->up_stride, g->grad_gate_stride, g->grad_up_stride};
    const gim_argument_id names[5] = {
        GIM_ARGUMENT_grad_y_stride2, GIM_ARGUMENT_gate_stride2, GIM_ARGUMENT_up_stride2,
        GIM_ARGUMENT_grad_gate_stride2, GIM_ARGUMENT_grad_up_stride2};
    return launch_gated(key, p, &given, strides, names, 5, stream);
}

/* ---- What is built in ----------------------------------------------------------------------------------------------*/

const char *gim_targets(void)
{
    return gim_targets_built;
}

size_t gim_variant_count(void)
{
    return gim_table_size;
}

const char *gim_variant_name(size_t index)
{
    return index < gim_table_size ? gim_table[index].name : NULL;
}

int gim_driver_error(void)
{
    return driver_error;
}

const char *gim_status_string(gim_status status)
{
    switch (status) {
    case GIM_SUCCESS:
        return "success";
    case GIM_ERROR_INVALID_ARGUMENT:
        return "an argument is missing, out of range, or contradicts another";
    case GIM_ERROR_ALIGNMENT:
        return "a pointer is no multiple of 16 bytes, or a size or stride no multiple of 16 elements";
    case GIM_ERROR_NOT_BUILT:
        return "the library was built without this type, head size or combination of options";
    case GIM_ERROR_UNSUPPORTED_DEVICE:
        return "the library was not built for the current GPU, or the GPU has too little shared memory";
    case GIM_ERROR_NO_DRIVER:
        return "there is no CUDA driver, or one older than CUDA 12.0";
    case GIM_ERROR_NO_CONTEXT:
        return "the calling thread has no current CUDA context";
    case GIM_ERROR_WORKSPACE:
        return "the workspace is absent, too small, or its address no multiple of 256";
    case GIM_ERROR_DRIVER:
        return "the CUDA driver reported an error; see gim_driver_error";
    }
    return "no status of this library";
}
