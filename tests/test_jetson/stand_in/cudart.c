/* Stands in for libcudart in tests: memory is that of the host, a stream is
 * busy until a deadline. Wrong sizes, foreign addresses and a wrong order of
 * calls are answered by error 1, as the real library answers bad values.
 * FAKE_LOG names a file for what really happened: end and length in s of every
 * inference, from its first copy to the end of its synchronisation. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MOST 256
typedef struct { char *p; size_t size; int device, state; } Block;
enum { EMPTY, WRITTEN, COMPUTED };
static Block blocks[MOST];
static double busy_until, begun;
static int streams;
static FILE *record;

static double clock_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}
static Block *find(const void *p) {
  for (int i = 0; i < MOST; i++)
    if (blocks[i].p && blocks[i].p == p) return &blocks[i];
  return NULL;
}
static int add(void **p, size_t size, int device) {
  for (int i = 0; i < MOST; i++)
    if (!blocks[i].p) {
      blocks[i] = (Block){calloc(1, size), size, device, EMPTY};
      *p = blocks[i].p;
      return 0;
    }
  return 2;
}
static int drop(void *p, int device) {
  Block *b = find(p);
  if (!b || b->device != device) return 1;
  free(b->p);
  b->p = NULL;
  return 0;
}
int cudaMalloc(void **p, size_t n) { return add(p, n, 1); }
int cudaMallocHost(void **p, size_t n) { return add(p, n, 0); }
int cudaFree(void *p) { return drop(p, 1); }
int cudaFreeHost(void *p) { return drop(p, 0); }
int cudaStreamCreate(void **s) { streams++; *s = (void *)0x57; return 0; }
int cudaStreamDestroy(void *s) { streams--; return s != (void *)0x57; }
int cudaRuntimeGetVersion(int *v) { *v = 10020; return 0; }
const char *cudaGetErrorString(int e) {
  return e == 1 ? "invalid argument" : "stand-in error";
}
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *s) {
  Block *device = find(kind == 1 ? to : from);
  if (s != (void *)0x57 || (kind != 1 && kind != 2)) return 1;
  if (!device || !device->device || device->size != n) return 1;
  if (kind == 2 && device->state != COMPUTED) return 1;
  if (kind == 1) {
    device->state = WRITTEN;
    if (!begun) begun = clock_s();
  }
  memcpy(to, from, n);
  return 0;
}
int cudaStreamSynchronize(void *s) {
  if (s != (void *)0x57) return 1;
  while (clock_s() < busy_until) {}
  for (int i = 0; i < MOST; i++) blocks[i].state = EMPTY;
  if (!record && getenv("FAKE_LOG")) record = fopen(getenv("FAKE_LOG"), "w");
  if (record) fprintf(record, "%.6f %.6f\n", clock_s(), clock_s() - begun);
  begun = 0;
  return 0;
}
/* For the stand-in of TensorRT. */
long fake_size(void *p) { Block *b = find(p); return b && b->device ? (long)b->size : -1; }
int fake_written(void *p) { Block *b = find(p); return b && b->state == WRITTEN; }
void fake_computed(void *p) { find(p)->state = COMPUTED; }
void fake_busy(double seconds) { busy_until = clock_s() + seconds; }
int fake_live(void) {
  int n = streams;
  for (int i = 0; i < MOST; i++) n += blocks[i].p != NULL;
  return n;
}
