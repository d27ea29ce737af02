// Products of compressed weights with many rows of inputs, such as a prompt's: y = x w.
//
// A block of threads takes 8 * FRAGMENTS rows, which pass through shared memory UNIT inputs at a
// time, and the outputs of its warps, TILES times 16 each. A warp decodes its weights into left
// factors in registers and uses them for all the rows; the next unit's are decoded meanwhile, between
// the products, and the words of the one after that are on their way.
//
// Rows are sorted by expert where there are experts: a block goes through those that its rows belong
// to, mostly one or two, and leaves out fragments that have none of an expert's rows.

template <int BITS, int WINDOW, int FRAGMENTS, int WARPS, int TILES, int STAGES>
struct Prompt {
  typedef Tile<BITS, WINDOW> Code;
  CONST int THREADS = 32 * WARPS, ROWS = 8 * FRAGMENTS, OUTPUTS = 16 * TILES * WARPS;
  CONST int STAGE = ROWS * UNIT / 2;  // words
  CONST int INPUTS = Code::Levels::WORDS, OWNERS = INPUTS + STAGES * STAGE;
  CONST int SHARED_WORDS = OWNERS + ROWS;
  CONST int WORDS = 8 * TILES;  // of the left factors of a unit
};

// As `read_inputs`, of a stage in shared memory.
FN void read_staged(SHARED(const word) stage, int first, int lane, LOCAL word (&b)[4]) {
  const int row = fragment_row(lane), pair = fragment_pair(lane);
  if (RIGHT_BY_COLUMNS) {
    read_shared_4(stage + (first + row) * (UNIT / 2) + pair * 4, b);
  } else {
    SHARED(const half_t) low = (SHARED(const half_t))stage + (first + 2 * pair) * UNIT;
    UNROLL for (int i = 0; i < 4; i++) {
      const int at = place_of_input(i * 8 + row);
      b[i] = pack_halves(to_float(low[at]), to_float(low[UNIT + at]));
    }
  }
}

// Brings a unit of the block's rows to shared memory.
template <typename P>
FN void stage_inputs(SHARED(word) to, IN(half_t) x, int stride, int first, int rows, int unit,
                     int tid) {
  UNROLL for (int j = 0; j < P::ROWS * 4; j += P::THREADS) {
    const int i = j + tid, row = min(i / 4, rows - 1);
    copy_async(to + i * 4, (IN(word))(x + size_t(first) * stride + (row * stride + unit * UNIT + i % 4 * 8)));
  }
}

template <typename P, int TILES>
FN void read_unit(LOCAL typename P::Code (&codes)[TILES][2], IN(word) weight, size_t tile,
                  int tiles, int units, int unit, int lane) {
  UNROLL for (int i = 0; i < TILES; i++)
    UNROLL for (int t = 0; t < 2; t++) {
      const size_t own = tile + min(i, tiles - 1);
      codes[i][t].read(weight + ((own * units + unit) * 2 + t) * P::Code::WORDS, lane);
    }
}

template <int BITS, int WINDOW, int FRAGMENTS, int WARPS, int TILES, int STAGES, bool EXPERTS,
          typename T>
