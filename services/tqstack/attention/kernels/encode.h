// New keys and values to packed codes and scales in one pass: a warp per vector.

CONST int ENCODE_WARPS = 4;
CONST float TINY = 1e-20f;          // smaller vectors underflow the scale by far
CONST float SCALE_MAX = 65504.0f;   // largest half

template <int D, int BITS>
struct Encode {
  CONST int LEVELS = 1 << BITS;
  CONST int SHARED_WORDS = 2 * LEVELS + ENCODE_WARPS * D / 4;  // boundaries, levels, codes
};

template <int D, int BITS, int GROUPS, bool ROTATE, bool CORRECTED, typename T>
FN void encode(IN(T) vectors, IN(float) signs, IN(float) codebook, int count, OUT(byte) codes,
               OUT(half_t) scales, SHARED(word) memory, int tid, int block) {
  typedef Encode<D, BITS> E;
  constexpr int N = D / 32, M = N / GROUPS;  // values per lane, and of those per group
  const int lane = tid % 32, warp = tid / 32;
  SHARED(float) boundaries = (SHARED(float))memory;
  SHARED(float) levels = boundaries + E::LEVELS;
  SHARED(byte) own = (SHARED(byte))(memory + 2 * E::LEVELS) + warp * D;
  for (int i = tid; i < E::LEVELS; i += 32 * ENCODE_WARPS) {
    levels[i] = codebook[i];
    boundaries[i] = i + 1 < E::LEVELS ? 0.5f * (codebook[i] + codebook[i + 1]) : 0.0f;
  }
  block_sync();

  const int index = block * ENCODE_WARPS + warp;
  const bool inside = index < count;
  const size_t vector = inside ? index : 0;
  float x[N], size = 0, broken = 0;
  UNROLL for (int i = 0; i < N; i++) {
    x[i] = to_float(vectors[vector * D + i * 32 + lane]);
    if (!is_finite(x[i])) broken = 1;
    size = fmax(size, fabs(x[i]));
  }
  size = warp_max(size);
  const bool usable = warp_max(broken) == 0 && size > TINY;
  UNROLL for (int i = 0; i < N; i++) {
    x[i] = usable ? x[i] / size : 0.0f;
    if (ROTATE) x[i] *= signs[i * 32 + lane];
  }
  if (ROTATE) hadamard<N>(x, lane);

  UNROLL for (int g = 0; g < GROUPS; g++) {
    float squares = 0, coded = 0;
    UNROLL for (int i = g * M; i < (g + 1) * M; i++) squares += x[i] * x[i];
    const float norm = sqrt(warp_sum(squares));
    const float factor = sqrt(32.0f * M) / fmax(norm, TINY);
    UNROLL for (int i = g * M; i < (g + 1) * M; i++) {
      int code = 0;
      UNROLL for (int step = E::LEVELS / 2; step > 0; step /= 2)
        if (x[i] * factor > boundaries[code + step - 1]) code += step;
      own[i * 32 + lane] = byte(code);
      coded += levels[code] * levels[code];
    }
    const float length = sqrt(CORRECTED ? warp_sum(coded) : 32.0f * M);
    const float scale = usable ? fmin(size * norm / length, SCALE_MAX) : 0.0f;
    if (lane == 0 && inside) scales[vector * GROUPS + g] = to_half(scale);
  }
  block_sync();
  constexpr int BYTES = D * BITS / 8;
  if (inside)
    for (int at = lane; at < BYTES; at += 32) {
      int first = at * 8 / BITS, shift = first * BITS - at * 8;  // of that code; 0 or less
      word packed = own[first] >> -shift;
      for (int i = 1; shift + i * BITS < 8; i++) packed |= word(own[first + i]) << (shift + i * BITS);
      codes[vector * BYTES + at] = byte(packed);
    }
}
