// Choosing columns by score; and gathering all that belongs to the columns that stay, in one launch.
//
// Compiled at run time (NVRTC) without any header. Every block of `select_gather` counts for itself which columns of
// its sample stay (some thousand bytes, which come from the L2 cache) and then moves its share of the rows in accesses
// of up to 16 bytes, four in flight per thread.
//
// Order of scores: as unsigned keys, NaN above everything, -0 equal to 0, columns that are no candidates 0. Counts of a
// sample (kept, tied, real) travel packed in one 64-bit word, 21 bits each, so a sample has less than 2^21 columns.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define THREADS 256
#define WARPS (THREADS / 32)
#define ROWS 32  // most rows that a block moves
#define ONE_KEPT 1ull
#define ONE_TIED (1ull << 21)
#define ONE_REAL (1ull << 42)
#define FIELD(word, one) ((int)(((word) / (one)) & 0x1fffffull))

enum Kind { FLOAT32 = 1, FLOAT16 = 2, BFLOAT16 = 3 };

__device__ __forceinline__ u32 key_of(const void* scores, i64 at, int kind) {
  if (kind == FLOAT32) {
    u32 bits = ((const u32*)scores)[at];
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0xffffffffu;
    if (bits == 0x80000000u) bits = 0;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  u32 bits = ((const unsigned short*)scores)[at];
  if ((bits & 0x7fffu) > (kind == FLOAT16 ? 0x7c00u : 0x7f80u)) return 0xffffu;
  if (bits == 0x8000u) bits = 0;
  return bits & 0x8000u ? ~bits & 0xffffu : bits | 0x8000u;
}

// Sum of one word per thread over the block; every thread gets it.
__device__ __forceinline__ u64 block_sum(u64 value, u64* warp_sums) {
  for (int step = 16; step; step >>= 1) value += __shfl_down_sync(~0u, value, step);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) warp_sums[threadIdx.x >> 5] = value;
  __syncthreads();
  value = 0;
#pragma unroll
  for (int warp = 0; warp < WARPS; warp++) value += warp_sums[warp];
  return value;
}

// Sum of one word per thread over the threads before this one.
__device__ __forceinline__ u64 block_before(u64 value, u64* warp_sums) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  u64 sum = value;
  for (int step = 1; step < 32; step <<= 1) {
    const u64 other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  u64 before = sum - value;
#pragma unroll
  for (int other = 0; other < WARPS; other++)
    if (other < warp) before += warp_sums[other];
  return before;
}

struct Sample {
  const void* scores;
  const unsigned char* real;
  int kind, columns;

  __device__ __forceinline__ bool is_real(int column) const { return real[column]; }
  __device__ __forceinline__ u32 key(int column) const { return key_of(scores, column, kind); }
};

// The key that the last column to stay has, and how many of the columns with that very key stay, by radix selection:
// eight bits at a time from the top, a histogram of the keys that agree with what is known so far.
__device__ void threshold(const Sample& s, i64 wanted, u32* histogram, u64* warp_sums, u32* key, int* need) {
  __shared__ u32 shared_digit, shared_left;
  u64 mine = 0;
  for (int column = threadIdx.x; column < s.columns; column += THREADS) mine += s.is_real(column);
  const i64 candidates = (i64)block_sum(mine, warp_sums);
  u32 left = (u32)(wanted < 0 ? 0 : wanted < candidates ? wanted : candidates);
  *key = 0xffffffffu;
  *need = 0;
  if (left == 0) return;  // the same for every thread
  u32 prefix = 0;
  const int top = s.kind == FLOAT32 ? 24 : 8;
  for (int shift = top; shift >= 0; shift -= 8) {
    for (int digit = threadIdx.x; digit < 256; digit += THREADS) histogram[digit] = 0;
    __syncthreads();
    for (int column = threadIdx.x; column < s.columns; column += THREADS) {
      const u32 k = s.key(column);
      // shifting by 32 is undefined: the first round compares nothing
      if (s.is_real(column) && (shift == top || (k >> (shift + 8)) == prefix))
        atomicAdd(&histogram[(k >> shift) & 255u], 1u);
    }
    __syncthreads();
    // thread d holds digit 255 - d: the digit where the sum from the top reaches `left` is the next one
    const u32 count = histogram[255 - threadIdx.x];
    const u32 above = (u32)block_before(count, warp_sums);
    if (above < left && left <= above + count) {
      shared_digit = 255 - threadIdx.x;
      shared_left = left - above;
    }
    __syncthreads();
    prefix = prefix << 8 | shared_digit;
    left = shared_left;
    __syncthreads();
  }
  *key = prefix;
  *need = (int)left;
}

