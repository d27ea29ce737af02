// Attention of up to 8 query rows over packed keys and values: a split of the keys per block.
//
// A warp takes 16 keys at a time. It reads their codes, looks up halves, and multiplies them as
// 16 x 16 tiles by the queries, which are the 8 columns: all query heads of a KV head share what
// was decoded once. A dot product does not mind which 16 dimensions form a tile, so every lane
// takes those that lie side by side in its own words. Values go the same way, transposed.
//
// Queries are split into two halves each (high and low), keys and values are halves by nature, so
// only the softmax weights are rounded. They are kept as w = p * scale of the value, relative to
// the largest one, to use a half's range whatever the values' units; p is summed in float32. A
// scale may be negative: trellis codes say in its sign that a vector is stored mirrored.

CONST int WARPS = 4;
CONST int THREADS = 32 * WARPS;
CONST int TILE = 16;             // keys per warp and step
CONST int COLUMNS = 8;           // query rows per block
CONST float FLOOR = -1e30f;      // below every score, and finite
CONST float SMALLEST = 6e-8f;    // about the smallest half above zero
CONST float LOG2_E = 1.44269504f;

// What changes from call to call.
struct Call {
  int batch, kv_heads, capacity, stop;
  int splits, share;  // blocks per sequence, and how many keys each of them takes
  int rows;          // query rows per KV head: query heads that share it * query tokens
  int query_tokens;  // the last of them is token stop - 1
  int causal, window;
  int mask_strides[4];  // batch, query head, query token, key
  float scale;
};

template <int DK, int DV, int KB, int VB, int KW, int VW, int KG, int VG,
          bool ONE_TABLE>
struct Attend {
  typedef Layout<DK, KB, KW, KG, 4> K;
  typedef Layout<DV, VB, VW, VG, 8> V;
  typedef Table<KB, KW, ONE_TABLE> KeyTable;
  typedef Table<VB, VW, ONE_TABLE> ValueTable;
  CONST int STEPS = K::SPAN / 4;  // products of 16 dimensions per group of a key
  CONST int PAIRS = V::SPAN / 2;  // products of 16 dimensions per group of a value
  // Shared memory: tables, and when they are done the merged sums; then queries; then sizes.
  CONST int VALUE_TABLE = ONE_TABLE ? 0 : KeyTable::WORDS;  // where it starts
  CONST int TABLES = VALUE_TABLE + ValueTable::WORDS;
  CONST int MERGED = VG * PAIRS * 4 * 33;
  CONST int QUERIES = ((TABLES > MERGED ? TABLES : MERGED) + 31) / 32 * 32;
  CONST int PRODUCTS = KG * STEPS;
  CONST int STAGED = COLUMNS * (DK + 1);  // the queries' words, and before that their values
  CONST int SIZES = QUERIES + (PRODUCTS * 128 > STAGED ? PRODUCTS * 128 : STAGED);
  CONST int SHARED_WORDS = SIZES + WARPS * COLUMNS;
};

