// The words that the kernel bodies use, in Metal.
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#include <metal_stdlib>
using namespace metal;

#define FN inline
#define IN(T) const device T*
#define OUT(T) device T*
#define SHARED(T) threadgroup T*
#define SHARED_ARRAY threadgroup
#define LOCAL thread
#define UNROLL _Pragma("clang loop unroll(full)")
#define UNROLL_8 _Pragma("clang loop unroll_count(8)")
#define LOOP _Pragma("clang loop unroll(disable)")

#define SHARED_MEMORY(name, words) threadgroup word name[words]

#define CONST static constant constexpr const

typedef uint word;
typedef uchar byte;
typedef half half_t;

// Matrix fragments: two neighbouring columns of one row of an 8 x 8 tile in every lane, placed as
// MLX's own attention kernels rely on (mlx/backend/metal/kernels/steel/attn/mma.h).
CONST bool RIGHT_BY_COLUMNS = false;
FN int fragment_row(int lane) { return ((lane >> 2) & 4) + ((lane >> 1) & 3); }
FN int fragment_pair(int lane) { return ((lane >> 2) & 2) + (lane & 1); }
FN int fragment_lane(int row, int pair) {
  return (row & 4) * 4 + (pair & 2) * 4 + (row & 3) * 2 + (pair & 1);
}
// The three lane bits that walk over the rows.
FN int row_lanes(int i) { return i == 2 ? 16 : 2 << i; }
FN int pair_lanes(int i) { return i == 1 ? 8 : 1; }  // the two that walk over the pairs

// c (16 x 8) += a (16 x 16) b (16 x 8) in halves, summed in float32. Tiles: a[0] top left,
// a[1] bottom left, a[2] top right, a[3] bottom right; b and c from top to bottom.
FN void multiply_add(thread float (&c)[4], word a0, word a1, word a2, word a3, word b0, word b1) {
  simdgroup_matrix<half, 8, 8> left[4], right[2];
  simdgroup_matrix<float, 8, 8> sum[2];
  reinterpret_cast<thread half2&>(left[0].thread_elements()) = as_type<half2>(a0);
  reinterpret_cast<thread half2&>(left[1].thread_elements()) = as_type<half2>(a1);
  reinterpret_cast<thread half2&>(left[2].thread_elements()) = as_type<half2>(a2);
  reinterpret_cast<thread half2&>(left[3].thread_elements()) = as_type<half2>(a3);
  reinterpret_cast<thread half2&>(right[0].thread_elements()) = as_type<half2>(b0);
  reinterpret_cast<thread half2&>(right[1].thread_elements()) = as_type<half2>(b1);
  UNROLL for (int i = 0; i < 2; i++) {
    reinterpret_cast<thread float2&>(sum[i].thread_elements()) = float2(c[2 * i], c[2 * i + 1]);
    simdgroup_multiply_accumulate(sum[i], left[i], right[0], sum[i]);
    simdgroup_multiply_accumulate(sum[i], left[i + 2], right[1], sum[i]);
    float2 out = reinterpret_cast<thread float2&>(sum[i].thread_elements());
    c[2 * i] = out.x, c[2 * i + 1] = out.y;
  }
}
FN word as_right_factor(word tile) { return tile; }

template <typename T>
FN float to_float(T x) { return float(x); }
template <typename T>
FN T from_float(float x) { return T(x); }
FN word pack_halves(float low, float high) { return as_type<word>(half2(low, high)); }
FN half_t to_half(float x) { return half(x); }
FN bool is_finite(float x) { return (as_type<uint>(x) & 0x7f800000) != 0x7f800000; }
FN float low_half(word pair) { return as_type<half2>(pair).x; }
FN float high_half(word pair) { return as_type<half2>(pair).y; }
FN word low_halves(word a, word b) { return (a & 0xffff) | (b << 16); }
FN word high_halves(word a, word b) { return (a >> 16) | (b & 0xffff0000); }

FN float shuffle(float x, int lane) { return simd_shuffle(x, ushort(lane)); }
FN word shuffle_word(word x, int lane) { return simd_shuffle(x, ushort(lane)); }
FN float shuffle_xor(float x, int lanes) { return simd_shuffle_xor(x, ushort(lanes)); }
FN void block_sync() { threadgroup_barrier(mem_flags::mem_threadgroup); }
FN float log1p(float x) {  // to the digits of x, also where 1 + x has lost them
  const float y = 1 + x;
  return y == 1 ? x : x * (log(y) / (y - 1));
}
FN float rope_cos(float x) { return fast::cos(x); }  // as MLX's own rope
FN float rope_sin(float x) { return fast::sin(x); }
FN float fast_exp2(float x) { return fast::exp2(x); }
FN float fast_log2(float x) { return fast::log2(x); }
FN word funnel_shift(word low, word high, int bits) {
  return word(((ulong(high) << 32) | low) >> bits);
}
FN word read_shared(SHARED(const word) table, word byte) { return table[byte >> 2]; }

FN void read_shared_4(SHARED(const word) from, thread word (&to)[4]) {
  UNROLL for (int i = 0; i < 4; i++) to[i] = from[i];
}

FN void prefetch(const device void*) {}

template <int N, int WIDTH>
FN void read_words(IN(word) from, thread word (&to)[N]) {
  UNROLL for (int i = 0; i < N; i++) to[i] = from[i];
}

template <int N, typename T>
FN void read_values(IN(T) from, thread float (&to)[N]) {
  UNROLL for (int i = 0; i < N; i++) to[i] = float(from[i]);
}

FN void write_values(OUT(float) to, const thread float (&from)[4]) {
  UNROLL for (int i = 0; i < 4; i++) to[i] = from[i];
}

CONST int TABLE_COPIES = 1;  // threadgroup memory is 32 KB

// A mask's entry as a summand of the score.
FN float mask_value(bool seen) { return seen ? 0.0f : -2e30f; }
FN float mask_value(float summand) { return summand; }

// Prompts: threadgroup memory holds no tile of 256 dimensions beside the others, so that keys and
// values are read where they are. Two warps share 16 rows, or their sums would not fit in registers.
CONST bool STAGED = false;
CONST int FLASH_KEYS = 32, SHARERS = 2;
#define TILES(T) const device T*
FN const device half_t* tiles(threadgroup half_t*, const device half_t* global) { return global; }
FN void copy_async(threadgroup word* to, const device word* from) {
  UNROLL for (int i = 0; i < 4; i++) to[i] = from[i];
}
FN void copies_asked() {}
template <int GROUPS>
FN void copies_done() {}

// A 16 x 16 tile of halves whose rows lie `stride` apart, as 8 x 8 fragments: top left, bottom left,
// top right, bottom right. TRANSPOSED: each of them turned.
template <bool TRANSPOSED, typename P>
FN void read_tile(P from, int stride, int lane, thread word (&to)[4]) {
  const int row = fragment_row(lane), pair = 2 * fragment_pair(lane);
  UNROLL for (int i = 0; i < 4; i++) {
    P tile = from + i % 2 * 8 * stride + i / 2 * 8;
    to[i] = TRANSPOSED ? as_type<word>(half2(tile[pair * stride + row], tile[(pair + 1) * stride + row]))
                       : as_type<word>(half2(tile[row * stride + pair], tile[row * stride + pair + 1]));
  }
}

FN void write_4(device word* to, const thread word (&from)[4]) {
  UNROLL for (int i = 0; i < 4; i++) to[i] = from[i];
}
FN void write_4(threadgroup word* to, const thread word (&from)[4]) {
  UNROLL for (int i = 0; i < 4; i++) to[i] = from[i];
}
