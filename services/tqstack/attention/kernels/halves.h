// Vectors as halves and a size each: what matrix units multiply, whatever the vectors' units. A
// warp per vector. LOW: also what a half leaves of each value, as a second array of halves.

template <int D, bool ROTATE, bool LOW, bool MEND, typename T>
FN void halves(IN(T) vectors, IN(float) signs, int count, OUT(half_t) high, OUT(float) sizes,
               int tid, int block) {
  constexpr int N = (D + 31) / 32;
  const int lane = tid % 32, index = block * WARPS + tid / 32;
  const size_t at = size_t(min(index, count - 1)) * D;
  float x[N], size = 0;
  UNROLL for (int i = 0; i < N; i++) {
    x[i] = i * 32 + lane < D ? to_float(vectors[at + i * 32 + lane]) : 0.0f;
    if (MEND && !is_finite(x[i])) x[i] = 0;  // a slot that holds no token
    if (ROTATE) x[i] *= signs[i * 32 + lane];
  }
  if (ROTATE) hadamard<N>(x, lane);
  UNROLL for (int i = 0; i < N; i++) size = fmax(size, fabs(x[i]));
  size = fmax(warp_max(size), 1e-30f);
  if (index >= count) return;
  if (lane == 0) sizes[index] = size;
  UNROLL for (int i = 0; i < N; i++) {
    if (i * 32 + lane >= D) continue;
    const float value = x[i] / size;
    const half_t rounded = to_half(value);
    high[at + i * 32 + lane] = rounded;
    if (LOW) high[size_t(count) * D + at + i * 32 + lane] = to_half(value - to_float(rounded));
  }
}
