// Products with quantized experts, for rows that are sorted by expert: y = x w, w = scale * code + bias.
//
// A block of threads takes EXPERT_ROWS rows and EXPERT_OUTPUTS outputs, and goes through the experts
// that these rows belong to, mostly one or two. An expert's codes become 16-bit weights in shared
// memory, STEP inputs at a time, and all of its rows there are multiplied by them; the next step's
// codes are on their way meanwhile. So each weight is read and decoded about once, and no expert
// ever exists decompressed. Where rows are few they belong to many experts: `sharers` blocks divide
// these among them.

CONST int EXPERT_WARPS = 4, EXPERT_THREADS = 32 * EXPERT_WARPS;
CONST int EXPERT_ROWS = 16 * EXPERT_WARPS, EXPERT_OUTPUTS = 128;  // an output per thread to decode
CONST int STEP = 64;
CONST int STAGE_ROW = STEP + 8;  // 16-bit numbers; neighbouring rows begin in different banks
CONST int INPUT_STAGE = EXPERT_ROWS * STAGE_ROW / 2, WEIGHT_STAGE = EXPERT_OUTPUTS * STAGE_ROW / 2;
CONST int EXPERTS_SHARED_WORDS = 2 * (INPUT_STAGE + WEIGHT_STAGE) + EXPERT_ROWS;

struct ExpertsCall {
  int rows, inputs, outputs;
  int sharers;  // blocks that divide the experts of the same rows among them
};

// The codes of one output and STEP inputs, and how they become numbers.
template <int BITS, int GROUP, typename T>
struct Codes {
  CONST int WORDS = STEP * BITS / 32, GROUPS = GROUP < STEP ? STEP / GROUP : 1;
  word codes[WORDS];
  float scale[GROUPS], bias[GROUPS];

  FN void read(IN(word) weight, IN(T) scales, IN(T) biases, size_t row, int inputs, int input) {
    read_words<WORDS, WORDS>(weight + (row * inputs + input) * BITS / 32, codes);
    UNROLL for (int g = 0; g < GROUPS; g++) {
      const size_t at = (row * inputs + input) / GROUP + g;
      scale[g] = to_float(scales[at]);
      bias[g] = to_float(biases[at]);
    }
  }
  FN void store(SHARED(word) to) {
    constexpr int PER_WORD = 32 / BITS;
    UNROLL for (int i = 0; i < STEP; i += 8) {
      word pairs[4];
      UNROLL for (int j = 0; j < 4; j++) {
        float x[2];
        UNROLL for (int e = 0; e < 2; e++) {
          const int at = i + 2 * j + e, g = at * GROUPS / STEP;
          const word code = codes[at / PER_WORD] >> (at % PER_WORD * BITS) & ((1u << BITS) - 1);
          x[e] = float(code) * scale[g] + bias[g];
        }
        pairs[j] = pack_pair<T>(x[0], x[1]);
      }
      write_4(to + i / 2, pairs);
    }
  }
};

template <int BITS, int GROUP, typename T>
FN void experts(IN(T) x, IN(word) weight, IN(T) scales, IN(T) biases, IN(word) indices,
                IN(ExpertsCall) call, OUT(T) y, SHARED(word) memory, int tid, int block_column,
                int block_row, int sharer) {
  constexpr int COLUMN_TILES = EXPERT_OUTPUTS / 16;
  const int lane = tid % 32, warp = tid / 32;
  const int inputs = call->inputs, outputs = call->outputs;
  const int first = block_row * EXPERT_ROWS, rows = min(EXPERT_ROWS, call->rows - first);
  const int column = block_column * EXPERT_OUTPUTS;
  SHARED(word) weights = memory + 2 * INPUT_STAGE;
  SHARED(word) own = weights + 2 * WEIGHT_STAGE;
  if (tid < rows) own[tid] = indices[first + tid];
  block_sync();

  for (int start = 0, stop, turn = 0; start < rows; start = stop, turn++) {
    const word expert = own[start];
    for (stop = start + 1; stop < rows && own[stop] == expert;) stop++;
    if (turn % call->sharers != sharer) continue;
    const bool active = warp * 16 < stop && warp * 16 + 16 > start;
    const size_t row = size_t(expert) * outputs + min(column + tid, outputs - 1);
    float sum[COLUMN_TILES][2][4];
    UNROLL for (int i = 0; i < COLUMN_TILES * 8; i++) sum[i / 8][i / 4 % 2][i % 4] = 0;

    Codes<BITS, GROUP, T> next;
    next.read(weight, scales, biases, row, inputs, 0);
    for (int at = -STEP; at < inputs; at += STEP) {
      const int ahead = at + STEP, parity = (at / STEP) & 1;
      if (ahead < inputs) {
        SHARED(word) to = memory + (1 - parity) * INPUT_STAGE;
        UNROLL for (int i = tid; i < EXPERT_ROWS * (STEP / 8); i += EXPERT_THREADS) {
          const int r = i / (STEP / 8), part = i % (STEP / 8);
          IN(T) from = x + size_t(first + min(r, rows - 1)) * inputs + ahead + part * 8;
          copy_async(to + r * (STAGE_ROW / 2) + part * 4, (IN(word))from);
        }
      }
      copies_asked();
      Codes<BITS, GROUP, T> codes = next;
      if (ahead + STEP < inputs) next.read(weight, scales, biases, row, inputs, ahead + STEP);
      if (at >= 0 && active) {
        SHARED(const half_t) a_rows = (SHARED(const half_t))(memory + parity * INPUT_STAGE);
        SHARED(const half_t) b_rows = (SHARED(const half_t))(weights + parity * WEIGHT_STAGE);
        UNROLL for (int k = 0; k < STEP; k += 16) {
          word a[4], b[4];
          read_tile<false>(a_rows + warp * 16 * STAGE_ROW + k, STAGE_ROW, lane, a);
          UNROLL for (int j = 0; j < COLUMN_TILES; j++) {
            read_tile<!RIGHT_BY_COLUMNS>(b_rows + j * 16 * STAGE_ROW + k, STAGE_ROW, lane, b);
            UNROLL for (int n = 0; n < 2; n++)
              multiply_add_as<T>(sum[j][n], a[0], a[1], a[2], a[3], b[n], b[2 + n]);
          }
        }
      }
      if (ahead < inputs)
        codes.store(weights + (1 - parity) * WEIGHT_STAGE + tid * (STAGE_ROW / 2));
      copies_done<0>();
      block_sync();
    }
    UNROLL for (int e = 0; e < 2; e++) {
      const int r = warp * 16 + fragment_row(lane) + 8 * e;
      if (r < start || r >= stop) continue;
      OUT(T) out = y + size_t(first + r) * outputs + column;
      UNROLL for (int j = 0; j < COLUMN_TILES; j++)
        UNROLL for (int n = 0; n < 2; n++)
          UNROLL for (int i = 0; i < 2; i++) {
            const int d = j * 16 + n * 8 + 2 * fragment_pair(lane) + i;
            if (column + d < outputs) out[d] = from_float<T>(sum[j][n][2 * e + i]);
          }
    }
  }
}
