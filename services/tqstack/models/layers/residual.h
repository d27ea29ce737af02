// What half a layer ends with: its result is added to the residual stream, and what comes next reads
// that through an RMSNorm. A block of threads per token.
//
// The result is TERMS vectors, of experts with a score each, or a single one as it is.

CONST int RESIDUAL_THREADS = 512;

struct ResidualCall {
  int width;
  float epsilon;
};

// memory: THREADS / 32 floats that nobody else uses until the next barrier.
template <int THREADS>
FN float block_sum(float x, SHARED(float) memory, int tid) {
  x = warp_sum(x);
  if (tid % 32 == 0) memory[tid / 32] = x;
  block_sync();
  float total = 0;
  UNROLL for (int warp = 0; warp < THREADS / 32; warp++) total += memory[warp];
  return total;
}

template <int TERMS, bool SCORED, bool NORMED, typename T>
FN void residual(IN(T) stream, IN(T) terms, IN(float) scores, IN(T) weight, IN(ResidualCall) call,
                 OUT(T) sum, OUT(T) normed, SHARED(float) memory, int tid, int token) {
  const int width = call->width;
  const size_t first = size_t(token) * width;
  float squares = 0;
  for (int d = tid; d < width; d += RESIDUAL_THREADS) {
    float x = to_float(stream[first + d]);
    UNROLL for (int t = 0; t < TERMS; t++) {
      const float term = to_float(terms[first * TERMS + size_t(t) * width + d]);
      x += SCORED ? scores[token * TERMS + t] * term : term;
    }
    const T rounded = from_float<T>(x);
    sum[first + d] = rounded;
    squares += to_float(rounded) * to_float(rounded);
  }
  if (NORMED) {
    const float mean = block_sum<RESIDUAL_THREADS>(squares, memory, tid) / width;
    const float factor = 1 / sqrt(mean + call->epsilon);
    for (int d = tid; d < width; d += RESIDUAL_THREADS)  // what this thread has written itself
      normed[first + d] = from_float<T>(to_float(sum[first + d]) * factor * to_float(weight[d]));
  }
}
