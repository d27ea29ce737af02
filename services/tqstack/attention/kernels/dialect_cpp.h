// The words that the kernel bodies use, in plain C++, so that tests run the very bodies on a CPU.
//
// Every thread of a block is a coroutine; it hands over wherever it waits for others, so that one
// operating-system thread runs a whole block, in the same order each time.
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define FN inline
#define IN(T) const T*
#define OUT(T) T*
#define SHARED(T) T*
#define SHARED_ARRAY static
#define LOCAL
#define UNROLL
#define UNROLL_8
#define LOOP

#define SHARED_MEMORY(name, words) static word name[words]

#define CONST static constexpr

typedef uint32_t word;
typedef uint8_t byte;

struct Barrier {
  int arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;  // setjmp switches without the system call of swapcontext
  bool started = false, done = false;
  const Barrier* waits_for = nullptr;
  int generation = 0;
  float scalar;  // what this lane shows its warp
  word factors[6];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  Barrier all;
  jmp_buf scheduler;
  int current = 0;
  std::function<void(int)> body;

  static constexpr size_t STACK = 1 << 16;
  static std::vector<char>& stacks() {  // of all fibers; blocks come one after the other
    static std::vector<char> memory;
    return memory;
  }
  static Block*& running() {
    static Block* block = nullptr;
    return block;
  }
  static void enter() {
    Block& block = *running();
    block.body(block.current);
    block.me().done = true;
    _longjmp(block.scheduler, 1);
  }
  explicit Block(int threads, std::function<void(int)> function)
      : fibers(threads), warps(threads / 32), body(function) {
    running() = this;
    if (stacks().size() < threads * STACK) stacks().resize(threads * STACK);
    for (volatile bool busy = true; busy;) {
      busy = false;
      for (current = 0; current < threads; current++) {
        if (me().done) continue;
        busy = true;
        if (!me().waits_for || me().waits_for->generation != me().generation) run();
      }
    }
  }
  void run() {
    if (_setjmp(scheduler)) return;
    if (me().started) _longjmp(me().resume, 1);
    me().started = true;
    getcontext(&me().start);
    me().start.uc_stack.ss_sp = stacks().data() + size_t(current) * STACK;
    me().start.uc_stack.ss_size = STACK;
    makecontext(&me().start, enter, 0);
    setcontext(&me().start);
  }
  void wait(Barrier& barrier, int threads) {
    if (++barrier.arrived == threads) {
      barrier.arrived = 0;
      barrier.generation++;
      return;
    }
    me().waits_for = &barrier;
    me().generation = barrier.generation;
    if (!_setjmp(me().resume)) _longjmp(scheduler, 1);
  }
  Fiber& me() { return fibers[current]; }
  Fiber& lane(int i) { return fibers[current / 32 * 32 + i]; }
  void wait_warp() { wait(warps[current / 32], 32); }
};

FN void block_sync() {
  Block& block = *Block::running();
  block.wait(block.all, int(block.fibers.size()));
}
FN float shuffle(float x, int lane) {
  Block& block = *Block::running();
  block.me().scalar = x;
  block.wait_warp();
  float other = block.lane(lane).scalar;
  block.wait_warp();
  return other;
}
FN word shuffle_word(word x, int lane) {
  Block& block = *Block::running();
  block.me().factors[0] = x;
  block.wait_warp();
  word other = block.lane(lane).factors[0];
  block.wait_warp();
  return other;
}
FN float shuffle_xor(float x, int lanes) {
  return shuffle(x, (Block::running()->current % 32) ^ lanes);
}

struct half_t {
  uint16_t bits;
};
FN float to_float(half_t h) {
  uint32_t sign = uint32_t(h.bits & 0x8000) << 16, exponent = (h.bits >> 10) & 31;
  uint32_t mantissa = h.bits & 1023, x;
  if (exponent == 0) {
    float small = std::ldexp(float(mantissa), -24);
    return sign ? -small : small;
  }
  x = sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (mantissa << 13);
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}
FN float to_float(float x) { return x; }
FN half_t to_half(float f) {  // to nearest, ties to even
  float a = std::fabs(f);
  uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  if (!(a < 65520.0f)) return {uint16_t(sign | 0x7c00)};
  int exponent = a < 6.103515625e-05f ? -14 : std::ilogb(a);
  float mantissa = std::nearbyint(std::ldexp(a, 10 - exponent));
  uint32_t rounded = uint32_t(mantissa) + (uint32_t(exponent + 14) << 10);
  return {uint16_t(sign | rounded)};
}
template <typename T>
FN T from_float(float x);
template <>
FN float from_float<float>(float x) { return x; }
template <>
FN half_t from_float<half_t>(float x) { return to_half(x); }
FN word pack_halves(float low, float high) {
  return to_half(low).bits | (word(to_half(high).bits) << 16);
}
FN float low_half(word pair) { return to_float(half_t{uint16_t(pair)}); }
FN float high_half(word pair) { return to_float(half_t{uint16_t(pair >> 16)}); }
FN word low_halves(word a, word b) { return (a & 0xffff) | (b << 16); }
FN word high_halves(word a, word b) { return (a >> 16) | (b & 0xffff0000); }