// The block's query rows: rotated, divided by their largest entry, and left in shared memory as
// right factors, high and low: four words for every product and lane.
template <typename A, int DK, bool ROTATE, typename Q>
FN void prepare_queries(IN(Q) queries, IN(float) signs, int rows, SHARED(word) memory, int tid) {
  typedef typename A::K K;
  const int lane = tid % 32, warp = tid / 32;
  constexpr int N = (DK + 31) / 32;
  SHARED(float) staged = (SHARED(float))memory + A::QUERIES;
  SHARED(float) sizes = (SHARED(float))memory + A::SIZES;
  float x[COLUMNS / WARPS][N];
  UNROLL for (int j = 0; j < COLUMNS / WARPS; j++)
    UNROLL for (int i = 0; i < N; i++) {
      int d = i * 32 + lane, column = warp + j * WARPS;
      x[j][i] = column < rows && d < DK ? to_float(queries[column * DK + d]) : 0.0f;
      if (ROTATE) x[j][i] *= signs[d];
    }
  UNROLL for (int j = 0; j < COLUMNS / WARPS; j++) {
    const int column = warp + j * WARPS;
    if (ROTATE) hadamard<N>(x[j], lane);
    float size = 0;
    UNROLL for (int i = 0; i < N; i++) size = fmax(size, fabs(x[j][i]));
    size = fmax(warp_max(size), 1e-30f);
    if (lane == 0) sizes[column] = size;
    UNROLL for (int i = 0; i < N; i++)
      if (i * 32 + lane < DK) staged[column * (DK + 1) + i * 32 + lane] = x[j][i] / size;
  }
  block_sync();
  const int row = fragment_row(lane), pair = fragment_pair(lane);
  constexpr int SHARE = (A::PRODUCTS + WARPS - 1) / WARPS;
  word factors[SHARE][4];
  UNROLL for (int j = 0; j < SHARE; j++) {
    const int product = warp + j * WARPS;
    UNROLL for (int tile = 0; tile < 2; tile++) {
      float pair_of[2];
      UNROLL for (int e = 0; e < 2; e++) {
        int column = RIGHT_BY_COLUMNS ? row : 2 * pair + e;
        int k = RIGHT_BY_COLUMNS ? 2 * pair + e : row;
        int at = k / 2 * K::SPAN + 4 * (product % A::STEPS) + 2 * tile + k % 2;
        int d = product / A::STEPS * K::GROUP + at;
        bool inside = product < A::PRODUCTS && at < K::GROUP;
        pair_of[e] = inside ? staged[column * (DK + 1) + d] : 0.0f;
      }
      word high = pack_halves(pair_of[0], pair_of[1]);
      factors[j][tile] = high;
      factors[j][2 + tile] =
          pack_halves(pair_of[0] - low_half(high), pair_of[1] - high_half(high));
    }
  }
  block_sync();
  UNROLL for (int j = 0; j < SHARE; j++) {
    const int product = warp + j * WARPS;
    if (product < A::PRODUCTS)
      UNROLL for (int i = 0; i < 4; i++)
        memory[A::QUERIES + (product * 32 + lane) * 4 + i] = factors[j][i];
  }
  block_sync();
}

// One lane's words of ROWS rows of a plane, for every group.
template <typename L, int GROUPS, int ROWS>
FN void read_codes(IN(word) plane, const LOCAL size_t (&rows)[ROWS], int lane, size_t last,
                   LOCAL word (&words)[ROWS][GROUPS][L::WORDS]) {
  UNROLL for (int i = 0; i < ROWS; i++)
    UNROLL for (int g = 0; g < GROUPS; g++)
      L::read(plane, rows[i], g, lane, last, words[i][g]);
}

// Prefetches what a warp will read of a plane two steps later. The compiler has no registers to
// keep more loads than those of one step in flight.
template <int BYTES, typename T>
FN void prefetch_tile(IN(T) plane, size_t row, int lane) {
  UNROLL for (int at = 0; at < TILE * BYTES; at += 32 * 128)
    if (at + lane * 128 < TILE * BYTES)
      prefetch(plane + (row * BYTES + at + lane * 128) / sizeof(T));
}

template <int DK, int DV, int KB, int VB, int KW, int VW, int KG, int VG,
          bool ONE_TABLE, bool ROTATE, bool MASKED, typename Q, typename M>
