// The query, key and value heads of a softmax layer's single token, out of its joined projections:
// RMSNorm and rotary positions. A warp per head.
//
// Queries lie `query_stride` apart: models with an output gate have it between them.

CONST int HEADS_PER_BLOCK = 4;

struct HeadsCall {
  int query_heads, kv_heads, width, query_stride;  // width: of the projections
  float epsilon, log_base;                         // log2 of the rotary base
};

// D: head_dim; TURNED: its first dimensions, which are rotated, in pairs half of them apart.
template <int D, int TURNED, typename T>
FN void heads(IN(T) projected, IN(T) query_weight, IN(T) key_weight, IN(int) positions,
              IN(HeadsCall) call, OUT(T) queries, OUT(T) keys, OUT(T) values, int lane, int head,
              int batch) {
  constexpr int N = D / 32, HALF = TURNED / 64;  // of a lane's values
  const int Q = call->query_heads, K = call->kv_heads;
  if (head >= Q + 2 * K) return;
  IN(T) row = projected + size_t(batch) * call->width;
  const int behind = Q * call->query_stride;  // where keys begin, and then values
  float x[N], squares = 0;
  IN(T) from = head < Q ? row + head * call->query_stride : row + behind + (head - Q) * D;
  UNROLL for (int i = 0; i < N; i++) {
    x[i] = to_float(from[lane + 32 * i]);
    squares += x[i] * x[i];
  }
  if (head >= Q + K) {
    UNROLL for (int i = 0; i < N; i++)
      values[(size_t(batch) * K + head - Q - K) * D + lane + 32 * i] = from[lane + 32 * i];
    return;
  }
  const float factor = 1 / sqrt(warp_sum(squares) / D + call->epsilon);
  IN(T) weight = head < Q ? query_weight : key_weight;
  UNROLL for (int i = 0; i < N; i++)
    x[i] = to_float(from_float<T>(x[i] * factor * to_float(weight[lane + 32 * i])));
  const float position = float(positions[batch]);
  UNROLL for (int i = 0; i < HALF; i++) {
    const float d = float(lane + 32 * i) / float(TURNED / 2);
    const float angle = position * exp2(-d * call->log_base);
    const float c = rope_cos(angle), s = rope_sin(angle), left = x[i], right = x[i + HALF];
    x[i] = left * c - right * s;
    x[i + HALF] = left * s + right * c;
  }
  OUT(T) to = head < Q ? queries + (size_t(batch) * Q + head) * D
                       : keys + (size_t(batch) * K + head - Q) * D;
  UNROLL for (int i = 0; i < N; i++) to[lane + 32 * i] = from_float<T>(x[i]);
}