// One column's packed counts: kept for sure, tied with the last one to stay, real.
__device__ __forceinline__ u64 counts_of(const Sample& s, int column, u32 key) {
  if (!s.is_real(column)) return 0;
  const u32 mine = s.key(column);
  return ONE_REAL + (mine > key ? ONE_KEPT : mine == key ? ONE_TIED : 0);
}

__device__ __forceinline__ int kept_of(u64 counts, int need) {
  const int tied = FIELD(counts, ONE_TIED);
  return FIELD(counts, ONE_KEPT) + (tied < need ? tied : need);
}

// Every thread takes a run of columns of its own, so that counts before a column are those of the threads before plus
// those of the run so far.
__device__ __forceinline__ int run_length(int columns) { return (columns + THREADS - 1) / THREADS; }

extern "C" __global__ void __launch_bounds__(THREADS)
    top_k(const void* scores, const i64* counts, const unsigned char* candidates, unsigned char* out, int kind,
          int columns) {
  __shared__ u32 histogram[256];
  __shared__ u64 warp_sums[WARPS];
  const i64 first = (i64)blockIdx.x * columns;
  const int width = kind == FLOAT32 ? 4 : 2;
  const Sample s = {(const char*)scores + first * width, candidates + first, kind, columns};
  u32 key;
  int need;
  threshold(s, counts[blockIdx.x], histogram, warp_sums, &key, &need);
  const int run = run_length(columns), start = min((int)threadIdx.x * run, columns), end = min(start + run, columns);
  u64 mine = 0;
  for (int column = start; column < end; column++) mine += counts_of(s, column, key);
  u64 before = block_before(mine, warp_sums);
  for (int column = start; column < end; column++) {
    const u64 own = counts_of(s, column, key);
    out[first + column] = kept_of(before + own, need) > kept_of(before, need);
    before += own;
  }
}

template <typename Word>
__device__ __forceinline__ void copy_rows(const char* from, char* to, i64 step, i64 bytes, const int* source, int rows) {
  const u32 words = (u32)(bytes / sizeof(Word)), total = words * (u32)rows;
  Word* out = (Word*)to;
  u32 i = threadIdx.x;
  for (; i + 3 * THREADS < total; i += 4 * THREADS) {
    Word held[4];
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
      const u32 at = i + j * THREADS, row = at / words;
      held[j] = ((const Word*)(from + source[row] * step))[at - row * words];
    }
#pragma unroll
    for (u32 j = 0; j < 4; j++) out[i + j * THREADS] = held[j];
  }
  for (; i < total; i += THREADS) {
    const u32 row = i / words;
    out[i] = ((const Word*)(from + source[row] * step))[i - row * words];
  }
}

// `rows` rows of `bytes` bytes, next to each other at `to`, from rows `source[..]` that are `step` bytes apart.
__device__ __forceinline__ void copy_rows(const char* from, char* to, i64 step, int bytes, const int* source, int rows) {
  const u64 all = (u64)from | (u64)to | (u64)step | (u64)bytes;
  if (all % 16 == 0)
    copy_rows<uint4>(from, to, step, bytes, source, rows);
  else if (all % 4 == 0)
    copy_rows<u32>(from, to, step, bytes, source, rows);
  else
    copy_rows<unsigned short>(from, to, step, bytes, source, rows);
}

