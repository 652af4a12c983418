// Choosing columns by score and gathering all that belongs to them, in one launch; the choosing alone (`top_k`); and, for
// sequences that are too long for every block to choose anew, the choosing before the gathering (`choose`).
//
// Includes no header. `scripts/build_ptx.py` compiles this file to select_gather.ptx, which the driver loads.
//
// Every block of `select_gather` works out for itself which columns of its sample stay (some thousand bytes, which come
// from the L2 cache) and then moves its share of the rows in accesses of up to 16 bytes, four in flight per thread.
//
// Order of scores: as unsigned keys, NaN above everything, -0 equal to 0, columns that are no candidates 0. With a kind
// of 0 the scores are bool and mark what stays. Counts of a sample (kept, tied, real) travel packed in one 64-bit word,
// 21 bits each, so a sample has less than 2^21 columns.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define MOST_THREADS 1024  // of a block that chooses, a multiple of 32 and at least 256
#define MOVERS 256  // threads of a block that moves rows
#define ROWS 32  // most rows that such a block moves
#define ONE_KEPT 1ull
#define ONE_TIED (1ull << 21)
#define ONE_REAL (1ull << 42)
#define FIELD(word, one) ((int)(((word) / (one)) & 0x1fffffull))

enum Kind { BOOL = 0, FLOAT32 = 1, FLOAT16 = 2, BFLOAT16 = 3 };

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

// Sums of one word per thread, one after the other: over the warps before this one, over the block; every thread gets
// both.
struct Sums {
  u64 before, all;
};
__device__ __forceinline__ Sums sum_warps(u64 value, u64* warp_sums) {
  for (int step = 16; step; step >>= 1) value += __shfl_down_sync(~0u, value, step);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) warp_sums[threadIdx.x >> 5] = value;
  __syncthreads();
  Sums sums = {0, 0};
#pragma unroll 1  // unrolled, loops of the choosing cost registers that 1024 threads do not have
  for (int warp = 0; warp < blockDim.x >> 5; warp++) {
    sums.before += warp < threadIdx.x >> 5 ? warp_sums[warp] : 0;
    sums.all += warp_sums[warp];
  }
  return sums;
}

// Sum of one number per thread over the threads of the warp before this one.
__device__ __forceinline__ u32 sum_lanes_before(u32 value) {
  u32 sum = value;
  for (int step = 1; step < 32; step <<= 1) {
    const u32 other = __shfl_up_sync(~0u, sum, step);
    if ((threadIdx.x & 31) >= step) sum += other;
  }
  return sum - value;
}

struct Sample {
  const void* scores;
  const unsigned char* real;  // null: all are
  i64 score_step, real_step;
  int kind, columns;

  __device__ __forceinline__ bool is_real(int column) const { return !real || real[column * real_step]; }
  __device__ __forceinline__ u32 key(int column) const { return key_of(scores, column * score_step, kind); }
};

