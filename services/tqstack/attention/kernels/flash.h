// Attention of many query rows over keys and values that are halves (`expand.h`, `halves.h`):
// scores never leave the chip. A block of threads takes 16 rows per warp, or per SHARERS warps, and
// walks over the keys, FLASH_KEYS at a time, with an online softmax.
//
// Scores are sums in float32 of products of halves; LOW adds the queries' low halves. As in
// `attend.h` softmax weights are kept as w = p * size of the value, relative to the largest one, and
// p is summed in float32. SHARERS warps divide the keys of a step among them for the scores, and
// then the dimensions of the values: a warp's registers, or its threadgroup's, hold no more.
//
// Packed keys may come in several launches, each with a span of them: a launch begins with the sums
// that the one before left.

template <int DK, int DV, bool LOW>
struct Flash {
  CONST int ROWS = 16 * WARPS / SHARERS;
  CONST int KEYS = FLASH_KEYS;
  CONST int KEY_TILES = KEYS / 16 / SHARERS;                  // of 16 keys, a warp's
  CONST int VALUE_TILES = (DV / 16 + SHARERS - 1) / SHARERS;  // of 16 dimensions
  // Rows of halves in shared memory; neighbouring ones begin in different banks.
  CONST int KEY_ROW = STAGED ? DK + 8 : DK, VALUE_ROW = STAGED ? DV + 8 : DV;
  CONST int WEIGHT_ROW = KEYS + 8;
  // Shared memory, in words.
  CONST int LOW_QUERIES = ROWS * KEY_ROW / 2;
  CONST int KEY_STAGE = STAGED ? LOW_QUERIES * (LOW ? 2 : 1) : 0;
  CONST int VALUE_STAGE = KEY_STAGE + (STAGED ? KEYS * KEY_ROW / 2 : 0);
  CONST int SIZE_STAGE = VALUE_STAGE + (STAGED ? KEYS * VALUE_ROW / 2 : 0);  // two of them
  CONST int WEIGHTS = SIZE_STAGE + 2 * KEYS * SIZES;
  CONST int PEAKS = WEIGHTS + (SHARERS > 1 ? ROWS * WEIGHT_ROW / 2 : 0);
  CONST int SHARED_WORDS = PEAKS + (SHARERS > 1 ? SHARERS * ROWS : 0);
};

// Keys and values (heads, tokens, dimensions) as halves, and sizes (heads, tokens, SIZES).
struct Halves {
  IN(half_t) keys;
  IN(half_t) values;
  IN(float) sizes;
  int first, tokens;  // position of the first token; how many there are of a head
};

// `rows` rows of DIM halves into shared memory, where they lie ROW apart.
template <int DIM, int ROW>
FN void stage(SHARED(word) to, IN(half_t) from, int rows, int tid) {
  constexpr int PARTS = DIM / 8;
  UNROLL_8 for (int i = tid; i < rows * PARTS; i += THREADS) {
    const int row = i / PARTS, part = i % PARTS;
    copy_async(to + row * (ROW / 2) + part * 4, (IN(word))from + row * (DIM / 2) + part * 4);
  }
}

// The sums that a split leaves, among those of others: `merge.h`.
struct Sums {
  IN(float) parts;
  IN(float) stats;
  int split, splits;
};
// Where row `index` of a head's is among them.
FN size_t place_of(int head, int rows, int index, int split, int splits) {
  const int groups = (rows + COLUMNS - 1) / COLUMNS;
  return (size_t(head) * groups + index / COLUMNS) * splits + split;
}

// The positions that some query row of a tile sees, and those that all of them see.
struct Range {
  int begin, end;
  int all_begin, all_end;
};

template <int ROWS, int BLOCK>
FN Range range_of_tile(IN(Call) call, Extent extent, int tile, bool exact) {
  const int tokens = call->query_tokens, first = tile * ROWS;
  const int last = min(first + ROWS, call->rows) - 1;
  const bool one_head = first / tokens == last / tokens;
  const int from = extent.length - tokens + (one_head ? first % tokens : 0);
  const int to = extent.length - tokens + (one_head ? last % tokens : tokens - 1);
  const int window_from = call->window ? max(0, from - call->window + 1) : 0;
  const int window_to = call->window ? max(0, to - call->window + 1) : 0;
  const int limit_from = packed_limit<BLOCK>(call, extent, from);
  const int limit_to = packed_limit<BLOCK>(call, extent, to);
  const int stop = call->causal ? to + 1 : extent.length;
  Range range;
  range.begin = exact ? max(limit_from, window_from) : window_from;
  range.end = exact ? stop : limit_to;
  range.all_begin = exact ? max(limit_to, window_to) : window_to;
  range.all_end = exact ? (call->causal ? from + 1 : extent.length) : limit_from;
  return range;
}

