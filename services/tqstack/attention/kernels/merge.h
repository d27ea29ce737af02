// The splits of `attend` into one result, rotated back: a block of MERGERS threads per query row.

CONST int MERGERS = 512;
CONST int MAX_SPLITS = 512;

template <int DV>
struct Merge {
  CONST int WIDTH = (DV + 31) / 32 * 32;       // threads that share a split
  CONST int GROUPS = MERGERS / WIDTH;          // splits that are read side by side
  CONST int SHARED_WORDS = MAX_SPLITS + GROUPS * WIDTH + 1;
};

template <int DV, bool SINKS, bool ROTATE, typename T>
FN void merge(IN(float) parts, IN(float) stats, IN(float) sinks, IN(float) signs, IN(Call) call,
              OUT(T) out, SHARED(float) decays, int thread, int index, int head) {
  typedef Merge<DV> S;
  SHARED(float) sums = decays + MAX_SPLITS;
  const int lane = thread % 32, splits = call->splits, column = index % COLUMNS;
  const int tiles = (call->rows + COLUMNS - 1) / COLUMNS;
  const size_t part = (size_t(head) * tiles + index / COLUMNS) * splits;
  parts += (part * COLUMNS + column) * DV;
  stats += part * COLUMNS * 2 + column;

  if (thread < 32) {
    float peak = FLOOR, total = 0;
    for (int i = lane; i < splits; i += 32) peak = fmax(peak, stats[i * 2 * COLUMNS]);
    peak = warp_max(peak);
    for (int i = lane; i < splits; i += 32) {
      float decay = fast_exp2(stats[i * 2 * COLUMNS] - peak);
      decays[i] = decay;
      total += decay * stats[(i * 2 + 1) * COLUMNS];
    }
    total = warp_sum(total);
    if (SINKS) {
      int query_head = head % call->kv_heads * (call->rows / call->query_tokens);
      query_head += index / call->query_tokens;
      total += fast_exp2(sinks[query_head] * LOG2_E - peak);
    }
    if (lane == 0) sums[S::GROUPS * S::WIDTH] = total;
  }
  block_sync();
  const int group = thread / S::WIDTH, d = thread % S::WIDTH;
  if (group < S::GROUPS) {
    float sum = 0;
    if (d < DV)
      UNROLL_8 for (int i = group; i < splits; i += S::GROUPS)
        sum += decays[i] * parts[size_t(i) * COLUMNS * DV + d];
    sums[thread] = sum;
  }
  block_sync();
  if (thread < 32) {
    constexpr int N = S::WIDTH / 32;
    float x[N], total = fmax(sums[S::GROUPS * S::WIDTH], 1e-30f);
    UNROLL for (int i = 0; i < N; i++) {
      x[i] = 0;
      UNROLL for (int g = 0; g < S::GROUPS; g++) x[i] += sums[g * S::WIDTH + i * 32 + lane];
      x[i] /= total;
    }
    if (ROTATE) hadamard<N>(x, lane);
    out += (size_t(head) * call->rows + index) * DV;
    UNROLL for (int i = 0; i < N; i++) {
      int at = i * 32 + lane;
      if (at < DV) out[at] = from_float<T>(ROTATE ? x[i] * signs[at] : x[i]);
    }
  }
}
