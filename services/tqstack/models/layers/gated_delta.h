// The gated delta rule, token by token, with the state in registers.
//
// LANES neighbouring lanes own one row of the state (DK values) and keep it while they walk over
// the tokens: S = g S + beta (v - g S k) k^T, y = S q. Rows do not depend on each other, so heads and
// rows spread over the GPU, and memory sees q, k, v and y once.

CONST int DELTA_THREADS = 128;

struct DeltaCall {
  int tokens, key_heads, value_heads;
};

struct DeltaGates {
  float decay, rate;  // g and beta
};

// a, b: what the layer's projections say; log_rate, offset: the head's own.
FN DeltaGates delta_gates(float a, float b, float log_rate, float offset) {
  const float x = a + offset, softplus = x > 20 ? x : log1p(exp(x));
  return {exp(-exp(log_rate) * softplus), 1 / (1 + exp(-b))};
}

template <int DK, int DV, int LANES, bool MASKED, typename T, typename R, typename D>
FN void gated_delta(IN(T) q, IN(T) k, IN(T) v, IN(T) a, IN(T) b, IN(R) log_rate, IN(D) bias,
                    IN(bool) mask, IN(float) state, IN(DeltaCall) call, OUT(T) y,
                    OUT(float) new_state, int tid, int slice, int batch_head) {
  constexpr int N = DK / LANES;
  const int tokens = call->tokens, heads = call->value_heads;
  const int batch = batch_head / heads, head = batch_head % heads;
  const int key_head = head / (heads / call->key_heads);
  const int lane = tid % 32, part = tid % LANES;
  const int row = slice * (DELTA_THREADS / LANES) + tid / LANES;
  const bool inside = row < DV;
  const int safe_row = inside ? row : DV - 1;

  const size_t key_stride = size_t(call->key_heads) * DK, value_stride = size_t(heads) * DV;
  size_t key_at = (size_t(batch) * tokens * call->key_heads + key_head) * DK + part * N;
  size_t value_at = (size_t(batch) * tokens * heads + head) * DV + safe_row;
  const size_t gate_at = size_t(batch) * tokens * heads + head;
  const size_t state_at = (size_t(batch_head) * DV + safe_row) * DK + part * N;
  const float own_rate = to_float(log_rate[head]), offset = to_float(bias[head]);

  float s[N], next_k[N], next_q[N];
  read_values<N>(state + state_at, s);
  read_values<N>(k + key_at, next_k);
  read_values<N>(q + key_at, next_q);
  float next_v = to_float(v[value_at]);
  float g_of_lane = 0, beta_of_lane = 0;
  for (int t = 0; t < tokens; t++) {
    if (t % 32 == 0) {  // every lane computes the gates of one of the next 32 tokens
      int at = t + lane < tokens ? t + lane : tokens - 1;
      const size_t place = gate_at + size_t(at) * heads;
      const DeltaGates gates = delta_gates(to_float(a[place]), to_float(b[place]), own_rate, offset);
      g_of_lane = gates.decay, beta_of_lane = gates.rate;
      if (MASKED) {
        if (!mask[size_t(batch) * tokens + at]) g_of_lane = 1, beta_of_lane = 0;
      }
    }
    const float g = shuffle(g_of_lane, t % 32), beta = shuffle(beta_of_lane, t % 32);
    float key[N], query[N], value = next_v;
    UNROLL for (int i = 0; i < N; i++) key[i] = next_k[i], query[i] = next_q[i];
    if (t + 1 < tokens) {
      read_values<N>(k + key_at + key_stride, next_k);
      read_values<N>(q + key_at + key_stride, next_q);
      next_v = to_float(v[value_at + value_stride]);
    }
    float recalled = 0, out = 0;
    UNROLL for (int i = 0; i < N; i++) {
      s[i] *= g;
      recalled += s[i] * key[i];
    }
    UNROLL for (int lanes = 1; lanes < LANES; lanes *= 2) recalled += shuffle_xor(recalled, lanes);
    const float update = beta * (value - recalled);
    UNROLL for (int i = 0; i < N; i++) {
      s[i] += update * key[i];
      out += s[i] * query[i];
    }
    UNROLL for (int lanes = 1; lanes < LANES; lanes *= 2) out += shuffle_xor(out, lanes);
    if (part == 0 && inside) y[value_at] = from_float<T>(out);
    key_at += key_stride;
    value_at += value_stride;
  }
  if (inside) UNROLL for (int i = 0; i < N; i++) new_state[state_at + i] = s[i];
}
