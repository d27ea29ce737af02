// The orthonormal Hadamard transform of 32 * N values, N a power of two: value i * 32 + lane of a
// vector is x[i] of a lane.
template <int N>
FN void hadamard(LOCAL float (&x)[N], int lane) {
  UNROLL for (int step = 1; step < N; step *= 2)
    UNROLL for (int i = 0; i < N; i++)
      if ((i & step) == 0) {
        float low = x[i], high = x[i + step];
        x[i] = low + high;
        x[i + step] = low - high;
      }
  UNROLL for (int lanes = 1; lanes < 32; lanes *= 2)
    UNROLL for (int i = 0; i < N; i++) {
      float other = shuffle_xor(x[i], lanes);
      x[i] = lane & lanes ? other - x[i] : x[i] + other;
    }
  const float norm = fast_exp2(-0.5f * fast_log2(32.0f * N));
  UNROLL for (int i = 0; i < N; i++) x[i] *= norm;
}

FN float warp_max(float x) {
  UNROLL for (int lanes = 1; lanes < 32; lanes *= 2) x = fmax(x, shuffle_xor(x, lanes));
  return x;
}
FN float warp_sum(float x) {
  UNROLL for (int lanes = 1; lanes < 32; lanes *= 2) x += shuffle_xor(x, lanes);
  return x;
}
