// A driver of CUDA without a GPU: it keeps what it is asked to launch, as far as Triton's launchers ask it.

#include "cuda.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 64 };

typedef struct {
  int count;
  int sizes[MOST];
} Kernel;

static Kernel next_kernel;
static uint8_t *kept;
static size_t used, room;

static void keep(const void *bytes, size_t count) {
  if (used + count > room) {
    room = 2 * (used + count);
    kept = realloc(kept, room);
  }
  memcpy(kept + used, bytes, count);
  used += count;
}

// The bytes of each parameter of the kernel that is loaded next.
void fake_kernel(int count, const int *sizes) {
  next_kernel.count = count;
  memcpy(next_kernel.sizes, sizes, count * sizeof(int));
}

size_t fake_length(void) { return used; }

// What has been launched since the last call.
void fake_take(uint8_t *out) {
  memcpy(out, kept, used);
  used = 0;
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int i) { return *device = i, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuCtxGetLimit(size_t *size, CUlimit limit) { return *size = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t size) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult code, const char **text) { return *text = "refused", CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *out, CUpointer_attribute what, CUdeviceptr address) {
  return *(CUdeviceptr *)out = address, CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute what, CUdevice device) {
  return *value = what == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448 : 32, CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)1, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  Kernel *kernel = malloc(sizeof *kernel);
  *kernel = next_kernel;
  return *function = (CUfunction)kernel, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute what, CUfunction function) {
  return *value = what == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute what, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  return *count = 1, CUDA_SUCCESS;
}

// All that it is given, in the place of what a GPU reads tiles by.
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType dtype, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  uint64_t words[16] = {(uint64_t)address, dtype, rank, interleave, swizzle, promotion, fill};
  for (unsigned i = 0; i < rank && i < 2; i++) {
    words[7 + i] = sizes[i];
    words[9 + i] = box[i];
    words[11 + i] = steps[i];
    words[13 + i] = i + 1 < rank ? strides[i] : 0;
  }
  return memcpy(map, words, sizeof *map), CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *how, CUfunction function, void **parameters, void **others) {
  const Kernel *kernel = (const Kernel *)function;
  const uint64_t words[] = {(uint64_t)function, how->gridDimX,       how->gridDimY,           how->gridDimZ,
                            how->blockDimX,     how->blockDimY,      how->blockDimZ,          how->sharedMemBytes,
                            how->numAttrs,      (uint64_t)how->hStream, (uint64_t)kernel->count};
  keep(words, sizeof words);
  for (int i = 0; i < kernel->count; i++)
    keep(parameters[i], kernel->sizes[i]);
  return others ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
