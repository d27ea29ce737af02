// The splits of `attend` into one result, rotated back: a block of MERGERS threads per query row.

CONST int MERGERS = 512;
CONST int MAX_SPLITS = 512;

template <int DV>
struct Merge {
  CONST int WIDTH = (DV + 127) / 128 * 32;  // threads that share a split, four values each
  CONST int GROUPS = MERGERS / WIDTH;       // splits that are read side by side
  CONST int VALUES = WIDTH * 4;
  CONST int SHARED_WORDS = MAX_SPLITS + GROUPS * VALUES + 1;
};

template <int DV, bool SINKS, bool ROTATE, typename T>
FN void merge(IN(float) parts, IN(float) stats, IN(float) sinks, IN(float) signs, IN(Call) call,
              OUT(T) out, SHARED(float) decays, int thread, int index, int head) {
  typedef Merge<DV> S;
  SHARED(float) sums = decays + MAX_SPLITS;
  SHARED(float) total = sums + S::GROUPS * S::VALUES;
  const int lane = thread % 32, splits = call->splits, column = index % COLUMNS;
  const int tiles = (call->rows + COLUMNS - 1) / COLUMNS;
  const size_t part = (size_t(head) * tiles + index / COLUMNS) * splits;
  parts += (part * COLUMNS + column) * DV;
  stats += part * COLUMNS * 2 + column;

  float peak = FLOOR;
  UNROLL_8 for (int i = lane; i < splits; i += 32) peak = fmax(peak, stats[i * 2 * COLUMNS]);
  peak = warp_max(peak);
  for (int i = thread; i < splits; i += MERGERS)
    decays[i] = fast_exp2(stats[i * 2 * COLUMNS] - peak);
  block_sync();
  if (thread < 32) {
    float l = 0;
    UNROLL_8 for (int i = lane; i < splits; i += 32)
      l += decays[i] * stats[(i * 2 + 1) * COLUMNS];
    l = warp_sum(l);
    if (SINKS) {
      int query_head = head % call->kv_heads * (call->rows / call->query_tokens);
      query_head += index / call->query_tokens;
      l += fast_exp2(sinks[query_head] * LOG2_E - peak);
    }
    if (lane == 0) *total = fmax(l, 1e-30f);
  }
  const int group = thread / S::WIDTH, d = thread % S::WIDTH * 4;
  if (group < S::GROUPS) {
    float sum[4] = {0, 0, 0, 0};
    if (d < DV)
      UNROLL_8 for (int i = group; i < splits; i += S::GROUPS) {
        float x[4], decay = decays[i];
        read_values<4>(parts + size_t(i) * COLUMNS * DV + d, x);
        UNROLL for (int j = 0; j < 4; j++) sum[j] += decay * x[j];
      }
    UNROLL for (int j = 0; j < 4; j++) sums[group * S::VALUES + d + j] = sum[j];
  }
  block_sync();
  if (thread < 32) {
    constexpr int N = (DV + 31) / 32;
    float x[N];
    UNROLL for (int i = 0; i < N; i++) {
      x[i] = 0;
      UNROLL for (int g = 0; g < S::GROUPS; g++) x[i] += sums[g * S::VALUES + i * 32 + lane];
      x[i] /= *total;
    }
    if (ROTATE) hadamard<N>(x, lane);
    out += (size_t(head) * call->rows + index) * DV;
    UNROLL for (int i = 0; i < N; i++) {
      int at = i * 32 + lane;
      if (at < DV) out[at] = from_float<T>(ROTATE ? x[i] * signs[at] : x[i]);
    }
  }
}
