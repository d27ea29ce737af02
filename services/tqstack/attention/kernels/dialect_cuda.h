// The words that the kernel bodies use, in CUDA (sm_80 and later).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define FN __device__ __forceinline__
#define IN(T) const T* __restrict__
#define OUT(T) T* __restrict__
#define SHARED(T) T*
#define SHARED_ARRAY __shared__ __align__(128)
#define LOCAL
#define UNROLL _Pragma("unroll")
#define UNROLL_8 _Pragma("unroll 8")
#define LOOP _Pragma("unroll 1")

// So many words of shared memory; their number is set at the launch, which takes up to 227 KB.
#define SHARED_MEMORY(name, words) extern __shared__ __align__(128) word name[]

#define CONST static constexpr

typedef unsigned int word;
typedef unsigned char byte;
typedef __half half_t;

// Matrix fragments: two neighbouring columns of one row of an 8 x 8 tile in every lane. The right
// factor of a product is held by columns here (its lanes hold two rows of one column).
CONST bool RIGHT_BY_COLUMNS = true;
FN int fragment_row(int lane) { return lane >> 2; }
FN int fragment_pair(int lane) { return lane & 3; }
FN int fragment_lane(int row, int pair) { return 4 * row + pair; }
FN int row_lanes(int i) { return 4 << i; }  // the three lane bits that walk over the rows

FN int pair_lanes(int i) { return 1 << i; }  // the two lane bits that walk over the pairs

// c (16 x 8) += a (16 x 16) b (16 x 8) in halves, summed in float32. Tiles: a[0] top left,
// a[1] bottom left, a[2] top right, a[3] bottom right; b and c from top to bottom.
FN void multiply_add(float (&c)[4], word a0, word a1, word a2, word a3, word b0, word b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A tile as multiply_add returns it, in the layout of a right factor.
FN word as_right_factor(word tile) {
  word turned;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(tile));
  return turned;
}

FN half_t to_half(float x) { return __float2half_rn(x); }
FN bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000) != 0x7f800000; }
FN float to_float(half_t x) { return __half2float(x); }
FN float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
FN float to_float(float x) { return x; }
template <typename T>
FN T from_float(float x) { return T(x); }
FN word pack_halves(float low, float high) {
  __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<word*>(&pair);
}
FN float low_half(word pair) { return __low2float(*reinterpret_cast<__half2*>(&pair)); }
FN float high_half(word pair) { return __high2float(*reinterpret_cast<__half2*>(&pair)); }
FN word low_halves(word a, word b) { return __byte_perm(a, b, 0x5410); }
FN word high_halves(word a, word b) { return __byte_perm(a, b, 0x7632); }

FN float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
FN word shuffle_word(word x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
FN float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
FN void block_sync() { __syncthreads(); }
FN float rope_cos(float x) { return cosf(x); }  // as MLX's own rope
FN float rope_sin(float x) { return sinf(x); }
FN float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FN float fast_log2(float x) { return __log2f(x); }
FN word funnel_shift(word low, word high, int bits) { return __funnelshift_r(low, high, bits); }
FN word read_shared(const word* table, word byte) {
  return *reinterpret_cast<const word*>(reinterpret_cast<const char*>(table) + byte);
}

FN void read_shared_4(const word* from, word (&to)[4]) {
  uint4 x = *reinterpret_cast<const uint4*>(from);
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}

// Asks for 128 bytes to be brought to the cache, and waits for nothing.
FN void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// N words of a kernel's input, WIDTH (1, 2 or 4) of them at a time. __ldg: the compiler sees no
// longer that it is an input once a pointer was chosen among several.
template <int N, int WIDTH>
FN void read_words(IN(word) from, word (&to)[N]) {
  if constexpr (WIDTH % 4 == 0 && N % 4 == 0) {
    UNROLL for (int i = 0; i < N; i += 4) {
      uint4 x = __ldg(reinterpret_cast<const uint4*>(from + i));
      to[i] = x.x, to[i + 1] = x.y, to[i + 2] = x.z, to[i + 3] = x.w;
    }
  } else if constexpr (WIDTH % 2 == 0 && N % 2 == 0) {
    UNROLL for (int i = 0; i < N; i += 2) {
      uint2 x = __ldg(reinterpret_cast<const uint2*>(from + i));
      to[i] = x.x, to[i + 1] = x.y;
    }
  } else {
    UNROLL for (int i = 0; i < N; i++) to[i] = __ldg(from + i);
  }
}

// N values of any float type, at an address that is a multiple of their size, up to 16 bytes.
template <int N, typename T>
FN void read_values(IN(T) from, float (&to)[N]) {
  constexpr int WORDS = N * sizeof(T) / 4;
  word raw[WORDS];
  read_words<WORDS, 4>(reinterpret_cast<const word*>(from), raw);
  UNROLL for (int i = 0; i < N; i++) {
    if constexpr (sizeof(T) == 4) {
      to[i] = __uint_as_float(raw[i]);
    } else {
      unsigned short bits = raw[i / 2] >> (i % 2 * 16);
      to[i] = to_float(*reinterpret_cast<T*>(&bits));
    }
  }
}

// 16 bytes at a time; `to` is a multiple of them.
FN void write_values(OUT(float) to, const float (&from)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}

CONST int TABLE_COPIES = 32;  // a copy of a lookup table for every lane: no bank conflicts

// A mask's entry as a summand of the score.
FN float mask_value(bool seen) { return seen ? 0.0f : -2e30f; }
FN float mask_value(float summand) { return summand; }

// Prompts: tiles of keys and values pass through shared memory, and a warp keeps its rows to itself.
CONST bool STAGED = true;
CONST int FLASH_KEYS = 64, SHARERS = 1;
#define TILES(T) const T*
FN const half_t* tiles(const half_t* shared, const half_t*) { return shared; }

// 16 bytes from memory to shared memory, in the background; those asked for so far are a group.
FN void copy_async(word* to, const word* from) {
  unsigned at = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}
FN void copies_asked() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most GROUPS groups are on their way; other threads' need a block_sync as well.
template <int GROUPS>
FN void copies_done() { asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory"); }

// A 16 x 16 tile of halves whose rows lie `stride` apart, as 8 x 8 fragments: top left, bottom left,
// top right, bottom right. TRANSPOSED: each of them turned.
template <bool TRANSPOSED>
FN void read_tile(const half_t* from, int stride, int lane, word (&to)[4]) {
  from += lane % 16 * stride + lane / 16 * 8;
  unsigned at = unsigned(__cvta_generic_to_shared(from));
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at));
  }
}

FN void write_4(word* to, const word (&from)[4]) {
  *reinterpret_cast<uint4*>(to) = make_uint4(from[0], from[1], from[2], from[3]);
}

// The same products and pairs for numbers of either 16-bit type.
template <typename T>
FN word pack_pair(float low, float high) { return pack_halves(low, high); }
template <>
FN word pack_pair<__nv_bfloat16>(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<word*>(&pair);
}
template <typename T>
FN void multiply_add_as(float (&c)[4], word a0, word a1, word a2, word a3, word b0, word b1) {
  multiply_add(c, a0, a1, a2, a3, b0, b1);
}
template <>
FN void multiply_add_as<__nv_bfloat16>(float (&c)[4], word a0, word a1, word a2, word a3, word b0,
                                       word b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