FN void prompt(IN(half_t) x, IN(word) weight, IN(half_t) scales, IN(word) levels,
               IN(word) indices, IN(ProductCall) call, OUT(T) y,
               SHARED(word) memory, int tid, int block_column, int block_row) {
  typedef Prompt<BITS, WINDOW, FRAGMENTS, WARPS, TILES, STAGES> P;
  typedef typename P::Code Code;
  const int lane = tid % 32, warp = tid / 32;
  const int inputs = call->inputs, outputs = call->outputs, units = inputs / UNIT;
  const int stride = row_stride(inputs);
  const int first = block_row * P::ROWS, rows = min(P::ROWS, call->rows - first);
  const int tall = outputs / 16, column = (block_column * WARPS + warp) * TILES;
  const int tiles = min(TILES, tall - column);  // of this warp; may be none
  SHARED(word) owners = memory + P::OWNERS;
  fill_table<typename Code::Levels, P::THREADS>(memory, levels, tid);
  if (EXPERTS)
    for (int i = tid; i < rows; i += P::THREADS) owners[i] = indices[first + i];
  block_sync();

  for (int start = 0, stop = rows; start < rows; start = stop) {
    const word expert = EXPERTS ? owners[start] : 0;
    if (EXPERTS)
      for (stop = start + 1; stop < rows && owners[stop] == expert;) stop++;
    const size_t tile = size_t(expert) * tall + max(0, min(column, tall - 1));
    float sum[TILES][FRAGMENTS][4];
    UNROLL for (int i = 0; i < TILES; i++)
      UNROLL for (int f = 0; f < FRAGMENTS; f++)
        UNROLL for (int j = 0; j < 4; j++) sum[i][f][j] = 0;

    Code codes[TILES][2];
    word next[P::WORDS], spans[P::WORDS / 4][2];
    read_unit<P>(codes, weight, tile, max(tiles, 1), units, 0, lane);
    UNROLL for (int stage = 0; stage < STAGES - 1; stage++) {
      if (stage < units)
        stage_inputs<P>(memory + P::INPUTS + stage * P::STAGE, x, stride, first, rows, stage, tid);
      copies_asked();
    }
    UNROLL for (int i = 0; i < P::WORDS / 4; i++) {
      codes[i / 2][i % 2].spans(lane, spans[i]);
      UNROLL for (int j = 0; j < 4; j++) next[i * 4 + j] = Code::pair(spans[i], memory, lane, j);
    }
    read_unit<P>(codes, weight, tile, max(tiles, 1), units, min(1, units - 1), lane);

    for (int unit = 0; unit < units; unit++) {
      word a[P::WORDS];
      UNROLL for (int i = 0; i < P::WORDS; i++) a[i] = next[i];
      copies_done<STAGES - 2>();
      block_sync();  // this unit's inputs are here, and those of the one before were read
      const int ahead = unit + STAGES - 1;
      if (ahead < units)
        stage_inputs<P>(memory + P::INPUTS + ahead % STAGES * P::STAGE, x, stride, first, rows,
                        ahead, tid);
      copies_asked();
      Code later[TILES][2];
      read_unit<P>(later, weight, tile, max(tiles, 1), units, min(unit + 2, units - 1), lane);
      SHARED(const word) stage = memory + P::INPUTS + unit % STAGES * P::STAGE;
      UNROLL for (int f = 0; f < FRAGMENTS; f++) {
        UNROLL for (int i = f; i < P::WORDS; i += FRAGMENTS) {
          if (i % 4 == 0) codes[i / 8][i / 4 % 2].spans(lane, spans[i / 4]);
          next[i] = Code::pair(spans[i / 4], memory, lane, i % 4);
        }
        if (8 * f >= stop || 8 * f + 8 <= start) continue;
        word b[4];
        read_staged(stage, 8 * f, lane, b);
        UNROLL for (int i = 0; i < TILES; i++)
          UNROLL for (int t = 0; t < 2; t++) {
            const LOCAL word* own = a + i * 8 + t * 4;
            multiply_add(sum[i][f], own[0], own[1], own[2], own[3], b[2 * t], b[2 * t + 1]);
          }
      }
      UNROLL for (int i = 0; i < TILES * 2; i++) codes[i / 2][i % 2] = later[i / 2][i % 2];
    }
    copies_done<0>();
    block_sync();

    UNROLL for (int f = 0; f < FRAGMENTS; f++)
      UNROLL for (int j = 0; j < 2; j++) {
        const int row = 8 * f + 2 * fragment_pair(lane) + j;
        if (row < start || row >= stop) continue;
        const float scale = scale_of(x, inputs, first + row);
        OUT(T) out = y + size_t(first + row) * outputs;
        UNROLL for (int i = 0; i < TILES; i++)
          UNROLL for (int e = 0; e < 2; e++) {
            const int n = (column + i) * 16 + 8 * e + fragment_row(lane);
            if (i < tiles)
              out[n] = from_float<T>(sum[i][f][2 * e + j] * scale *
                                     to_float(scales[size_t(expert) * outputs + n]));
          }
      }
  }
}
