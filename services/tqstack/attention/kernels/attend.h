// Attention of up to 8 query rows over packed keys and values: a split of the keys per block.
//
// A warp takes 16 keys at a time, all of one block of packed tokens. It reads their codes, looks up
// halves, and multiplies them as 16 x 16 tiles by the queries, which are the 8 columns: all query
// heads of a KV head share what was decoded once. A dot product does not mind which 16 dimensions
// form a tile, so every lane takes those that lie side by side in its own words. Values go the same
// way, transposed.
//
// Queries are split into two halves each (high and low), keys and values are halves by nature, so
// only the softmax weights are rounded. They are kept as w = p * scale of the value, relative to
// the largest one, to use a half's range whatever the values' units; p is summed in float32. A
// scale may be negative: trellis codes say in its sign that a vector is stored mirrored.

CONST int TILE = 16;             // keys per warp and step
CONST int STEP = WARPS * TILE;   // keys from one of a warp's tiles to the next
CONST float SMALLEST = 6e-8f;    // about the smallest half above zero

template <int DK, int DV, int KB, int VB, int KW, int VW, int KG, int VG,
          bool ONE_TABLE>
struct Attend {
  typedef Layout<DK, KB, KW, KG, 4> K;
  typedef Layout<DV, VB, VW, VG, 8> V;
  CONST int LARGE_TABLE = ONE_TABLE ? 8192 : 4096;  // words; 48 KB hold all of a block
  typedef Table<KB, KW, LARGE_TABLE> KeyTable;
  typedef Table<VB, VW, LARGE_TABLE> ValueTable;
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

// One lane's words of a tile, of these rows behind the one whose span is `at` bytes into a block.
template <typename L, int GROUPS, int ROWS>
FN void read_codes(IN(word) block, word at, const LOCAL int (&rows)[ROWS], int lane,
                   LOCAL word (&words)[ROWS][GROUPS][L::WORDS]) {
  UNROLL for (int i = 0; i < ROWS; i++)
    UNROLL for (int g = 0; g < GROUPS; g++)
      L::read(block, at, rows[i] * L::ROW_BYTES + g * L::GROUP_BYTES, lane, words[i][g]);
}

// Prefetches what a warp will read of a plane two steps later. The compiler has no registers to
// keep more loads than those of one step in flight.
template <int BYTES>
FN void prefetch_tile(IN(word) block, word plane, word first, int lane) {
  UNROLL for (int at = 0; at < TILE * BYTES; at += 32 * 128)
    if (at + lane * 128 < TILE * BYTES)
      prefetch(block + (plane + first * BYTES + lane * 128) / 4 + at / 4);
}

template <int DK, int DV, int KB, int VB, int KW, int VW, int KG, int VG, bool ONE_TABLE,
          bool ROTATE, bool MASKED, int BLOCK, int SLABS, typename Q, typename M>
FN void attend(const LOCAL Slabs<SLABS>& slabs, IN(int) table, IN(word) key_entries,
               IN(word) value_entries, IN(Q) queries, IN(float) signs, IN(M) mask,
               IN(Extent) extents, IN(Call) call, OUT(float) parts, OUT(float) stats,
               SHARED(word) memory, int tid, int split, int tile, int head) {
  typedef Attend<DK, DV, KB, VB, KW, VW, KG, VG, ONE_TABLE> A;
  typedef typename A::K K;
  typedef typename A::V V;
  typedef typename A::KeyTable KeyTable;
  typedef typename A::ValueTable ValueTable;
  const int lane = tid % 32, warp = tid / 32;
  const int row = fragment_row(lane), pair = fragment_pair(lane);
  const int kv_heads = call->kv_heads, batch = head / kv_heads;
  const Extent extent = extents[batch];
  const int begin = first_seen(call, extent) / TILE * TILE + split * call->share;
  const int end = min(begin + call->share, packed_limit<BLOCK>(call, extent, extent.length - 1));
  if (begin >= end) {  // a sequence shorter than the others; `merge` then leaves its part unread
    if (tid < COLUMNS * 2) stats[tid] = tid < COLUMNS ? FLOOR : 0.0f;
    return;
  }
  // Where this head's codes and scales are in a block, in bytes.
  const word own = head % kv_heads * BLOCK, all = kv_heads * BLOCK;
  const word key_plane = own * K::ROW_BYTES;
  const word key_scale_plane = all * K::ROW_BYTES + own * (2 * KG);
  const word value_plane = all * (K::ROW_BYTES + 2 * KG) + own * V::ROW_BYTES;
  const word value_scale_plane =
      all * (K::ROW_BYTES + 2 * KG + V::ROW_BYTES) + own * (2 * VG);
  const int block_words = all * (K::ROW_BYTES + 2 * KG + V::ROW_BYTES + 2 * VG) / 4;
  // What a lane reads of a tile: of keys rows `row` and row + 8, of values those around 2 * pair.
  const int key_rows[2] = {0, 8}, value_rows[4] = {0, 1, 8, 9};
  const word key_lane = key_plane + row * K::ROW_BYTES + pair * K::SPAN_BYTES;
  const word value_lane = value_plane + 2 * pair * V::ROW_BYTES + row * V::SPAN_BYTES;
  const word key_scale_lane = key_scale_plane / 2 + row * KG;  // in halves
  const word value_scale_lane = value_scale_plane / 2 + row * VG;
  // The codes of the first keys are asked for before anything else. Ids of blocks are read three
  // steps ahead, so that no address waits for one.
  table += size_t(batch) * call->capacity;
  const int start = begin + warp * TILE;
  IN(word) here = block_row(slabs, table[min(start, end - 1) / BLOCK], block_words);
  IN(word) next = block_row(slabs, table[min(start + STEP, end - 1) / BLOCK], block_words);
  int id_after = table[min(start + 2 * STEP, end - 1) / BLOCK];
  word key_codes[2][KG][K::WORDS], value_codes[4][VG][V::WORDS];
  const word first_key = word(start) % BLOCK;
  if (start < end)
    read_codes<K, KG, 2>(here, key_lane + first_key * K::ROW_BYTES, key_rows, pair, key_codes);

  fill_table<KeyTable, THREADS>(memory, key_entries, tid);
  if (!ONE_TABLE)
    fill_table<ValueTable, THREADS>(memory + A::VALUE_TABLE, value_entries, tid);
  queries += (size_t(head) * call->rows + tile * COLUMNS) * DK;
  prepare_queries<A, DK, ROTATE>(queries, signs, call->rows - tile * COLUMNS, memory, tid);
  SHARED(float) sizes = (SHARED(float))memory + A::SIZES;
  SHARED(const word) right = memory + A::QUERIES + lane * 4;
  word factors[A::PRODUCTS][4];
  UNROLL for (int i = 0; i < A::PRODUCTS; i++) read_shared_4(right + i * 128, factors[i]);

  // This lane's two columns: query rows 2 * pair and 2 * pair + 1, and the keys that they see.
  int lower[2], upper[2];
  float factor[2];
  size_t mask_row[2];
  UNROLL for (int e = 0; e < 2; e++) {
    const int column = 2 * pair + e;
    const Seen seen = seen_by<BLOCK>(call, extent, head, tile * COLUMNS + column);
    lower[e] = seen.lower;
    upper[e] = min(seen.upper, seen.limit);
    mask_row[e] = seen.mask_row;
    factor[e] = sizes[column] * call->scale * LOG2_E;
  }
  float m[2] = {FLOOR, FLOOR}, l[2] = {0, 0}, sum[VG * A::PAIRS][4];
  UNROLL for (int i = 0; i < VG * A::PAIRS; i++)
    UNROLL for (int x = 0; x < 4; x++) sum[i][x] = 0;
  const word key_copy = lane % KeyTable::COPIES * 4;
  const word value_copy = lane % ValueTable::COPIES * 4;

  for (int base = start; base < end; base += STEP) {
    const word first = word(base) % BLOCK;  // key of a block
    read_codes<V, VG, 4>(here, value_lane + first * V::ROW_BYTES, value_rows, row, value_codes);
    IN(word) after = block_row(slabs, id_after, block_words);
    id_after = table[word(min(base + 3 * STEP, end - 1)) / BLOCK];
    if (base + 2 * STEP < end) {
      const word ahead = word(base + 2 * STEP) % BLOCK;
      prefetch_tile<K::ROW_BYTES>(after, key_plane, ahead, lane);
      prefetch_tile<V::ROW_BYTES>(after, value_plane, ahead, lane);
      prefetch_tile<2 * KG>(after, key_scale_plane, ahead, lane);
      prefetch_tile<2 * VG>(after, value_scale_plane, ahead, lane);
    }

    float key_scale[2][KG], value_scale[2][VG];
    IN(half_t) key_scales = (IN(half_t))here + (key_scale_lane + first * KG);
    IN(half_t) value_scales = (IN(half_t))here + (value_scale_lane + first * VG);
    UNROLL for (int i = 0; i < 2; i++) {
      UNROLL for (int g = 0; g < KG; g++) key_scale[i][g] = to_float(key_scales[8 * i * KG + g]);
      UNROLL for (int g = 0; g < VG; g++)
        value_scale[i][g] = to_float(value_scales[8 * i * VG + g]);
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
      bool seen = key < upper[e] && key >= lower[e];
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
    const word first_next = word(base + STEP) % BLOCK;
    if (base + STEP < end)
      read_codes<K, KG, 2>(next, key_lane + first_next * K::ROW_BYTES, key_rows, pair, key_codes);
    here = next;
    next = after;

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
