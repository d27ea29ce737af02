// Products of compressed weights with few rows of inputs: y = w x, a warp a tile of 16 outputs.
//
// A warp reads the words of two tiles, 16 outputs by UNIT inputs, decodes them into left factors in
// its registers, and multiplies these by its rows' inputs, which are the columns of right factors:
// FRAGMENTS of 8 rows. `along` warps divide the inputs of the same outputs among them, and add up
// through shared memory. A block of threads stays: it fills its table of levels once, takes one
// group of outputs after the other, and the words of the next BATCH units are always on their way.
//
// With experts, a row of y is a pair of a token and an expert, and has its own weights: a tile then
// belongs to a pair, and its factor's columns are all the same.

struct ProductCall {
  int rows, inputs, outputs;
  int blocks;  // of threads
  int along;   // warps that divide the inputs of the same outputs
  int shared;  // neighbouring pairs that share a row of inputs, or 0 without experts
};

// The inputs of one unit for 8 rows, as right factors of its two tiles. Rows from `last` on are
// the last one's, and not looked at.
FN void read_inputs(IN(half_t) x, int stride, int first, int last, int lane,
                    LOCAL word (&b)[4]) {
  const int row = fragment_row(lane), pair = fragment_pair(lane);
  if (RIGHT_BY_COLUMNS) {
    const size_t at = size_t(min(first + row, last)) * stride + pair * 8;
    read_words<4, 4>((IN(word))(x + at), b);
  } else {
    IN(half_t) low = x + size_t(min(first + 2 * pair, last)) * stride;
    IN(half_t) high = x + size_t(min(first + 2 * pair + 1, last)) * stride;
    UNROLL for (int i = 0; i < 4; i++) {
      const int at = place_of_input(i * 8 + row);
      b[i] = pack_halves(to_float(low[at]), to_float(high[at]));
    }
  }
}

// BATCH neighbouring units. EVEN: there always are so many.
template <int BITS, int WINDOW, int FRAGMENTS, int BATCH, bool EVEN>
struct Batch {
  typedef Tile<BITS, WINDOW> Code;
  Code tiles[BATCH][2];
  word inputs[BATCH][FRAGMENTS][4];

  // Of the `left` units that there are; the others count as zeros.
  FN void read(IN(word) weight, IN(half_t) x, int stride, int last, int left, int lane) {
    UNROLL for (int i = 0; i < BATCH; i++) {
      const bool there = EVEN || i < left;
      UNROLL for (int t = 0; t < 2; t++)
        if (there) tiles[i][t].read(weight + (2 * i + t) * Code::WORDS, lane);
      UNROLL for (int f = 0; f < FRAGMENTS; f++) {
        if (!EVEN) UNROLL for (int j = 0; j < 4; j++) inputs[i][f][j] = 0;
        if (there) read_inputs(x + i * UNIT, stride, 8 * f, last, lane, inputs[i][f]);
      }
    }
  }
  FN void multiply(SHARED(const word) table, int lane, LOCAL float (&sum)[FRAGMENTS][4]) const {
    UNROLL for (int i = 0; i < BATCH; i++)
      UNROLL for (int t = 0; t < 2; t++) {
        word a[4];
        tiles[i][t].decode(table, lane, a);
        UNROLL for (int f = 0; f < FRAGMENTS; f++)
          multiply_add(sum[f], a[0], a[1], a[2], a[3], inputs[i][f][2 * t],
                       inputs[i][f][2 * t + 1]);
      }
  }
};

template <int BITS, int WINDOW, int FRAGMENTS, int WARPS, int BATCH>
struct Product {
  typedef Tile<BITS, WINDOW> Code;
  CONST int THREADS = 32 * WARPS;
  CONST int SUMS = FRAGMENTS * 128;  // of a warp
  CONST int SHARED_WORDS = Code::Levels::WORDS + 2 * WARPS * SUMS;
};

template <int BITS, int WINDOW, int FRAGMENTS, int WARPS, int BATCH, bool EVEN, bool EXPERTS,
          typename T>
