// Runs CUDA kernels on a CPU, so that their arithmetic and indexing are tested without a GPU, behind the entry points of
// the CUDA driver that vlmprune calls. The threads of a block are fibers that run one after the other from one barrier
// to the next, and every shuffle is two barriers; it therefore needs kernels in which all threads of a block meet the
// same barriers and shuffles. A missing barrier does not show here.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

using std::min;

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fibers {
struct Fiber {
  ucontext_t context;  // only enters; what switches is setjmp, which makes no system call
  jmp_buf place;
  std::vector<char> stack = std::vector<char>(1 << 15);
  unsigned barriers = 0;
  bool begun = false, done = false;
};
static jmp_buf home;
static std::vector<Fiber> all;
static void (*entry)(char*);
static char* arguments;
static uint64_t slot[1024];

static void body() {
  entry(arguments);
  all[threadIdx.x].done = true;
  _longjmp(home, 1);
}
static void barrier() {
  Fiber& me = all[threadIdx.x];
  me.barriers++;
  if (_setjmp(me.place) == 0) _longjmp(home, 1);
}
static void resume(Fiber& fiber) {
  if (_setjmp(home)) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}
static void block() {
  for (auto& fiber : all) {
    fiber.barriers = 0;
    fiber.begun = fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, body, 0);
  }
  for (bool running = true; running;) {
    for (unsigned i = 0; i < all.size(); i++) {
      threadIdx.x = i;
      resume(all[i]);
    }
    running = !all[0].done;
    for (auto& fiber : all)
      if (fiber.done == running || fiber.barriers != all[0].barriers) {
        fprintf(stderr, "the threads of a block met different barriers\n");
        abort();
      }
  }
}
template <typename T>
T shuffle(T value, unsigned from) {
  unsigned me = threadIdx.x;
  slot[me] = value;
  barrier();
  T got = slot[from];
  barrier();
  return got;
}
// What the driver does with a parameter buffer: every argument at the next multiple of its size.
template <typename T>
T next(char*& at) {
  at = (char*)(((uintptr_t)at + sizeof(T) - 1) / sizeof(T) * sizeof(T));
  T value;
  memcpy(&value, at, sizeof(T));
  at += sizeof(T);
  return value;
}
template <auto kernel, typename... A>
void unpack(char* at, void (*)(A...)) {
  std::tuple<A...> values{next<A>(at)...};  // braces evaluate in order
  std::apply(kernel, values);
}
template <auto kernel>
void start(char* at) {
  unpack<kernel>(at, kernel);
}
template <typename... A>
size_t bytes_of(void (*)(A...)) {
  size_t at = 0;
  ((at = (at + sizeof(A) - 1) / sizeof(A) * sizeof(A) + sizeof(A)), ...);
  return at;
}
struct Kernel {
  void (*start)(char*);
  size_t bytes;
};
static std::map<std::string, Kernel> kernels;
template <auto kernel>
bool add(const char* name) {
  kernels[name] = {start<kernel>, bytes_of(kernel)};
  return true;
}
static void launch(const Kernel& kernel, unsigned x, unsigned y, unsigned threads, char* buffer) {
  all.resize(threads);
  entry = kernel.start, arguments = buffer, gridDim = {x, y, 1}, blockDim = {threads, 1, 1};
  for (unsigned j = 0; j < y; j++)
    for (unsigned i = 0; i < x; i++) {
      blockIdx = {i, j, 0};
      block();
    }
}
}  // namespace fibers

// The driver's entry points, strict about what they are given. `loads` counts modules, `fails` makes a load fail.
extern "C" {
int loads = 0, fails = 0;
int cuInit(unsigned) { return 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)(intptr_t)(device + 1000), 0; }
static void* current = nullptr;
int cuCtxSetCurrent(void* context) { return current = context, 0; }
int cuGetErrorString(int, const char** text) { return *text = "the fake driver says no", 0; }
int cuModuleLoadData(void** module, const char* image) {
  loads++;
  if (fails || !current || !strstr(image, ".target sm_75") || image[strlen(image) - 1] != '\n') return 218;
  return *module = (void*)image, 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  auto found = fibers::kernels.find(name);
  if (!module || found == fibers::kernels.end()) return 500;
  return *function = (void*)&found->second, 0;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                   unsigned threads_z, unsigned shared, void* stream, void** each, void** extra) {
  const auto& kernel = *(fibers::Kernel*)function;
  if (!current || z != 1 || threads_y != 1 || threads_z != 1 || shared || each || threads > 1024 || !x || !y) return 1;
  if (extra[0] != (void*)1 || extra[2] != (void*)2 || extra[4] || *(size_t*)extra[3] != kernel.bytes) return 1;
  std::vector<char> copy((char*)extra[1], (char*)extra[1] + kernel.bytes);
  fibers::launch(kernel, x, y, threads, copy.data());
  return 0;
}
}

static void __syncthreads() { fibers::barrier(); }
template <typename T>
T __shfl_down_sync(unsigned, T value, int step) {
  unsigned to = (threadIdx.x & 31) + step;
  return fibers::shuffle(value, to < 32 ? threadIdx.x + step : threadIdx.x);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int step) {
  return fibers::shuffle(value, (threadIdx.x & 31) >= (unsigned)step ? threadIdx.x - step : threadIdx.x);
}
static unsigned atomicAdd(unsigned* at, unsigned value) {
  unsigned before = *at;
  *at += value;
  return before;
}
static unsigned __popc(unsigned bits) { return __builtin_popcount(bits); }
static unsigned __ballot_sync(unsigned, unsigned predicate) {
  fibers::slot[threadIdx.x] = predicate != 0;
  fibers::barrier();
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; lane++) bits |= (unsigned)fibers::slot[(threadIdx.x & ~31u) + lane] << lane;
  fibers::barrier();
  return bits;
}