template <int DK, int DV, bool LOW, bool MASKED, int BLOCK, typename M>
FN void flash(Halves halves, IN(half_t) queries, IN(float) query_sizes, int padded_rows,
              IN(M) mask, IN(Extent) extents, IN(Call) call, bool exact, int split_begin,
              int split_end, bool goes_on, Sums before, OUT(float) parts, OUT(float) stats,
              int split, int splits, SHARED(word) memory, int tid, int tile, int head) {
  typedef Flash<DK, DV, LOW> F;
  const int lane = tid % 32, warp = tid / 32, sharer = warp % SHARERS;
  const int row = fragment_row(lane), pair = fragment_pair(lane);
  const int own_rows = warp / SHARERS * 16;  // first of this warp's rows in the tile
  const Extent extent = extents[head / call->kv_heads];
  const Range range = range_of_tile<F::ROWS, BLOCK>(call, extent, tile, exact);
  int begin = max(range.begin, split_begin);
  const int end = min(range.end, split_end);
  begin = halves.first + (begin - halves.first) / F::KEYS * F::KEYS;

  // What this lane's two rows see; the softmax so far.
  int lower[2], upper[2], index[2];
  size_t mask_row[2];
  float factor[2], m[2] = {FLOOR, FLOOR}, l[2] = {0, 0}, sum[F::VALUE_TILES][2][4];
  UNROLL for (int e = 0; e < 2; e++) {
    index[e] = tile * F::ROWS + own_rows + row + 8 * e;
    const Seen seen = seen_by<BLOCK>(call, extent, head, index[e]);
    lower[e] = exact ? max(seen.lower, seen.limit) : seen.lower;
    upper[e] = min(end, exact ? seen.upper : min(seen.upper, seen.limit));
    mask_row[e] = seen.mask_row;
    factor[e] = query_sizes[size_t(head) * padded_rows + index[e]] * call->scale * LOG2_E;
  }
  const int kept = (call->rows + COLUMNS - 1) / COLUMNS * COLUMNS;  // rows that have a place
  UNROLL for (int e = 0; e < 2; e++) {
    const bool was = goes_on && index[e] < kept;
    const size_t place = place_of(head, call->rows, index[e], before.split, before.splits);
    IN(float) old = before.stats + place * COLUMNS * 2 + index[e] % COLUMNS;
    IN(float) from = before.parts + (place * COLUMNS + index[e] % COLUMNS) * DV;
    if (was) m[e] = old[0];
    if (was && pair == 0 && sharer == 0) l[e] = old[COLUMNS];
    UNROLL for (int j = 0; j < F::VALUE_TILES; j++)
      UNROLL for (int n = 0; n < 2; n++)
        UNROLL for (int i = 0; i < 2; i++) {
          const int d = (sharer * F::VALUE_TILES + j) * 16 + n * 8 + 2 * pair + i;
          sum[j][n][2 * e + i] = was && d < DV ? from[d] : 0.0f;
        }
  }

  queries += (size_t(head) * padded_rows + tile * F::ROWS) * DK;
  const size_t low = size_t(call->batch) * call->kv_heads * padded_rows * DK;
  const size_t first = size_t(head) * halves.tokens + (begin - halves.first);
  halves.keys += first * DK;
  halves.values += first * DV;
  halves.sizes += first * SIZES;
  SHARED(half_t) shared_keys = (SHARED(half_t))(memory + F::KEY_STAGE);
  SHARED(half_t) shared_values = (SHARED(half_t))(memory + F::VALUE_STAGE);
  SHARED(half_t) weights = (SHARED(half_t))(memory + F::WEIGHTS);
  SHARED(float) peaks = (SHARED(float))(memory + F::PEAKS);
  if (STAGED && begin < end) {
    stage<DK, F::KEY_ROW>(memory, queries, F::ROWS, tid);
    if (LOW) stage<DK, F::KEY_ROW>(memory + F::LOW_QUERIES, queries + low, F::ROWS, tid);
    stage<DK, F::KEY_ROW>(memory + F::KEY_STAGE, halves.keys, F::KEYS, tid);
  }
  if (begin < end)
    stage<2 * SIZES, 2 * SIZES>(memory + F::SIZE_STAGE, (IN(half_t))halves.sizes, F::KEYS, tid);
  copies_asked();

  for (int base = begin; base < end; base += F::KEYS) {
    const int ahead = base - begin, parity = ahead / F::KEYS % 2;
    TILES(half_t) query_rows = tiles((SHARED(half_t))memory, queries) + own_rows * F::KEY_ROW;
    TILES(half_t) low_rows =
        tiles((SHARED(half_t))(memory + (LOW && STAGED ? F::LOW_QUERIES : 0)), queries + low) +
        own_rows * F::KEY_ROW;
    TILES(half_t) keys = tiles(shared_keys, halves.keys + size_t(ahead) * DK);
    TILES(half_t) values = tiles(shared_values, halves.values + size_t(ahead) * DV);
    SHARED(float) sizes = (SHARED(float))memory + F::SIZE_STAGE + parity * F::KEYS * SIZES;
    copies_done<0>();
    block_sync();  // keys are here, and the values before were read
    if (STAGED)
      stage<DV, F::VALUE_ROW>(memory + F::VALUE_STAGE, halves.values + size_t(ahead) * DV, F::KEYS,
                              tid);
    copies_asked();

    // Scores of rows row (0, 1) and row + 8 (2, 3) with keys 2 * pair and the next of every eight.
    float score[F::KEY_TILES][2][4];
    UNROLL for (int j = 0; j < F::KEY_TILES; j++)
      UNROLL for (int i = 0; i < 8; i++) score[j][i / 4][i % 4] = 0;
    const int own_keys = sharer * F::KEY_TILES * 16;
    UNROLL for (int d = 0; d < DK; d += 16) {
      word a[4], b[4], rest[4];
      read_tile<false>(query_rows + d, F::KEY_ROW, lane, a);
      if (LOW) read_tile<false>(low_rows + d, F::KEY_ROW, lane, rest);
      UNROLL for (int j = 0; j < F::KEY_TILES; j++) {
        read_tile<!RIGHT_BY_COLUMNS>(keys + (own_keys + j * 16) * F::KEY_ROW + d, F::KEY_ROW, lane,
                                     b);
        UNROLL for (int n = 0; n < 2; n++) {
          multiply_add(score[j][n], a[0], a[1], a[2], a[3], b[n], b[2 + n]);
          if (LOW) multiply_add(score[j][n], rest[0], rest[1], rest[2], rest[3], b[n], b[2 + n]);
        }
      }
    }
    if (STAGED) block_sync();  // keys were read
    if (base + F::KEYS < end) {
      if (STAGED)
        stage<DK, F::KEY_ROW>(memory + F::KEY_STAGE, halves.keys + size_t(ahead + F::KEYS) * DK,
                              F::KEYS, tid);
      stage<2 * SIZES, 2 * SIZES>(memory + F::SIZE_STAGE + (1 - parity) * F::KEYS * SIZES,
                                  (IN(half_t))(halves.sizes + (ahead + F::KEYS) * SIZES), F::KEYS,
                                  tid);
    }
    copies_asked();

    const bool edge = MASKED || base < range.all_begin || base + F::KEYS > min(range.all_end, end);
    float peak[2] = {m[0], m[1]}, decay[2];
    UNROLL for (int j = 0; j < F::KEY_TILES; j++)
      UNROLL for (int n = 0; n < 2; n++)
        UNROLL for (int i = 0; i < 2; i++) {
          const int at = own_keys + j * 16 + n * 8 + 2 * pair + i, key = base + at;
          const float key_size = sizes[at * SIZES], logarithm = sizes[at * SIZES + 1];
          UNROLL for (int e = 0; e < 2; e++) {
            float x = score[j][n][2 * e + i] * (factor[e] * key_size) + logarithm;
            if (edge) {
              bool seen = key >= lower[e] && key < upper[e];
              if (MASKED && seen) {
                const float extra =
                    mask_value(mask[mask_row[e] + size_t(key) * call->mask_strides[3]]);
                x += extra * LOG2_E;
                seen = extra > FLOOR;
              }
              x = seen ? x : 2 * FLOOR;
            }
            score[j][n][2 * e + i] = x;
            peak[e] = fmax(peak[e], x);
          }
        }
    UNROLL for (int e = 0; e < 2; e++)
      UNROLL for (int i = 0; i < 2; i++) peak[e] = fmax(peak[e], shuffle_xor(peak[e], pair_lanes(i)));
    if (SHARERS > 1) {
      if (pair == 0)
        UNROLL for (int e = 0; e < 2; e++)
          peaks[sharer * F::ROWS + own_rows + row + 8 * e] = peak[e];
      block_sync();
      UNROLL for (int e = 0; e < 2; e++)
        UNROLL for (int s = 0; s < SHARERS; s++)
          peak[e] = fmax(peak[e], peaks[s * F::ROWS + own_rows + row + 8 * e]);
    }
    UNROLL for (int e = 0; e < 2; e++) {
      decay[e] = fast_exp2(m[e] - peak[e]);
      m[e] = peak[e];
      l[e] *= decay[e];
    }
    word weight[F::KEY_TILES][4];  // a 16 x 16 left factor each
    UNROLL for (int j = 0; j < F::KEY_TILES; j++)
      UNROLL for (int n = 0; n < 2; n++) {
        float w[4];
        UNROLL for (int i = 0; i < 2; i++) {
          const float inverse = sizes[(own_keys + j * 16 + n * 8 + 2 * pair + i) * SIZES + 2];
          UNROLL for (int e = 0; e < 2; e++) {
            const float x = score[j][n][2 * e + i];
            w[2 * e + i] = x > FLOOR ? fast_exp2(x - m[e]) : 0.0f;
            l[e] += w[2 * e + i] * inverse;
          }
        }
        weight[j][2 * n] = pack_halves(w[0], w[1]);
        weight[j][2 * n + 1] = pack_halves(w[2], w[3]);
      }
    if (SHARERS > 1)
      UNROLL for (int j = 0; j < F::KEY_TILES; j++)
        UNROLL for (int i = 0; i < 4; i++) {
          SHARED(half_t) at = weights + (own_rows + row + i % 2 * 8) * F::WEIGHT_ROW + own_keys;
          *(SHARED(word))(at + j * 16 + i / 2 * 8 + 2 * pair) = weight[j][i];
        }
    if (decay[0] != 1.0f || decay[1] != 1.0f)
      UNROLL for (int j = 0; j < F::VALUE_TILES; j++)
        UNROLL for (int i = 0; i < 8; i++) sum[j][i / 4][i % 4] *= decay[i % 4 / 2];

    copies_done<1>();
    block_sync();  // values are here, and the weights of all that share rows
    UNROLL for (int s = 0; s < F::KEYS / 16; s++) {
      word a[4], b[4];
      if (SHARERS > 1)
        read_tile<false>((SHARED(const half_t))weights + own_rows * F::WEIGHT_ROW + s * 16,
                         F::WEIGHT_ROW, lane, a);
      UNROLL for (int j = 0; j < F::VALUE_TILES; j++) {
        const int d = (sharer * F::VALUE_TILES + j) * 16;
        if (d >= DV) continue;
        read_tile<RIGHT_BY_COLUMNS>(values + s * 16 * F::VALUE_ROW + d, F::VALUE_ROW, lane, b);
        UNROLL for (int n = 0; n < 2; n++) {
          if (SHARERS > 1) {
            multiply_add(sum[j][n], a[0], a[1], a[2], a[3], b[2 * n], b[2 * n + 1]);
          } else {
            const LOCAL word(&w)[4] = weight[s % F::KEY_TILES];
            multiply_add(sum[j][n], w[0], w[1], w[2], w[3], b[2 * n], b[2 * n + 1]);
          }
        }
      }
    }
  }
  copies_done<0>();

  UNROLL for (int e = 0; e < 2; e++)
    UNROLL for (int i = 0; i < 2; i++) l[e] += shuffle_xor(l[e], pair_lanes(i));
  if (SHARERS > 1) {
    block_sync();
    if (pair == 0)
      UNROLL for (int e = 0; e < 2; e++) peaks[sharer * F::ROWS + own_rows + row + 8 * e] = l[e];
    block_sync();
    UNROLL for (int e = 0; e < 2; e++) {
      l[e] = 0;
      UNROLL for (int s = 0; s < SHARERS; s++)
        l[e] += peaks[s * F::ROWS + own_rows + row + 8 * e];
    }
  }
  UNROLL for (int e = 0; e < 2; e++) {
    if (index[e] >= kept) continue;
    const size_t place = place_of(head, call->rows, index[e], split, splits);
    OUT(float) out = parts + (place * COLUMNS + index[e] % COLUMNS) * DV;
    UNROLL for (int j = 0; j < F::VALUE_TILES; j++)
      UNROLL for (int n = 0; n < 2; n++) {
        const int d = (sharer * F::VALUE_TILES + j) * 16 + n * 8 + 2 * pair;
        if (d < DV) out[d] = sum[j][n][2 * e], out[d + 1] = sum[j][n][2 * e + 1];
      }
    if (pair == 0 && sharer == 0) {
      stats[place * COLUMNS * 2 + index[e] % COLUMNS] = m[e];
      stats[place * COLUMNS * 2 + COLUMNS + index[e] % COLUMNS] = l[e];
    }
  }
}