FN void product(IN(half_t) x, IN(word) weight, IN(half_t) scales, IN(word) levels,
                IN(word) indices, IN(ProductCall) call, OUT(T) y,
                SHARED(word) memory, int tid, int block) {
  typedef Product<BITS, WINDOW, FRAGMENTS, WARPS, BATCH> P;
  constexpr int UNIT_WORDS = 2 * P::Code::WORDS;
  const int lane = tid % 32, warp = tid / 32;
  const int along = call->along, own = warp % along, group = WARPS / along;
  const int inputs = call->inputs, x_stride = row_stride(inputs);
  const int units = inputs / UNIT, tall = call->outputs / 16;
  const int rows = EXPERTS ? 1 : call->rows, tiles = tall * (EXPERTS ? call->rows : 1);
  const int first = block * group, stride = call->blocks * group;
  const int steps = (units + BATCH * along - 1) / (BATCH * along);  // for a tile
  const int end = (tiles - first + stride - 1) / stride * steps;
  SHARED(float) sums = (SHARED(float))(memory + P::Code::Levels::WORDS);

  // What is read next: `step` of a tile.
  int step = 0, tile = min(first + warp / along, tiles - 1);
  IN(word) next_words;
  IN(half_t) next_inputs;
  Batch<BITS, WINDOW, FRAGMENTS, BATCH, EVEN> batch[2];
#define BEGIN_TILE                                                                        \
  {                                                                                       \
    const int pair = EXPERTS ? tile / tall : 0;                                           \
    const size_t row = EXPERTS ? size_t(indices[pair]) * tall + tile % tall : tile;       \
    next_words = weight + (row * units + own * BATCH) * UNIT_WORDS;                       \
    next_inputs = x + size_t(EXPERTS ? pair / call->shared : 0) * x_stride + own * (BATCH * UNIT); \
  }
#define READ(to)                                                                          \
  {                                                                                       \
    to.read(next_words, next_inputs, x_stride, rows - 1, units - (step * along + own) * BATCH, lane); \
    next_words += along * (BATCH * UNIT_WORDS);                                           \
    next_inputs += along * (BATCH * UNIT);                                                \
    if (++step == steps) {                                                                \
      step = 0, tile = min(tile + stride, tiles - 1);                                     \
      BEGIN_TILE                                                                          \
    }                                                                                     \
  }
  BEGIN_TILE
  READ(batch[0]);
  if (end > 1) READ(batch[1]);
  fill_table<typename P::Code::Levels, P::THREADS>(memory, levels, tid);
  block_sync();

  float sum[FRAGMENTS][4];
  UNROLL for (int f = 0; f < FRAGMENTS; f++) UNROLL for (int i = 0; i < 4; i++) sum[f][i] = 0;
  for (int at = 0, now = 0, turn = 0; at < end; at += 2)
    UNROLL for (int parity = 0; parity < 2; parity++) {
      if (at + parity >= end) break;
      batch[parity].multiply(memory, lane, sum);
      if (at + parity + 2 < end) READ(batch[parity]);
      if (++now < steps) continue;
      SHARED(float) all = sums + turn % 2 * (WARPS * P::SUMS);
      UNROLL for (int f = 0; f < FRAGMENTS; f++)
        UNROLL for (int i = 0; i < 4; i++) {
          all[warp * P::SUMS + (f * 4 + i) * 32 + lane] = sum[f][i];
          sum[f][i] = 0;
        }
      block_sync();
      LOOP for (int i = tid; i < group * 16 * rows; i += P::THREADS) {
        const int output = i % 16, row = i / 16 % rows, part = i / (16 * rows);
        const int done = first + turn * stride + part;
        if (done >= tiles) continue;
        const int value = row % 2 + output / 8 * 2;
        const int from = (row / 8 * 4 + value) * 32 + fragment_lane(output % 8, row % 8 / 2);
        float total = 0;
        LOOP for (int w = 0; w < along; w++) total += all[(part * along + w) * P::SUMS + from];
        const int to = EXPERTS ? done / tall : row, n = (EXPERTS ? done % tall : done) * 16 + output;
        const size_t expert = EXPERTS ? indices[to] : 0;
        total *= to_float(scales[expert * (tall * 16) + n]);
        total *= scale_of(x, inputs, EXPERTS ? to / call->shared : to);
        y[size_t(to) * (tall * 16) + n] = from_float<T>(total);
      }
      now = 0;
      turn++;
    }
#undef READ
#undef BEGIN_TILE
}
