/* Stands in for libcudart in tests: memory is that of the host, a stream is
 * busy until a deadline. Wrong sizes, foreign addresses and a wrong order of
 * calls are answered by error 1, as the real library answers bad values. A
 * stream that is captured records copies and the engine's calls; a launch does
 * them. FAKE_LOG names a file for what really happened: end and length in s of
 * every inference, from its first copy to the end of its synchronisation.
 * FAKE_CUDA_OLD takes away what CUDA 11.4 brought. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MOST 256
#define FIRST 0x57
typedef struct { char *p; size_t size; int device, state; } Block;
typedef void (*Call)(void *stream);
typedef struct { Call call; void *to; const void *from; size_t n; int kind; } Step;
typedef struct { Step steps[64]; int count; } Graph;
typedef struct { int used; double busy_until; Graph *graph; } Stream;
enum { EMPTY, WRITTEN, COMPUTED };
static Block blocks[MOST];
static Stream all[MOST];
static double begun;
static int streams, graphs;
static FILE *record;

static double clock_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}
static Stream *stream_of(void *s) {
  long i = (long)s - FIRST;
  return i >= 0 && i < MOST && all[i].used ? &all[i] : NULL;
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
int cudaStreamCreate(void **s) {
  for (long i = 0; i < MOST; i++)
    if (!all[i].used) {
      all[i] = (Stream){1, 0, NULL};
      streams++;
      *s = (void *)(FIRST + i);
      return 0;
    }
  return 2;
}
int cudaStreamDestroy(void *s) {
  if (!stream_of(s)) return 1;
  stream_of(s)->used = 0;
  streams--;
  return 0;
}
int cudaRuntimeGetVersion(int *v) { *v = 10020; return 0; }
const char *cudaGetErrorString(int e) {
  return e == 1 ? "invalid argument" : "stand-in error";
}
static int copy(Step *c) {
  Block *device = find(c->kind == 1 ? c->to : c->from);
  if (!device || !device->device || device->size != c->n) return 1;
  if (c->kind == 2 && device->state != COMPUTED) return 1;
  if (c->kind == 1) {
    device->state = WRITTEN;
    if (!begun) begun = clock_s();
  }
  memcpy(c->to, c->from, c->n);
  return 0;
}
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *s) {
  Stream *stream = stream_of(s);
  Step step = {NULL, to, from, n, kind};
  if (!stream || (kind != 1 && kind != 2)) return 1;
  if (!stream->graph) return copy(&step);
  stream->graph->steps[stream->graph->count++] = step;
  return 0;
}
int cudaStreamSynchronize(void *s) {
  Stream *stream = stream_of(s);
  if (!stream || stream->graph) return 1;
  while (clock_s() < stream->busy_until) {}
  for (int i = 0; i < MOST; i++) blocks[i].state = EMPTY;
  if (!record && getenv("FAKE_LOG")) record = fopen(getenv("FAKE_LOG"), "w");
  if (record) fprintf(record, "%.6f %.6f\n", clock_s(), clock_s() - begun);
  begun = 0;
  return 0;
}
int cudaStreamBeginCapture(void *s, int mode) {
  Stream *stream = stream_of(s);
  if (!stream || stream->graph || mode < 0 || mode > 2) return 1;
  stream->graph = calloc(1, sizeof(Graph));
  return 0;
}
int cudaStreamEndCapture(void *s, void **graph) {
  Stream *stream = stream_of(s);
  if (!stream || !stream->graph) return 1;
  *graph = stream->graph;
  stream->graph = NULL;
  graphs++;
  return 0;
}
static int instantiate(void **ready, void *graph) {
  if (!graph) return 1;
  *ready = graph;
  graphs++;
  return 0;
}
int cudaGraphInstantiate(void **ready, void *graph, void *node, char *log,
                         size_t size) {
  return node || log || size ? 1 : instantiate(ready, graph);
}
#ifndef FAKE_CUDA_OLD
int cudaGraphInstantiateWithFlags(void **ready, void *graph,
                                  unsigned long long flags) {
  return flags ? 1 : instantiate(ready, graph);
}
#endif
int cudaGraphLaunch(void *ready, void *s) {
  Graph *graph = ready;
  if (!stream_of(s) || stream_of(s)->graph || !graph) return 1;
  for (int i = 0; i < graph->count; i++) {
    if (graph->steps[i].call) graph->steps[i].call(s);
    else if (copy(&graph->steps[i])) return 1;
  }
  return 0;
}
int cudaGraphExecDestroy(void *ready) { graphs--; return !ready; }
int cudaGraphDestroy(void *graph) {
  if (!graph) return 1;
  graphs--;
  free(graph);
  return 0;
}
/* For the stand-in of TensorRT. */
long fake_size(void *p) { Block *b = find(p); return b && b->device ? (long)b->size : -1; }
int fake_written(void *p) { Block *b = find(p); return b && b->state == WRITTEN; }
void fake_computed(void *p) { find(p)->state = COMPUTED; }
int fake_stream(void *s) { return stream_of(s) != NULL; }
void fake_busy(void *s, double seconds) {
  stream_of(s)->busy_until = clock_s() + seconds;
}
/* Returns 1 if the call was recorded instead of being made. */
int fake_record(void *s, Call call) {
  Graph *graph = stream_of(s)->graph;
  if (!graph) return 0;
  graph->steps[graph->count++] = (Step){call, NULL, NULL, 0, 0};
  return 1;
}
int fake_live(void) {
  int n = streams + graphs;
  for (int i = 0; i < MOST; i++) n += blocks[i].p != NULL;
  return n;
}
