/* Stands in for libnvidia-ml in tests: one card that draws 75 W. FAKE_NVML_OLD
 * takes away the energy counter, as on cards before Volta. */
#include <stdlib.h>
#include <time.h>

int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **handle) {
  *handle = (void *)0x1d;
  return i == 0 ? 0 : 2;
}
int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *mj) {
  struct timespec t;
  if (handle != (void *)0x1d || getenv("FAKE_NVML_OLD")) return 3;
  clock_gettime(CLOCK_MONOTONIC, &t);
  *mj = (t.tv_sec + t.tv_nsec * 1e-9) * 75000;
  return 0;
}
int nvmlDeviceGetPowerUsage(void *handle, unsigned *mw) {
  *mw = 75000;
  return handle == (void *)0x1d ? 0 : 2;
}
const char *nvmlErrorString(int e) {
  return e == 3 ? "Not Supported" : "Invalid Argument";
}
