/* The part of the CUDA driver that the library and its tests use, without a GPU: memory is the host's, and a launch is
 * handed to a function of the test. */

#include <cuda.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* What a test sees of a launch: the compiled file, the kernel's name, the grid, the block, shared memory, parameters. */
typedef int (*launch_function)(
    const void *image, const char *symbol, unsigned grid, unsigned block, unsigned shared, void **parameters);

typedef struct kernel {
    const void *image;
    const char *symbol;
    /* What cuKernelSetAttribute allowed. */
    int shared;
} kernel;

static launch_function on_launch;
static int capability = 90;
static int context_present = 1;

void gim_test_driver(launch_function function, int compute_capability, int with_context)
{
    on_launch = function;
    capability = compute_capability;
    context_present = with_context;
}

CUresult cuCtxGetCurrent(CUcontext *context)
{
    *context = context_present ? (CUcontext)&capability : NULL;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device)
{
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device)
{
    (void)device;
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
        *value = capability / 10;
        return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
        *value = capability % 10;
        return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
        *value = (capability == 90 ? 227 : capability == 80 ? 163 : 99) * 1024;
        return CUDA_SUCCESS;
    default:
        return CUDA_ERROR_INVALID_VALUE;
    }
}

CUresult cuLibraryLoadData(
    CUlibrary *library, const void *code, CUjit_option *options, void **values, unsigned count,
    CUlibraryOption *library_options, void **library_values, unsigned library_count)
{
    (void)options, (void)values, (void)library_options, (void)library_values;
    const unsigned char *header = code;
    if (count || library_count || header[0] != 0x7f || header[1] != 'E')
        return CUDA_ERROR_INVALID_IMAGE;
    *library = (CUlibrary)code;
    return CUDA_SUCCESS;
}

CUresult cuLibraryGetKernel(CUkernel *found, CUlibrary library, const char *name)
{
    kernel *made = calloc(1, sizeof *made);
    if (made == NULL)
        return CUDA_ERROR_OUT_OF_MEMORY;
    made->image = library;
    made->symbol = name;
    made->shared = 48 * 1024;
    *found = (CUkernel)made;
    return CUDA_SUCCESS;
}

CUresult cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel which, CUdevice device)
{
    (void)device;
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
        return CUDA_ERROR_INVALID_VALUE;
    ((kernel *)which)->shared = value;
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(
    CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
    unsigned block_z, unsigned shared, CUstream stream, void **parameters, void **extra)
{
    (void)stream;
    const kernel *which = (const kernel *)function;
    if (grid_x == 0 || grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || block_x > 1024 || extra != NULL ||
        (int)shared > which->shared)
        return CUDA_ERROR_INVALID_VALUE;
    return (CUresult)on_launch(which->image, which->symbol, grid_x, block_x, shared, parameters);
}

/* What the test reads back out of a tensor map: the arguments it was made from. */
typedef struct tensor_map {
    uint64_t address, sizes[4], strides[3];
    uint32_t box[4], type, swizzle;
} tensor_map;

CUresult cuTensorMapEncodeTiled(
    CUtensorMap *out, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *sizes,
    const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *element_strides,
    CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
    CUtensorMapFloatOOBfill fill)
{
    (void)promotion;
    const cuuint32_t widest[] = {0, 32, 64, 128};
    if (rank != 4 || ((uintptr_t)out & 63) || address == NULL || ((uintptr_t)address & 15) || swizzle < 1 ||
        swizzle > 3 || box[0] * 2 > widest[swizzle] || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
        fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
        return CUDA_ERROR_INVALID_VALUE;
    tensor_map made;
    memset(&made, 0, sizeof made);
    made.address = (uintptr_t)address;
    made.type = type;
    made.swizzle = swizzle;
    for (int i = 0; i < 4; ++i) {
        if (sizes[i] == 0 || box[i] == 0 || box[i] > 256 || element_strides[i] != 1 ||
            (i < 3 && (strides[i] == 0 || strides[i] % 16 || strides[i] >> 40)))
            return CUDA_ERROR_INVALID_VALUE;
        made.sizes[i] = sizes[i];
        made.box[i] = box[i];
        if (i < 3)
            made.strides[i] = strides[i];
    }
    memset(out, 0, sizeof *out);
    memcpy(out, &made, sizeof made);
    return CUDA_SUCCESS;
}

CUresult cuMemsetD32Async(CUdeviceptr address, unsigned value, size_t count, CUstream stream)
{
    (void)stream;
    for (size_t i = 0; i < count; ++i)
        ((uint32_t *)(uintptr_t)address)[i] = value;
    return CUDA_SUCCESS;
}

CUresult cuMemsetD2D32Async(
    CUdeviceptr address, size_t pitch, unsigned value, size_t width, size_t height, CUstream stream)
{
    (void)stream;
    for (size_t row = 0; row < height; ++row)
        for (size_t i = 0; i < width; ++i)
            ((uint32_t *)(uintptr_t)(address + row * pitch))[i] = value;
    return CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags)
{
    return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal)
{
    *device = ordinal;
    return ordinal ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
    (void)device;
    *context = (CUcontext)&capability;
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context)
{
    (void)context;
    return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize(void)
{
    return CUDA_SUCCESS;
}

CUresult cuMemAlloc(CUdeviceptr *address, size_t bytes)
{
    /* As the driver aligns it. */
    void *memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
    *address = (CUdeviceptr)(uintptr_t)memory;
    return memory ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemFree(CUdeviceptr address)
{
    free((void *)(uintptr_t)address);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t bytes)
{
    memcpy((void *)(uintptr_t)to, from, bytes);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoH(void *to, CUdeviceptr from, size_t bytes)
{
    memcpy(to, (void *)(uintptr_t)from, bytes);
    return CUDA_SUCCESS;
}

CUresult cuMemsetD8(CUdeviceptr address, unsigned char value, size_t bytes)
{
    memset((void *)(uintptr_t)address, value, bytes);
    return CUDA_SUCCESS;
}
