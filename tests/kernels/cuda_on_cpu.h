// Runs a CUDA kernel on a CPU, so that its arithmetic and indexing are tested without a GPU. The threads of a block are
// fibers that run one after the other from one barrier to the next, and every shuffle is two barriers; it therefore needs
// kernels in which all threads of a block meet the same barriers and shuffles. A missing barrier does not show here.
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
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
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  unsigned barriers = 0;
  bool done = false;
};
static ucontext_t home;
static std::vector<Fiber> all;
static void (*entry)(void**);
static void** arguments;
static uint64_t slot[1024];

static void body() {
  entry(arguments);
  all[threadIdx.x].done = true;
}
static void barrier() {
  unsigned me = threadIdx.x;
  all[me].barriers++;
  swapcontext(&all[me].context, &home);
}
static void block() {
  for (auto& fiber : all) {
    fiber.barriers = 0;
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &home;
    makecontext(&fiber.context, body, 0);
  }
  for (bool running = true; running;) {
    for (unsigned i = 0; i < all.size(); i++) {
      threadIdx.x = i;
      swapcontext(&home, &all[i].context);
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
template <auto kernel, typename... A, size_t... I>
void call(void** args, void (*)(A...), std::index_sequence<I...>) {
  kernel(*(A*)args[I]...);
}
template <auto kernel, typename... A>
void unpack(void** args, void (*type)(A...)) {
  call<kernel>(args, type, std::index_sequence_for<A...>{});
}
template <auto kernel>
void start(void** args) {
  unpack<kernel>(args, kernel);
}
static void launch(void (*kernel)(void**), unsigned x, unsigned y, unsigned threads, void** args) {
  all.resize(threads);
  entry = kernel, arguments = args, gridDim = {x, y, 1}, blockDim = {threads, 1, 1};
  for (unsigned j = 0; j < y; j++)
    for (unsigned i = 0; i < x; i++) {
      blockIdx = {i, j, 0};
      block();
    }
}
}  // namespace fibers

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
