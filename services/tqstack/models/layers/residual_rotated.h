// As `residual`, and what is normalised also rotated, for coded matrices (`rotate.h`). A block of
// threads holds a token's row in registers from the sum to the Hadamard blocks.

template <int TERMS, bool SCORED, int M, int P, int TEAM, int TEAMS, typename T>
FN void rotated_residual(IN(T) stream, IN(T) terms, IN(float) scores, IN(T) weight, IN(float) signs,
                         IN(ResidualCall) call, OUT(T) sum, OUT(T) normed, OUT(half_t) halves,
                         SHARED(float) memory, int tid, int token) {
  typedef Rotation<M, P, TEAM, TEAMS> R;
  const int width = call->width, place = tid % TEAM, block = tid / TEAM * R::BLOCK;
  const bool there = block < width;
  const int own = (there ? block : 0) + place;
  const size_t first = size_t(token) * width;
  float values[R::VALUES], squares = 0, most = 0;
  UNROLL for (int i = 0; i < R::VALUES; i++) {
    const int d = own + i * TEAM;
    float x = to_float(stream[first + d]);
    UNROLL for (int t = 0; t < TERMS; t++) {
      const float term = to_float(terms[first * TERMS + size_t(t) * width + d]);
      x += SCORED ? scores[token * TERMS + t] * term : term;
    }
    const T rounded = from_float<T>(x);
    values[i] = to_float(rounded);
    if (!there) continue;
    sum[first + d] = rounded;
    squares += values[i] * values[i];
  }
  const float mean = block_sum<R::THREADS>(squares, memory, tid) / width;
  const float factor = 1 / sqrt(mean + call->epsilon);
  block_sync();  // the sums were read: the memory is free again
  UNROLL for (int i = 0; i < R::VALUES; i++) {
    const int d = own + i * TEAM;
    const T x = from_float<T>(values[i] * factor * to_float(weight[d]));
    if (there) normed[first + d] = x;
    values[i] = to_float(x);
    most = fmax(most, fabs(values[i]));
    values[i] *= signs[d];
  }
  rotate_held<R, M>(values, most, halves + size_t(token) * row_stride(width), width, own - place,
                    there, tid == 0, memory, tid, place);
}