FN void attend(IN(word) keys, IN(half_t) key_scales, IN(word) values, IN(half_t) value_scales,
               IN(word) key_entries, IN(word) value_entries, IN(Q) queries, IN(float) signs,
               IN(M) mask, IN(int) starts, IN(Call) call, OUT(float) parts, OUT(float) stats,
               SHARED(word) memory, int tid, int split, int tile, int head) {
  typedef Attend<DK, DV, KB, VB, KW, VW, KG, VG, ONE_TABLE> A;
  typedef typename A::K K;
  typedef typename A::V V;
  typedef typename A::KeyTable KeyTable;
  typedef typename A::ValueTable ValueTable;
  const int lane = tid % 32, warp = tid / 32;
  const int row = fragment_row(lane), pair = fragment_pair(lane);
  const int capacity = call->capacity, stop = call->stop, tokens = call->query_tokens;
  const int rows = call->rows - tile * COLUMNS;  // those of this block
  const int batch = head / call->kv_heads;
  const size_t first_row = size_t(head) * capacity;

  int begin = starts[batch];
  if (call->window) begin = max(begin, stop - tokens - call->window + 1);
  begin += split * call->share;
  const int end = min(begin + call->share, stop);
  const int tiles = (call->rows + COLUMNS - 1) / COLUMNS;
  const size_t part = (size_t(head) * tiles + tile) * call->splits + split;
  parts += part * COLUMNS * DV;
  stats += part * COLUMNS * 2;
  if (begin >= end) {  // a sequence shorter than the others; `merge` then leaves its part unread
    if (tid < COLUMNS * 2) stats[tid] = tid < COLUMNS ? FLOOR : 0.0f;
    return;
  }
  // The codes of the first keys are asked for before anything else: rows `row` and row + 8.
  const size_t plane_rows = size_t(call->batch) * call->kv_heads * capacity;
  const size_t last_key = (plane_rows * K::ROW_BYTES + 3) / 4 - 1;
  const size_t last_value = (plane_rows * V::ROW_BYTES + 3) / 4 - 1;
  size_t key_rows[2], value_rows[4];
  word key_codes[2][KG][K::WORDS], value_codes[4][VG][V::WORDS];
  UNROLL for (int i = 0; i < 2; i++)
    key_rows[i] = first_row + min(begin + warp * TILE + row + 8 * i, stop - 1);
  if (begin + warp * TILE < end) read_codes<K, KG, 2>(keys, key_rows, pair, last_key, key_codes);

  fill_table<KeyTable, THREADS>(memory, key_entries, tid);
  if (!ONE_TABLE)
    fill_table<ValueTable, THREADS>(memory + A::VALUE_TABLE, value_entries, tid);
  queries += (size_t(head) * call->rows + tile * COLUMNS) * DK;
  prepare_queries<A, DK, ROTATE>(queries, signs, rows, memory, tid);
  SHARED(float) sizes = (SHARED(float))memory + A::SIZES;
  SHARED(const word) right = memory + A::QUERIES + lane * 4;
  word factors[A::PRODUCTS][4];
  UNROLL for (int i = 0; i < A::PRODUCTS; i++) read_shared_4(right + i * 128, factors[i]);

  // This lane's two columns: query rows 2 * pair and 2 * pair + 1, and the keys that they see.
  int lower[2], upper[2];
  float factor[2];
  size_t mask_row[2];
  UNROLL for (int e = 0; e < 2; e++) {
    int column = 2 * pair + e, index = tile * COLUMNS + column;
    int token = index % tokens, query_head = head % call->kv_heads * (call->rows / tokens);
    query_head += index / tokens;
    int self = stop - tokens + token;
    upper[e] = column >= rows ? -1 : call->causal ? self + 1 : stop;
    lower[e] = call->window ? self - call->window + 1 : 0;
    factor[e] = sizes[column] * call->scale * LOG2_E;
    mask_row[e] = size_t(batch) * call->mask_strides[0] +
                  size_t(query_head) * call->mask_strides[1] +
                  size_t(token) * call->mask_strides[2];
  }
  float m[2] = {FLOOR, FLOOR}, l[2] = {0, 0}, sum[VG * A::PAIRS][4];
  UNROLL for (int i = 0; i < VG * A::PAIRS; i++)
    UNROLL for (int x = 0; x < 4; x++) sum[i][x] = 0;
  const word key_copy = lane % KeyTable::COPIES * 4;
  const word value_copy = lane % ValueTable::COPIES * 4;

  for (int base = begin + warp * TILE; base < end; base += WARPS * TILE) {
    UNROLL for (int i = 0; i < 4; i++)
      value_rows[i] = first_row + min(base + 2 * pair + i % 2 + i / 2 * 8, stop - 1);
    read_codes<V, VG, 4>(values, value_rows, row, last_value, value_codes);
    if (base + 3 * WARPS * TILE < end) {
      const size_t ahead = first_row + base + 2 * WARPS * TILE;
      prefetch_tile<K::ROW_BYTES>(keys, ahead, lane);
      prefetch_tile<V::ROW_BYTES>(values, ahead, lane);
      prefetch_tile<2 * KG>(key_scales, ahead, lane);
      prefetch_tile<2 * VG>(value_scales, ahead, lane);
    }

    float key_scale[2][KG], value_scale[2][VG];
    UNROLL for (int i = 0; i < 2; i++) {
      UNROLL for (int g = 0; g < KG; g++)
        key_scale[i][g] = to_float(key_scales[key_rows[i] * KG + g]);
      UNROLL for (int g = 0; g < VG; g++)
        value_scale[i][g] = to_float(value_scales[key_rows[i] * VG + g]);
    }

    // Scores of keys row (0, 1) and row + 8 (2, 3) with columns 2 * pair (0, 2) and the next.
    float score[4] = {0, 0, 0, 0}, inverse[2], logarithm[2];
    UNROLL for (int g = 0; g < KG; g++) {
      float dot[4][4];  // four sums side by side: a product waits for the one that it adds to
      UNROLL for (int i = 0; i < 16; i++) dot[i / 4][i % 4] = 0;
      UNROLL for (int step = 0; step < A::STEPS; step++) {
        word a[4];
        const LOCAL word(&b)[4] = factors[g * A::STEPS + step];
        UNROLL for (int i = 0; i < 4; i++)
          a[i] = decode_pair<KeyTable>(key_codes[i % 2][g], 2 * step + i / 2, memory, key_copy);
        multiply_add(dot[step % 2], a[0], a[1], a[2], a[3], b[0], b[1]);
        multiply_add(dot[2 + step % 2], a[0], a[1], a[2], a[3], b[2], b[3]);
      }
      UNROLL for (int i = 0; i < 4; i++)
        score[i] += (dot[0][i] + dot[1][i] + dot[2][i] + dot[3][i]) * key_scale[i / 2][g];
    }
    UNROLL for (int i = 0; i < 2; i++) {
      float largest = SMALLEST;
      UNROLL for (int g = 0; g < VG; g++) largest = fmax(largest, fabs(value_scale[i][g]));
      logarithm[i] = fast_log2(largest);
      inverse[i] = fast_exp2(-logarithm[i]);
      UNROLL for (int g = 0; g < VG; g++) value_scale[i][g] *= inverse[i];
    }
    float peak[2] = {FLOOR, FLOOR};
    UNROLL for (int i = 0; i < 4; i++) {
      int e = i % 2, key = base + row + i / 2 * 8;
      bool seen = key < min(upper[e], end) && key >= lower[e];
      score[i] = score[i] * factor[e] + logarithm[i / 2];
      if (MASKED) {
        if (seen) {
          float extra = mask_value(mask[mask_row[e] + size_t(key) * call->mask_strides[3]]);
          score[i] += extra * LOG2_E;
          seen = extra > FLOOR;
        }
      }
      score[i] = seen ? score[i] : 2 * FLOOR;
      peak[e] = fmax(peak[e], score[i]);
    }
    UNROLL for (int i = 0; i < 2; i++)
      key_rows[i] = first_row + min(base + WARPS * TILE + row + 8 * i, stop - 1);
    if (base + WARPS * TILE < end)
      read_codes<K, KG, 2>(keys, key_rows, pair, last_key, key_codes);

    float decay[2], weight[4];
    UNROLL for (int e = 0; e < 2; e++) {
      UNROLL for (int i = 0; i < 3; i++)
        peak[e] = fmax(peak[e], shuffle_xor(peak[e], row_lanes(i)));
      peak[e] = fmax(peak[e], m[e]);
      decay[e] = fast_exp2(m[e] - peak[e]);
      m[e] = peak[e];
      l[e] *= decay[e];
    }
    UNROLL for (int i = 0; i < 4; i++) {
      weight[i] = score[i] > FLOOR ? fast_exp2(score[i] - m[i % 2]) : 0.0f;
      l[i % 2] += weight[i] * inverse[i / 2];
    }
    if (decay[0] != 1.0f || decay[1] != 1.0f)
      UNROLL for (int i = 0; i < VG * A::PAIRS; i++)
        UNROLL for (int x = 0; x < 4; x++) sum[i][x] *= decay[x % 2];

    UNROLL for (int g = 0; g < VG; g++) {
      word w[2];
      UNROLL for (int i = 0; i < 2; i++)
        w[i] = as_right_factor(
            pack_halves(weight[2 * i] * value_scale[i][g], weight[2 * i + 1] * value_scale[i][g]));
      UNROLL for (int at = 0; at < A::PAIRS; at++) {
        word x[4];
        UNROLL for (int i = 0; i < 4; i++)
          x[i] = decode_pair<ValueTable>(value_codes[i][g], at, memory + A::VALUE_TABLE,
                                         value_copy);
        multiply_add(sum[g * A::PAIRS + at], low_halves(x[0], x[1]), high_halves(x[0], x[1]),
                     low_halves(x[2], x[3]), high_halves(x[2], x[3]), w[0], w[1]);
      }
    }
  }

  // The block's warps become one: relative to the largest maximum, added up in shared memory.
  UNROLL for (int e = 0; e < 2; e++)
    UNROLL for (int i = 0; i < 3; i++) l[e] += shuffle_xor(l[e], row_lanes(i));
  SHARED(float) peaks = sizes;  // (WARPS, COLUMNS)
  SHARED(float) merged = (SHARED(float))memory;
  block_sync();
  if (row == 0)
    UNROLL for (int e = 0; e < 2; e++) peaks[warp * COLUMNS + 2 * pair + e] = m[e];
  block_sync();
  UNROLL for (int e = 0; e < 2; e++) {
    float peak = FLOOR;
    for (int w = 0; w < WARPS; w++) peak = fmax(peak, peaks[w * COLUMNS + 2 * pair + e]);
    float decay = fast_exp2(m[e] - peak);
    m[e] = peak;
    l[e] *= decay;
    UNROLL for (int i = 0; i < VG * A::PAIRS; i++) {
      sum[i][e] *= decay;
      sum[i][e + 2] *= decay;
    }
  }
  block_sync();
  for (int w = 0; w < WARPS; w++) {
    if (w == warp) {
      UNROLL for (int i = 0; i < VG * A::PAIRS; i++)
        UNROLL for (int x = 0; x < 4; x++) {
          int at = (4 * i + x) * 33 + lane;
          merged[at] = w ? merged[at] + sum[i][x] : sum[i][x];
        }
      if (row == 0)
        UNROLL for (int e = 0; e < 2; e++) {
          int column = 2 * pair + e;
          peaks[column] = w ? peaks[column] + l[e] : l[e];
        }
    }
    block_sync();
  }
  if (warp == 0 && row == 0)
    UNROLL for (int e = 0; e < 2; e++) {
      stats[2 * pair + e] = m[e];
      stats[COLUMNS + 2 * pair + e] = peaks[2 * pair + e];
    }
  for (int i = tid; i < COLUMNS * DV; i += THREADS) {
    int column = i / DV, d = i % DV, group = d / V::GROUP, at = d % V::GROUP;
    int holder = fragment_lane(at / V::SPAN, column / 2);
    int x = column % 2 + at % 2 * 2, step = group * A::PAIRS + at % V::SPAN / 2;
    parts[i] = merged[(4 * step + x) * 33 + holder];
  }
}
