/* What the generated table of kernels holds and the launcher reads. Not installed. */
#ifndef GIM_TABLE_H
#define GIM_TABLE_H

#include <stddef.h>
#include <stdint.h>

/* Every argument some kernel has: pointers, integers, floats. The table names them, the launcher fills them in.
 * Arguments of one name in different kernels (out_ptr of attention and of the folds) share it. */
#define GIM_POINTERS(X) \
    X(query_ptr) X(key_ptr) X(value_ptr) X(sinks_ptr) X(key_range_ptr) X(out_ptr) X(lse_ptr) X(grad_out_ptr) \
    X(grad_query_ptr) X(grad_key_ptr) X(grad_value_ptr) X(partial_ptr) X(shift_ptr) X(norm_ptr) X(delta_ptr) X(x_ptr) \
    X(weight_ptr) X(bias_ptr) X(y_ptr) X(mean_ptr) X(inverse_ptr) X(grad_y_ptr) X(grad_x_ptr) \
    X(partial_weight_ptr) X(partial_bias_ptr) X(gate_ptr) X(up_ptr) X(grad_gate_ptr) X(grad_up_ptr)
#define GIM_INTEGERS(X) \
    X(query_stride_b) X(query_stride_h) X(query_stride_t) X(key_stride_b) X(key_stride_h) X(key_stride_s) \
    X(value_stride_b) X(value_stride_h) X(value_stride_s) X(out_stride_b) X(out_stride_h) X(out_stride_t) \
    X(out_stride_s) X(grad_out_stride_b) X(grad_out_stride_h) X(grad_out_stride_t) X(grad_query_stride_b) \
    X(grad_query_stride_h) X(grad_query_stride_t) X(grad_key_stride_b) X(grad_key_stride_h) \
    X(grad_key_stride_s) X(grad_value_stride_b) X(grad_value_stride_h) X(grad_value_stride_s) \
    X(grad_stride_part) X(heads) X(group) X(members) X(section) X(parts) X(queries) X(keys) X(window) X(rows) \
    X(columns) X(x_stride2) X(grad_y_stride2) X(gate_stride2) X(up_stride2) X(y_stride2) X(grad_gate_stride2) \
    X(grad_up_stride2) X(rows_per_chunk) X(chunks)
#define GIM_FLOATS(X) \
    X(factor) X(inner) X(inverse_temperature) X(grad_factor) X(key_factor) X(value_factor) X(eps) \
    X(weight_offset) X(gate_scale) X(up_scale)

#define GIM_DECLARE(name) GIM_ARGUMENT_##name,
typedef enum gim_argument_id {
    GIM_POINTERS(GIM_DECLARE) GIM_INTEGERS(GIM_DECLARE) GIM_FLOATS(GIM_DECLARE) GIM_ARGUMENT_COUNT
} gim_argument_id;
#undef GIM_DECLARE

typedef enum gim_argument_kind {
    GIM_KIND_POINTER,
    GIM_KIND_I32,
    GIM_KIND_I64,
    GIM_KIND_FLOAT,
    /* A tensor map by value, then the tensor's four sizes (int32) and strides (int64) once more. */
    GIM_KIND_DESCRIPTOR
} gim_argument_kind;

typedef struct gim_argument {
    uint8_t id, kind;
    /* Of a descriptor: a CUtensorMapSwizzle, and the rows and columns that one copy brings. */
    uint8_t swizzle;
    uint16_t box[2];
} gim_argument;

typedef struct gim_variant {
    /* 10 * major + minor of the compute capability. */
    int architecture;
    const char *key;
    /* The most columns it takes. */
    int32_t limit;
    const unsigned char *image;
    const char *symbol;
    const gim_argument *arguments;
    int argument_count;
    /* Rows and columns of a program's tile: queries and keys for attention. */
    int block[2];
    int threads;
    /* Bytes of shared memory to ask for at launch. */
    int shared;
    /* Target and key, for people. */
    const char *name;
} gim_variant;

/* Sorted by architecture, key and limit. */
extern const gim_variant gim_table[];
extern const size_t gim_table_size;
extern const char gim_targets_built[];
/* Programs that the weight's gradient of a norm aims at. */
extern const int gim_weight_gradient_programs;
/* The constants of gim_kernels/triton/order.py. */
typedef struct gim_order_numbers {
    int multiprocessors, enough, start, fold;
    int64_t cache;
    double balanced;
} gim_order_numbers;
extern const gim_order_numbers gim_order;

#endif