// The matrix fragments of CUDA, or with METAL_LAYOUT those of Metal (see the other dialects).
#ifdef METAL_LAYOUT
CONST bool RIGHT_BY_COLUMNS = false;
FN int fragment_row(int lane) { return ((lane >> 2) & 4) + ((lane >> 1) & 3); }
FN int fragment_pair(int lane) { return ((lane >> 2) & 2) + (lane & 1); }
FN int fragment_lane(int row, int pair) {
  return (row & 4) * 4 + (pair & 2) * 4 + (row & 3) * 2 + (pair & 1);
}
FN int row_lanes(int i) { return i == 2 ? 16 : 2 << i; }
FN int pair_lanes(int i) { return i == 1 ? 8 : 1; }
CONST bool STAGED = false;
CONST int FLASH_KEYS = 32, SHARERS = 2;
#else
CONST bool RIGHT_BY_COLUMNS = true;
FN int fragment_row(int lane) { return lane >> 2; }
FN int fragment_pair(int lane) { return lane & 3; }
FN int fragment_lane(int row, int pair) { return 4 * row + pair; }
FN int row_lanes(int i) { return 4 << i; }
FN int pair_lanes(int i) { return 1 << i; }
CONST bool STAGED = true;
CONST int FLASH_KEYS = 64, SHARERS = 1;
#endif

FN float half_of(word pair, int which) { return which ? high_half(pair) : low_half(pair); }

FN void multiply_add(float (&c)[4], word a0, word a1, word a2, word a3, word b0, word b1) {
  Block& block = *Block::running();
  word factors[6] = {a0, a1, a2, a3, b0, b1};
  std::memcpy(block.me().factors, factors, sizeof factors);
  block.wait_warp();
  int lane = block.current % 32, row = fragment_row(lane), pair = fragment_pair(lane);
  for (int i = 0; i < 4; i++) {
    int column = 2 * pair + i % 2;
    for (int k = 0; k < 16; k++) {
      word a = block.lane(fragment_lane(row, k % 8 / 2)).factors[i / 2 + 2 * (k / 8)];
      int holder = RIGHT_BY_COLUMNS ? fragment_lane(column, k % 8 / 2)
                                    : fragment_lane(k % 8, column / 2);
      word b = block.lane(holder).factors[4 + k / 8];
      c[i] += half_of(a, k % 2) * half_of(b, (RIGHT_BY_COLUMNS ? k : column) % 2);
    }
  }
  block.wait_warp();
}
FN word as_right_factor(word tile) {
  if (!RIGHT_BY_COLUMNS) return tile;
  Block& block = *Block::running();
  block.me().factors[0] = tile;
  block.wait_warp();
  int lane = block.current % 32, row = fragment_row(lane), pair = fragment_pair(lane);
  word upper = block.lane(fragment_lane(2 * pair, row / 2)).factors[0];
  word lower = block.lane(fragment_lane(2 * pair + 1, row / 2)).factors[0];
  block.wait_warp();
  return row % 2 ? high_halves(upper, lower) : low_halves(upper, lower);
}

FN float fast_exp2(float x) { return std::exp2(x); }
FN float fast_log2(float x) { return std::log2(x); }
FN word funnel_shift(word low, word high, int bits) {
  return word(((uint64_t(high) << 32) | low) >> bits);
}
FN word read_shared(const word* table, word byte) { return table[byte >> 2]; }
FN void read_shared_4(const word* from, word (&to)[4]) { std::memcpy(to, from, 16); }
FN void prefetch(const void*) {}
template <int N, int WIDTH>
FN void read_words(IN(word) from, word (&to)[N]) {
  for (int i = 0; i < N; i++) to[i] = from[i];
}

template <int N, typename T>
FN void read_values(IN(T) from, float (&to)[N]) {
  for (int i = 0; i < N; i++) to[i] = to_float(from[i]);
}

FN void write_values(OUT(float) to, const float (&from)[4]) { std::memcpy(to, from, 16); }

FN float rope_cos(float x) { return std::cos(x); }
FN float rope_sin(float x) { return std::sin(x); }
FN bool is_finite(float x) { return std::isfinite(x); }
using std::sqrt;
FN float fmin(float a, float b) { return a < b ? a : b; }
using std::exp;
using std::exp2;
using std::fabs;
using std::log1p;
FN int max(int a, int b) { return a > b ? a : b; }
FN int min(int a, int b) { return a < b ? a : b; }
FN float fmax(float a, float b) { return a > b ? a : b; }

CONST int TABLE_COPIES = 4;

// A mask's entry as a summand of the score.
FN float mask_value(bool seen) { return seen ? 0.0f : -2e30f; }
FN float mask_value(float summand) { return summand; }

// Prompts: see the other dialects.
#define TILES(T) const T*
FN const half_t* tiles(const half_t* shared, const half_t* global) {
  return STAGED ? shared : global;
}
FN void copy_async(word* to, const word* from) { std::memcpy(to, from, 16); }
FN void copies_asked() {}
template <int GROUPS>
FN void copies_done() {}
template <bool TRANSPOSED>
FN void read_tile(const half_t* from, int stride, int lane, word (&to)[4]) {
  const int row = fragment_row(lane), pair = 2 * fragment_pair(lane);
  for (int i = 0; i < 4; i++) {
    const half_t* tile = from + i % 2 * 8 * stride + i / 2 * 8;
    half_t low = TRANSPOSED ? tile[pair * stride + row] : tile[row * stride + pair];
    half_t high = TRANSPOSED ? tile[(pair + 1) * stride + row] : tile[row * stride + pair + 1];
    to[i] = low.bits | (word(high.bits) << 16);
  }
}
FN void write_4(word* to, const word (&from)[4]) { std::memcpy(to, from, 16); }
template <typename T>
FN word pack_pair(float low, float high) { return pack_halves(low, high); }
template <typename T>
FN void multiply_add_as(float (&c)[4], word a0, word a1, word a2, word a3, word b0, word b1) {
  multiply_add(c, a0, a1, a2, a3, b0, b1);
}