// The columns of a sample that are marked, and those that are real (null: all are).
struct Marks {
  const unsigned char *keep, *real;
  i64 keep_step, real_step;

  // One column's packed counts: kept, real.
  __device__ __forceinline__ u64 counts(int column) const {
    if (real && !real[column * real_step]) return 0;
    return ONE_REAL + (keep[column * keep_step] ? ONE_KEPT : 0);
  }
};

// Grid: (blocks per sample, batch). Steps are in elements for keep, real and ids, in bytes for rows.
extern "C" __global__ void __launch_bounds__(THREADS) select_gather(
    const unsigned char* keep, const unsigned char* real, const char* hidden, const i64* ids,
    const char* cos, const char* sin, char* hidden_out, i64* ids_out, char* cos_out, char* sin_out, i64* index_out,
    unsigned char* mask_out, i64* dropped_out, int columns, int length, int rows_per_block, int contiguous,
    int keep_sample, int keep_step, int real_sample, int real_step, int hidden_sample, int hidden_step,
    int hidden_bytes, int id_axes, int ids_axis, int ids_sample, int ids_step, int rotary_axes, int rotary_bytes,
    int cos_axis, int cos_sample, int cos_step, int sin_axis, int sin_sample, int sin_step) {
  __shared__ u64 warp_sums[WARPS];
  __shared__ int source[ROWS];
  __shared__ int gone[ROWS];  // real columns dropped up to the source, itself included
  const i64 sample = blockIdx.y, batch = gridDim.y;
  const Marks marks = {keep + sample * keep_sample, real ? real + sample * real_sample : real, keep_step, real_step};

  const int run = run_length(columns), start = min((int)threadIdx.x * run, columns), end = min(start + run, columns);
  u64 mine = 0;
  for (int column = start; column < end; column++) mine += marks.counts(column);
  const u64 all = block_sum(mine, warp_sums);
  u64 before = block_before(mine, warp_sums);
  const int kept = FIELD(all, ONE_KEPT), first = blockIdx.x * rows_per_block;
  const int rows = min(rows_per_block, length - first);
  for (int column = start; column < end; column++) {
    const u64 now = before + marks.counts(column);
    const int rank = FIELD(now, ONE_KEPT);
    // kept columns fill the right end in order, the last of the others the padding before them
    const int slot = (rank > FIELD(before, ONE_KEPT) ? length - kept + rank - 1 : column - rank - (columns - length)) - first;
    if (slot >= 0 && slot < rows) {
      source[slot] = column;
      gone[slot] = FIELD(now, ONE_REAL) - rank;
    }
    before = now;
  }
  __syncthreads();

  const i64 out = sample * length + first;
  for (int i = threadIdx.x; i < rows; i += THREADS) {
    index_out[out + i] = source[i];
    mask_out[out + i] = first + i >= length - kept;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) dropped_out[sample] = FIELD(all, ONE_REAL) - kept;
  for (int i = threadIdx.x; i < rows * id_axes; i += THREADS) {
    const int axis = i / rows, row = i - axis * rows;
    i64 id = ids[(i64)axis * ids_axis + sample * ids_sample + (i64)source[row] * ids_step];
    if (contiguous) {
      id -= gone[row];
      id = id < 0 ? 0 : id;
    }
    ids_out[axis * batch * length + out + row] = id;
  }
  copy_rows(hidden + sample * hidden_sample, hidden_out + out * hidden_bytes, hidden_step, hidden_bytes, source, rows);
  if (rotary_bytes == 0) return;
  for (int axis = 0; axis < rotary_axes; axis++) {
    const i64 to = (axis * batch * length + out) * rotary_bytes;
    copy_rows(cos + (i64)axis * cos_axis + sample * cos_sample, cos_out + to, cos_step, rotary_bytes, source, rows);
    copy_rows(sin + (i64)axis * sin_axis + sample * sin_sample, sin_out + to, sin_step, rotary_bytes, source, rows);
  }
}
