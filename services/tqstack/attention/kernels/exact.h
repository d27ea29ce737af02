// Attention over the exact tail, EXACT_KEYS keys per block of threads: plain float32 multiply-adds
// of what the model made, so that nothing is rounded. Like a split of the packed keys it leaves a
// weighted sum of values, the largest score and the weights' sum.

CONST int EXACT_KEYS = 32;

// 32 numbers in every lane, summed over the lanes: lane i gets the i-th sum. In each step a lane
// keeps half of them and gives the others to the lane that keeps those.
FN float sums_of_lanes(LOCAL float (&x)[32], int lane) {
  UNROLL for (int kept = 16; kept > 0; kept /= 2)
    UNROLL for (int i = 0; i < 16; i++)
      if (i < kept) {
        const bool upper = lane & kept;
        const float given = shuffle_xor(upper ? x[i] : x[i + kept], kept);
        x[i] = (upper ? x[i + kept] : x[i]) + given;
      }
  return x[0];
}

// A lane's share of a vector of DIM values: chunks of four, 128 values apart; zeros if not `there`.
template <int DIM, int CHUNKS, typename T>
FN void read_chunks(IN(T) from, bool there, int lane, LOCAL float (&x)[CHUNKS * 4]) {
  UNROLL for (int i = 0; i < CHUNKS; i++) {
    const int d = i * 128 + lane * 4;
    float chunk[4] = {0, 0, 0, 0};
    if (there && d < DIM) read_values<4>(from + d, chunk);
    UNROLL for (int e = 0; e < 4; e++) x[i * 4 + e] = chunk[e];
  }
}

// weights: EXACT_KEYS * COLUMNS words of shared memory.
template <int DK, int DV, int BLOCK, bool MASKED, typename Q, typename X, typename M>
FN void attend_exact(IN(Q) queries, IN(X) tail_keys, IN(X) tail_values, IN(M) mask,
                     IN(Extent) extents, IN(Call) call, OUT(float) parts, OUT(float) stats,
                     SHARED(float) weights, int tid, int split, int tile, int head) {
  constexpr int CHUNKS = (DK + 127) / 128;  // of a vector, in every lane, four values each
  constexpr int OWN = EXACT_KEYS / WARPS;   // keys of a warp
  const int lane = tid % 32, warp = tid / 32;
  const Extent extent = extents[head / call->kv_heads];
  const int first = extent.start + split * EXACT_KEYS;  // position of the block's first key
  const int first_query = extent.length - call->query_tokens;
  const int lowest = max(packed_limit<BLOCK>(call, extent, first_query),
                         first_seen(call, extent));
  if (first >= extent.length || first + EXACT_KEYS <= lowest) {  // `merge` leaves its part unread
    if (tid < COLUMNS * 2) stats[tid] = tid < COLUMNS ? FLOOR : 0.0f;
    return;
  }
  // Loops stay loops here: code that runs once is waited for longer than what it reads. A slot
  // behind the sequence may hold anything: zeros instead.
  const size_t first_slot = size_t(head) * call->slots + split * EXACT_KEYS;
  tail_keys += first_slot * DK;
  tail_values += first_slot * DV;
  const int keys = extent.length - first;
  float q[COLUMNS][CHUNKS * 4];
  const int index = tile * COLUMNS;
  queries += (size_t(head) * call->rows + index) * DK;
  UNROLL for (int c = 0; c < COLUMNS; c++)
    read_chunks<DK, CHUNKS>(queries + c * DK, index + c < call->rows, lane, q[c]);

  // Four keys at a time: 32 dot products, one for each lane.
  const Seen seen = seen_by<BLOCK>(call, extent, head, index + lane % COLUMNS);
  LOOP for (int j = 0; j < OWN; j += 4) {
    float k[4][CHUNKS * 4], dot[32];
    UNROLL for (int i = 0; i < 4; i++) {
      const int key = warp * OWN + j + i;
      read_chunks<DK, CHUNKS>(tail_keys + key * DK, key < keys, lane, k[i]);
    }
    UNROLL for (int i = 0; i < 32; i++) {
      dot[i] = 0;
      UNROLL for (int d = 0; d < CHUNKS * 4; d++) dot[i] += q[i % COLUMNS][d] * k[i / COLUMNS][d];
    }
    float score = sums_of_lanes(dot, lane) * call->scale * LOG2_E;
    const int key = warp * OWN + j + lane / COLUMNS, position = first + key;
    bool visible = position >= max(seen.limit, seen.lower) && position < seen.upper;
    if (MASKED && visible) {
      const size_t at = seen.mask_row + size_t(position) * call->mask_strides[3];
      const float extra = mask_value(mask[at]);
      score += extra * LOG2_E;
      visible = extra > FLOOR;
    }
    weights[key * COLUMNS + lane % COLUMNS] = visible ? score : 2 * FLOOR;
  }
  block_sync();
  for (int column = warp; column < COLUMNS; column += WARPS) {
    float peak = FLOOR, total = 0;
    for (int key = lane; key < EXACT_KEYS; key += 32)
      peak = fmax(peak, weights[key * COLUMNS + column]);
    peak = warp_max(peak);
    for (int key = lane; key < EXACT_KEYS; key += 32) {
      const float score = weights[key * COLUMNS + column];
      const float weight = score > FLOOR ? fast_exp2(score - peak) : 0.0f;
      weights[key * COLUMNS + column] = weight;
      total += weight;
    }
    total = warp_sum(total);
    if (lane == 0) {
      stats[column] = peak;
      stats[COLUMNS + column] = total;
    }
  }
  block_sync();
  const bool holds_values = 2 * tid < DV;  // dimensions 2 * tid and the next
  float sum[COLUMNS][2];
  UNROLL for (int c = 0; c < COLUMNS; c++) sum[c][0] = sum[c][1] = 0;
  LOOP for (int from = 0; from < EXACT_KEYS; from += 8) {
    float v[8][2];
    UNROLL for (int i = 0; i < 8; i++) {
      v[i][0] = v[i][1] = 0;
      if (holds_values && from + i < keys)
        read_values<2>(tail_values + (from + i) * DV + 2 * tid, v[i]);
    }
    UNROLL for (int i = 0; i < 8; i++)
      UNROLL for (int c = 0; c < COLUMNS; c++) {
        const float weight = weights[(from + i) * COLUMNS + c];
        sum[c][0] += weight * v[i][0];
        sum[c][1] += weight * v[i][1];
      }
  }
  if (holds_values)
    UNROLL for (int c = 0; c < COLUMNS; c++) {
      parts[c * DV + 2 * tid] = sum[c][0];
      parts[c * DV + 2 * tid + 1] = sum[c][1];
    }
}