// The key that the last column to stay has, and how many of the columns with that very key stay, by radix selection:
// eight bits at a time from the top, a histogram of the keys that agree with what is known so far.
__device__ void threshold(const Sample& s, i64 wanted, u64* warp_sums, u32* key, int* need) {
  __shared__ u32 histogram[256];
  __shared__ u32 shared_digit, shared_left;
  u64 mine = 0;
  for (int column = threadIdx.x; column < s.columns; column += blockDim.x) mine += s.is_real(column);
  const i64 candidates = (i64)sum_warps(mine, warp_sums).all;
  u32 left = (u32)(wanted < 0 ? 0 : wanted < candidates ? wanted : candidates);
  *key = 0xffffffffu;
  *need = 0;
  if (left == 0) return;  // the same for every thread
  u32 prefix = 0;
  const int top = s.kind == FLOAT32 ? 24 : 8;
#pragma unroll 1
  for (int shift = top; shift >= 0; shift -= 8) {
    if (threadIdx.x < 256) histogram[threadIdx.x] = 0;
    __syncthreads();
    for (int column = threadIdx.x; column < s.columns; column += blockDim.x) {
      const u32 k = s.key(column);
      // shifting by 32 is undefined: the first round compares nothing
      if (s.is_real(column) && (shift == top || (k >> (shift + 8)) == prefix))
        atomicAdd(&histogram[(k >> shift) & 255u], 1u);
    }
    __syncthreads();
    // thread d holds digit 255 - d: the digit where the sum from the top reaches `left` is the next one
    const u32 count = threadIdx.x < 256 ? histogram[255 - threadIdx.x] : 0;
    const u32 above = (u32)sum_warps(count, warp_sums).before + sum_lanes_before(count);
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
  if (s.kind == BOOL) return ONE_REAL + (((const unsigned char*)s.scores)[column * s.score_step] ? ONE_KEPT : 0);
  const u32 mine = s.key(column);
  return ONE_REAL + (mine > key ? ONE_KEPT : mine == key ? ONE_TIED : 0);
}

__device__ __forceinline__ int kept_of(u64 counts, int need) {
  const int tied = FIELD(counts, ONE_TIED);
  return FIELD(counts, ONE_KEPT) + (tied < need ? tied : need);
}

// Calls `each(column, stays, rank, kept, reals)` for every column: whether it stays, how many that stay there are up to
// and including it, how many there are in all, and how many real ones up to and including it. Every warp takes a run of
// columns of its own, 32 next to each other at a time. Returns the sample's packed counts.
template <typename Each>
__device__ __forceinline__ u64 rank_columns(const Sample& s, u32 key, int need, u64* warp_sums, Each each) {
  // as many rounds for every warp, so that all threads meet every shuffle
  const int lane = threadIdx.x & 31, run = (s.columns + blockDim.x - 1) / blockDim.x * 32;
  const int start = (threadIdx.x >> 5) * run + lane;
  u64 mine = 0;
#pragma unroll 1
  for (int i = 0; i < run; i += 32) mine += start + i < s.columns ? counts_of(s, start + i, key) : 0;
  const Sums sums = sum_warps(mine, warp_sums);
  const int kept = kept_of(sums.all, need);
  const u32 up_to = (2u << lane) - 1;
  u64 before = sums.before;
#pragma unroll 1
  for (int i = 0; i < run; i += 32) {
    const int column = start + i;
    const u64 own = column < s.columns ? counts_of(s, column, key) : 0;
    const u32 sure = __ballot_sync(~0u, FIELD(own, ONE_KEPT)), tied = __ballot_sync(~0u, FIELD(own, ONE_TIED));
    const u32 real = __ballot_sync(~0u, FIELD(own, ONE_REAL));
    const u64 now = before + __popc(sure & up_to) * ONE_KEPT + __popc(tied & up_to) * ONE_TIED +
                    __popc(real & up_to) * ONE_REAL;
    const int rank = kept_of(now, need);
    if (column < s.columns) each(column, rank > kept_of(now - own, need), rank, kept, FIELD(now, ONE_REAL));
    before += __popc(sure) * ONE_KEPT + __popc(tied) * ONE_TIED + __popc(real) * ONE_REAL;
  }
  return sums.all;
}

// Grid: rows.
extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    top_k(const void* scores, const i64* counts, const unsigned char* candidates, unsigned char* out, int kind,
          int columns) {
  __shared__ u64 warp_sums[MOST_THREADS / 32];
  const i64 first = (i64)blockIdx.x * columns;
  const int width = kind == FLOAT32 ? 4 : 2;
  const Sample s = {(const char*)scores + first * width, candidates + first, 1, 1, kind, columns};
  u32 key;
  int need;
  threshold(s, counts[blockIdx.x], warp_sums, &key, &need);
  rank_columns(s, key, need, warp_sums,
               [&](int column, bool stays, int, int, int) { out[first + column] = stays; });
}

// Calls `write(slot, column, gone)` for every column that lands in one of `length` slots: kept columns fill the right end
// in order, the last of the others the padding before them. `gone`: real columns dropped up to this one, itself included.
template <typename Write>
__device__ __forceinline__ u64 place_columns(const Sample& s, const i64* counts, int length, u64* warp_sums, int* kept,
                                             Write write) {
  u32 key = 0;
  int need = 0;
  if (s.kind != BOOL) threshold(s, *counts, warp_sums, &key, &need);
  const u64 all = rank_columns(s, key, need, warp_sums, [&](int column, bool stays, int rank, int kept, int reals) {
    write(stays ? length - kept + rank - 1 : column - rank - (s.columns - length), column, reals - rank);
  });
  *kept = kept_of(all, need);
  return all;
}

__device__ __forceinline__ Sample sample_of(const void* scores, const unsigned char* real, i64 sample, int kind,
                                            int columns, int score_sample, int score_step, int real_sample,
                                            int real_step) {
  const int width = kind == FLOAT32 ? 4 : kind == BOOL ? 1 : 2;
  return {(const char*)scores + sample * score_sample * width, real ? real + sample * real_sample : real, score_step,
          real_step, kind, columns};
}

// Grid: (1, batch). Writes what `select_gather` finds out for itself if it is not told.
extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    choose(const void* scores, const i64* counts, const unsigned char* real, int* gone_out, i64* index_out,
           unsigned char* mask_out, i64* dropped_out, int kind, int columns, int length, int score_sample,
           int score_step, int real_sample, int real_step) {
  __shared__ u64 warp_sums[MOST_THREADS / 32];
  const i64 sample = blockIdx.y, out = sample * length;
  const Sample s = sample_of(scores, real, sample, kind, columns, score_sample, score_step, real_sample, real_step);
  int kept;
  const u64 all = place_columns(s, counts ? counts + sample : counts, length, warp_sums, &kept, [&](int slot, int column, int gone) {
    if (slot < 0) return;
    index_out[out + slot] = column;
    gone_out[out + slot] = gone;
  });
  for (int i = threadIdx.x; i < length; i += blockDim.x) mask_out[out + i] = i >= length - kept;
  if (threadIdx.x == 0) dropped_out[sample] = FIELD(all, ONE_REAL) - kept;
}

template <typename Word>
__device__ __forceinline__ void copy_rows(const char* from, char* to, i64 step, i64 bytes, const int* source, int rows) {
  const u32 words = (u32)(bytes / sizeof(Word)), total = words * (u32)rows;
  Word* out = (Word*)to;
  u32 i = threadIdx.x;
  for (; i + 3 * MOVERS < total; i += 4 * MOVERS) {
    Word held[4];
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
      const u32 at = i + j * MOVERS, row = at / words;
      held[j] = ((const Word*)(from + source[row] * step))[at - row * words];
    }
#pragma unroll
    for (u32 j = 0; j < 4; j++) out[i + j * MOVERS] = held[j];
  }
  for (; i < total; i += MOVERS) {
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

// Grid: (blocks per sample, batch). Steps are in elements for scores, real and ids, in bytes for rows. With `chosen_gone`
// (batch, length), `choose` has run: index, mask and dropped are there.
extern "C" __global__ void __launch_bounds__(MOVERS, 4) select_gather(
    const void* scores, const i64* counts, const unsigned char* real, const int* chosen_gone, const char* hidden,
    const i64* ids, const char* cos, const char* sin, char* hidden_out, i64* ids_out, char* cos_out, char* sin_out,
    i64* index_out, unsigned char* mask_out, i64* dropped_out, int kind, int columns, int length, int score_sample,
    int score_step, int real_sample, int real_step, int rows_per_block, int contiguous, int hidden_sample,
    int hidden_step, int hidden_bytes, int id_axes, int ids_axis, int ids_sample, int ids_step, int rotary_axes,
    int rotary_bytes, int cos_axis, int cos_sample, int cos_step, int sin_axis, int sin_sample, int sin_step) {
  __shared__ u64 warp_sums[MOVERS / 32];
  __shared__ int source[ROWS];
  __shared__ int gone[ROWS];
  const i64 sample = blockIdx.y, batch = gridDim.y;
  const int first = blockIdx.x * rows_per_block, rows = min(rows_per_block, length - first);
  const i64 out = sample * length + first;
  if (chosen_gone) {
    for (int i = threadIdx.x; i < rows; i += blockDim.x) {
      source[i] = (int)index_out[out + i];
      gone[i] = chosen_gone[out + i];
    }
    __syncthreads();
  } else {
    const Sample s = sample_of(scores, real, sample, kind, columns, score_sample, score_step, real_sample, real_step);
    int kept;
    const u64 all = place_columns(s, counts ? counts + sample : counts, length, warp_sums, &kept, [&](int slot, int column, int dropped) {
      if (slot < first || slot >= first + rows) return;
      source[slot - first] = column;
      gone[slot - first] = dropped;
    });
    __syncthreads();
    for (int i = threadIdx.x; i < rows; i += blockDim.x) {
      index_out[out + i] = source[i];
      mask_out[out + i] = first + i >= length - kept;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) dropped_out[sample] = FIELD(all, ONE_REAL) - kept;
  }
  for (int i = threadIdx.x; i < rows * id_axes; i += blockDim.x) {
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
