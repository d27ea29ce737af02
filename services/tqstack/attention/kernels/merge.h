// The splits of `attend_exact` and `attend`, or of `flash`, into one result: a block of MERGERS threads
// per query row, as many as there are splits or more. Sums over packed values are in the rotated domain and are rotated back here; exact ones come
// first and are as the model made them. Where this cannot be done here (no ROTATE), both are given
// out, in float32: packed ones behind the exact ones of all rows.

// A row's weighted values in its lanes, exact ones (0) and packed ones (1), as a warp writes them.
template <int DV, bool SINKS, bool ROTATE, typename T>
FN void write_row(LOCAL float (&x)[2][(DV + 31) / 32], float total, float peak, IN(float) sinks,
                  IN(float) signs, IN(Call) call, OUT(T) out, int lane, int index, int head) {
  constexpr int N = (DV + 31) / 32;
  if (SINKS) {
    int query_head = head % call->kv_heads * (call->rows / call->query_tokens);
    query_head += index / call->query_tokens;
    total += fast_exp2(sinks[query_head] * LOG2_E - peak);
  }
  UNROLL for (int side = 0; side < 2; side++)
    UNROLL for (int i = 0; i < N; i++) x[side][i] /= fmax(total, 1e-30f);
  if (ROTATE) hadamard<N>(x[1], lane);
  const size_t side = size_t(call->batch) * call->kv_heads * call->rows * DV;
  out += (size_t(head) * call->rows + index) * DV;
  UNROLL for (int i = 0; i < N; i++) {
    const int at = i * 32 + lane;
    if (at >= DV) continue;
    if (ROTATE) {
      out[at] = from_float<T>(x[0][i] + x[1][i] * signs[at]);
    } else {
      out[at] = from_float<T>(x[0][i]);
      out[side + at] = from_float<T>(x[1][i]);
    }
  }
}

template <int DV, int MERGERS>
struct Merge {
  CONST int WIDTH = (DV + 127) / 128 * 32;  // threads that share a split, four values each
  CONST int GROUPS = MERGERS / WIDTH;       // splits that are read side by side
  CONST int VALUES = WIDTH * 4;
  CONST int SUMS = GROUPS * VALUES;
  CONST int SHARED_WORDS = MERGERS + 2 * SUMS + 2 * (MERGERS / 32);
};

template <int DV, int MERGERS, bool SINKS, bool ROTATE, typename T>
FN void merge(IN(float) parts, IN(float) stats, IN(float) sinks, IN(float) signs, IN(Call) call,
              OUT(T) out, SHARED(float) decays, int tid, int index, int head) {
  typedef Merge<DV, MERGERS> S;
  SHARED(float) sums = decays + MERGERS;     // exact ones, then packed ones
  SHARED(float) peaks = sums + 2 * S::SUMS;  // of every warp
  SHARED(float) totals = peaks + MERGERS / 32;
  const int lane = tid % 32, warp = tid / 32;
  const int exact = call->exact_splits, splits = exact + call->splits;
  const int column = index % COLUMNS, tiles = (call->rows + COLUMNS - 1) / COLUMNS;
  const size_t part = (size_t(head) * tiles + index / COLUMNS) * splits;
  parts += (part * COLUMNS + column) * DV;
  stats += part * COLUMNS * 2 + column;

  const float m = tid < splits ? stats[tid * 2 * COLUMNS] : FLOOR;
  const float l = tid < splits ? stats[(tid * 2 + 1) * COLUMNS] : 0.0f;
  float peak = warp_max(m);
  if (lane == 0) peaks[warp] = peak;
  block_sync();
  peak = warp_max(peaks[lane % (MERGERS / 32)]);
  const float own = l > 0 ? fast_exp2(m - peak) : 0.0f;
  decays[tid] = own;
  const float total_of_warp = warp_sum(own * l);
  if (lane == 0) totals[warp] = total_of_warp;
  block_sync();

  const int group = tid / S::WIDTH, d = tid % S::WIDTH * 4;
  float sum[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
  if (group < S::GROUPS && d < DV)
    for (int first = group; first < splits; first += 8 * S::GROUPS) {
      float x[8][4];  // eight splits are read at once, and the reads waited for together
      UNROLL for (int j = 0; j < 8; j++) {
        const int i = first + j * S::GROUPS;
        UNROLL for (int k = 0; k < 4; k++) x[j][k] = 0;
        if (i < splits && decays[i] > 0)
          read_values<4>(parts + size_t(i) * COLUMNS * DV + d, x[j]);
      }
      UNROLL for (int j = 0; j < 8; j++) {
        const int i = first + j * S::GROUPS;
        const float decay = decays[i < splits ? i : 0];
        UNROLL for (int k = 0; k < 4; k++) {
          sum[0][k] += x[j][k] * (i < exact ? decay : 0.0f);
          sum[1][k] += x[j][k] * (i < exact ? 0.0f : decay);
        }
      }
    }
  if (group < S::GROUPS)
    UNROLL for (int side = 0; side < 2; side++)
      UNROLL for (int k = 0; k < 4; k++)
        sums[side * S::SUMS + group * S::VALUES + d + k] = sum[side][k];
  block_sync();
  if (tid < 32) {
    constexpr int N = (DV + 31) / 32;
    float x[2][N], total = 0;
    UNROLL for (int w = 0; w < MERGERS / 32; w++) total += totals[w];
    UNROLL for (int side = 0; side < 2; side++)
      UNROLL for (int i = 0; i < N; i++) {
        x[side][i] = 0;
        UNROLL for (int g = 0; g < S::GROUPS; g++)
          x[side][i] += sums[side * S::SUMS + g * S::VALUES + i * 32 + lane];
      }
    write_row<DV, SINKS, ROTATE>(x, total, peak, sinks, signs, call, out, lane, index, head);
  }
}

// The same of a few splits, by a warp per query row.
template <int DV, bool SINKS, bool ROTATE, typename T>
FN void merge_few(IN(float) parts, IN(float) stats, IN(float) sinks, IN(float) signs, IN(Call) call,
                  OUT(T) out, int tid, int block, int head) {
  constexpr int N = (DV + 31) / 32;
  const int lane = tid % 32, index = block * WARPS + tid / 32;
  if (index >= call->rows) return;
  const int exact = call->exact_splits, splits = exact + call->splits;
  const int column = index % COLUMNS, tiles = (call->rows + COLUMNS - 1) / COLUMNS;
  const size_t part = (size_t(head) * tiles + index / COLUMNS) * splits;
  parts += (part * COLUMNS + column) * DV;
  stats += part * COLUMNS * 2 + column;
  float peak = FLOOR, total = 0, x[2][N];
  for (int i = 0; i < splits; i++) peak = fmax(peak, stats[i * 2 * COLUMNS]);
  UNROLL for (int i = 0; i < N; i++) x[0][i] = x[1][i] = 0;
  for (int i = 0; i < splits; i++) {
    const float l = stats[(i * 2 + 1) * COLUMNS];
    const float decay = l > 0 ? fast_exp2(stats[i * 2 * COLUMNS] - peak) : 0.0f;
    if (decay == 0) continue;
    total += decay * l;
    UNROLL for (int j = 0; j < N; j++) {
      const int d = j * 32 + lane;
      const float value = d < DV ? parts[size_t(i) * COLUMNS * DV + d] * decay : 0.0f;
      x[0][j] += i < exact ? value : 0.0f;
      x[1][j] += i < exact ? 0.0f : value;
    }
  }
  write_row<DV, SINKS, ROTATE>(x, total, peak, sinks, signs, call, out, lane, index, head);
}
