/* The part of libcuda that Triton's loader and launcher call, doing nothing: a launch is checked and counted.
   Every pointer is taken for a device pointer, so that CPU tensors go through the launcher as a GPU's would. */
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1 };
enum { MAX_SHARED = 8, WARP = 10, REGISTERS = 12, CLOCK = 13, PROCESSORS = 16, MEMORY_CLOCK = 36, BUS = 37,
       MAX_SHARED_OPTIN = 97 };

typedef struct {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
  void *stream, *attributes;
  unsigned count;
} Launch;

static long launches, bad_launches;
static int (*execute)(const Launch *, void *, void **); /* the emulator's */

static int setting(const char *name, int fallback) {
  const char *text = getenv(name);
  return text ? atoi(text) : fallback;
}

long dry_run_launches(void) { return launches; }
long dry_run_bad_launches(void) { return bad_launches; }
void dry_run_execute_with(int (*executor)(const Launch *, void *, void **)) { execute = executor; }

int cuGetErrorString(int error, const char **text) {
  *text = error == SUCCESS ? "no error" : "refused by the dry run's libcuda";
  return SUCCESS;
}
int cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return SUCCESS; }
int cuCtxSetCurrent(void *context) { (void)context; return SUCCESS; }
int cuCtxGetLimit(size_t *value, int limit) { (void)limit; *value = 1 << 20; return SUCCESS; }
int cuCtxSetLimit(int limit, size_t value) { (void)limit; (void)value; return SUCCESS; }
int cuCtxGetDevice(int *device) { *device = 0; return SUCCESS; }
int cuStreamIsCapturing(void *stream, int *status) { (void)stream; *status = 0; return SUCCESS; }
int cuModuleUnload(void *module) { (void)module; return SUCCESS; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return SUCCESS; }
int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = (void *)1; return SUCCESS; }

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  switch (attribute) {
  case MAX_SHARED: *value = 49152; break;
  case WARP: *value = 32; break;
  case REGISTERS: *value = 65536; break;
  case PROCESSORS: *value = setting("DRY_RUN_PROCESSORS", 132); break;
  case MAX_SHARED_OPTIN: *value = setting("DRY_RUN_SHARED", 101376); break;
  default: *value = 1000; /* clocks and bus width: not used for anything but roofline figures */
  }
  return SUCCESS;
}

int cuModuleLoadData(void **module, const void *image) {
  *module = (void *)1;
  return image ? SUCCESS : INVALID_VALUE;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
  (void)module;
  *function = strdup(name);
  return SUCCESS;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  (void)function;
  *value = attribute == 0 ? 1024 : 0; /* threads a block; no static shared or local memory */
  return SUCCESS;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
  (void)function; (void)attribute; (void)value;
  return SUCCESS;
}
int cuFuncSetCacheConfig(void *function, int config) { (void)function; (void)config; return SUCCESS; }
int cuOccupancyMaxActiveClusters(int *count, void *function, const void *launch) {
  (void)function; (void)launch;
  *count = 1;
  return SUCCESS;
}
int cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) {
  (void)attribute;
  *(unsigned long long *)data = pointer;
  return SUCCESS;
}
/* What the emulator reads in the place of a tensor map of 128 bytes. */
typedef struct {
  void *address;
  unsigned long long dims[2], stride;
  unsigned box[2], type, swizzle;
} Map;

int cuTensorMapEncodeTiled(Map *map, unsigned type, unsigned rank, void *address, const unsigned long long *dims,
                           const unsigned long long *strides, const unsigned *box, const unsigned *steps,
                           unsigned interleave, unsigned swizzle, unsigned promotion, unsigned fill) {
  static const unsigned widths[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2}, lines[] = {0, 32, 64, 128};
  (void)promotion;
  if (rank != 2 || steps[0] != 1 || steps[1] != 1 || fill || interleave || type > 9 || swizzle > 3) return INVALID_VALUE;
  unsigned row = box[0] * widths[type];
  if ((unsigned long long)address % 16 || strides[0] % 16 || row % 16 || box[0] > 256 || box[1] > 256 ||
      (swizzle && row > lines[swizzle])) return INVALID_VALUE;
  *map = (Map){address, {dims[0], dims[1]}, strides[0], {box[0], box[1]}, type, swizzle};
  return SUCCESS;
}
int cuTensorMapEncodeIm2col(void) { return SUCCESS; }

int cuLaunchKernelEx(const Launch *launch, void *function, void **parameters, void **extra) {
  (void)extra;
  launches++;
  if (!function || !parameters || !launch->grid_x || launch->grid_x > 0x7fffffffu || launch->grid_y > 65535 ||
      launch->grid_z > 65535 || launch->block_x > 1024 || launch->shared > (unsigned)setting("DRY_RUN_SHARED", 101376)) {
    bad_launches++;
    return INVALID_VALUE;
  }
  return execute ? execute(launch, function, parameters) : SUCCESS;
}
