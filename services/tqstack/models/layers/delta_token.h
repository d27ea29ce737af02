// A Gated DeltaNet layer's single token, from its joined projections to what its output matrix reads:
// convolution, SiLU, norms of query and key, gates, recurrence, gated output norm.
//
// A block of threads per value head. DELTA_LANES neighbouring lanes own one row of the state at a time.
// Heads that share a key head make its query and key anew; the first of them keeps what the next
// token's convolution needs. The gates' logits are part of the projections or an array of their own.

CONST int TOKEN_THREADS = 512, DELTA_LANES = 8;

struct DeltaPart {
  int first, group;  // where it begins in the projections, and how far apart two key heads are
};

struct DeltaTokenCall {
  int key_heads, value_heads;
  int width, gates_width;  // of the projections, and of what b and a are in
  float epsilon;                      // of the output norm
  DeltaPart q, k, v, z, b, a;
};

template <int DK, int DV, int TAPS, typename T, typename R, typename D>
FN void delta_token(IN(T) projected, IN(T) gate_logits, IN(T) past, IN(float) state, IN(T) filters, IN(R) log_rate,
                    IN(D) bias, IN(T) weight, IN(DeltaTokenCall) call, OUT(T) y, OUT(T) new_past,
                    OUT(float) new_state, SHARED(float) memory, int tid, int head, int batch) {
  constexpr int CHUNK = 4 * DELTA_LANES, N = DK / CHUNK, ROWS = TOKEN_THREADS / DELTA_LANES;
  constexpr int PASSES = (DV + ROWS - 1) / ROWS;
  SHARED(float) query = memory;
  SHARED(float) key = query + DK;
  SHARED(float) value = key + DK;
  SHARED(float) out = value + DV;
  SHARED(float) sums = out + DV;  // of squares: query, key, output
  const int ratio = call->value_heads / call->key_heads;
  const int key_head = head / ratio, sharer = head % ratio;
  const int part = tid % DELTA_LANES;
  const size_t head_at = size_t(batch) * call->value_heads + head;

  float s[PASSES][N][4];
  UNROLL for (int pass = 0; pass < PASSES; pass++) {
    const int row = min(pass * ROWS + tid / DELTA_LANES, DV - 1);
    UNROLL for (int i = 0; i < N; i++)
      read_values<4>(state + (head_at * DV + row) * DK + i * CHUNK + part * 4, s[pass][i]);
  }

  const int keys = call->key_heads * DK, channels = 2 * keys + call->value_heads * DV;
  IN(T) mine = projected + size_t(batch) * call->width;
  for (int c = tid; c < 2 * DK + DV; c += TOKEN_THREADS) {
    const bool is_value = c >= 2 * DK;
    const int which = c / DK, d = is_value ? c - 2 * DK : c % DK;
    int channel, at;
    if (is_value) {
      channel = 2 * keys + head * DV + d;
      at = call->v.first + key_head * call->v.group + sharer * DV + d;
    } else {
      channel = which * keys + key_head * DK + d;
      at = which ? call->k.first + key_head * call->k.group + d
                 : call->q.first + key_head * call->q.group + d;
    }
    const size_t past_at = size_t(batch) * (TAPS - 1) * channels + channel;
    const T newest = mine[at];
    float x = to_float(newest) * to_float(filters[channel * TAPS + TAPS - 1]);
    UNROLL for (int tap = 0; tap < TAPS - 1; tap++)
      x += to_float(past[past_at + size_t(tap) * channels]) * to_float(filters[channel * TAPS + tap]);
    if (is_value || sharer == 0) {
      UNROLL for (int tap = 1; tap < TAPS - 1; tap++)
        new_past[past_at + size_t(tap - 1) * channels] = past[past_at + size_t(tap) * channels];
      new_past[past_at + size_t(TAPS - 2) * channels] = newest;
    }
    query[c] = x / (1 + exp(-x));  // query, key and value follow each other
  }
  block_sync();

  if (tid < 64) {  // a warp for each of query and key
    float squares = 0;
    UNROLL for (int d = tid % 32; d < DK; d += 32) {
      const float x = memory[tid / 32 * DK + d];
      squares += x * x;
    }
    squares = warp_sum(squares);
    if (tid % 32 == 0) sums[tid / 32] = squares;
  }
  block_sync();
  // Unit vectors, but for an epsilon; queries carry the scale of the scores, too.
  const float query_factor = 1 / sqrt((sums[0] + 1e-6f) * DK), key_factor = 1 / sqrt(sums[1] + 1e-6f);
  IN(T) logits = gate_logits + size_t(batch) * call->gates_width;
  const DeltaGates gates =
      delta_gates(to_float(logits[call->a.first + key_head * call->a.group + sharer]),
                  to_float(logits[call->b.first + key_head * call->b.group + sharer]),
                  to_float(log_rate[head]), to_float(bias[head]));

  UNROLL for (int pass = 0; pass < PASSES; pass++) {
    const int row = pass * ROWS + tid / DELTA_LANES;
    float recalled = 0, answer = 0;
    UNROLL for (int i = 0; i < N; i++)
      UNROLL for (int e = 0; e < 4; e++) {
        s[pass][i][e] *= gates.decay;
        recalled += s[pass][i][e] * key[i * CHUNK + part * 4 + e];
      }
    UNROLL for (int lanes = 1; lanes < DELTA_LANES; lanes *= 2)
      recalled += shuffle_xor(recalled, lanes);
    const float update = gates.rate * (value[min(row, DV - 1)] - recalled * key_factor) * key_factor;
    UNROLL for (int i = 0; i < N; i++)
      UNROLL for (int e = 0; e < 4; e++) {
        s[pass][i][e] += update * key[i * CHUNK + part * 4 + e];
        answer += s[pass][i][e] * query[i * CHUNK + part * 4 + e];
      }
    UNROLL for (int lanes = 1; lanes < DELTA_LANES; lanes *= 2) answer += shuffle_xor(answer, lanes);
    if (row < DV) {
      if (part == 0) out[row] = answer * query_factor;
      UNROLL for (int i = 0; i < N; i++)
        write_values(new_state + (head_at * DV + row) * DK + i * CHUNK + part * 4, s[pass][i]);
    }
  }
  block_sync();

  if (tid < 32) {
    float squares = 0;
    for (int d = tid; d < DV; d += 32) {
      const float x = to_float(from_float<T>(out[d]));
      squares += x * x;
    }
    squares = warp_sum(squares);
    if (tid == 0) sums[2] = squares;
  }
  block_sync();
  const float factor = 1 / sqrt(sums[2] / DV + call->epsilon);
  for (int d = tid; d < DV; d += TOKEN_THREADS) {
    const float gate =
        to_float(mine[call->z.first + key_head * call->z.group + sharer * DV + d]);
    const float x = to_float(from_float<T>(out[d])) * factor * to_float(weight[d]);
    y[head_at * DV + d] = from_float<T>(x * gate / (1 + exp(-gate)));
  }
}
