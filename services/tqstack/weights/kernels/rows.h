// Chosen rows of compressed weights, such as tokens' embeddings, as values: decoded, and their
// rotation undone.

struct RowsCall {
  int blocks;  // of Hadamard, in a row
  int vectors;  // rows that there are
};

template <typename T>
struct ToValues {
  OUT(T) to;
  IN(float) signs;
  float factor;
  bool there;
  FN void write(int i, float x) const {
    if (there) to[i] = from_float<T>(x * factor * signs[i]);
  }
};

// The level of column `column` of a row: see tiles.h.
template <int BITS, int WINDOW>
FN float level_at(IN(word) weight, IN(half_t) codebook, int row, int column) {
  constexpr int WORDS = 8 * BITS;
  const int lane = row % 8 * 4 + column % 8 / 2;
  const int value = lane * 8 + column % 2 + row % 16 / 8 * 2 + column % 16 / 8 * 4;
  const int bit = value * BITS, at = bit / 32;
  IN(word) tile = weight + size_t(column / 16) * WORDS;
  const word window = funnel_shift(tile[at], tile[(at + 1) % WORDS], bit % 32);
  return to_float(codebook[window & ((1u << WINDOW) - 1)]);
}

template <int BITS, int WINDOW, int M, int P, int TEAM, int TEAMS, typename T>
FN void decoded_rows(IN(word) ids, IN(word) weight, IN(half_t) scales, IN(half_t) codebook,
                     IN(float) signs, IN(RowsCall) call, OUT(T) y, SHARED(float) memory, int tid,
                     int part, int token) {
  typedef Rotation<M, P, TEAM, TEAMS> R;
  const int place = tid % TEAM, block = part * TEAMS + tid / TEAM, width = call->blocks * R::BLOCK;
  const bool there = block < call->blocks;
  const int first = there ? block * R::BLOCK : 0, row = min(int(ids[token]), call->vectors - 1);
  weight += size_t(row / 16) * (width / 16) * (8 * BITS);
  float values[R::VALUES];
  UNROLL for (int i = 0; i < R::VALUES; i++)
    values[i] = level_at<BITS, WINDOW>(weight, codebook, row, first + i * TEAM + place);
  const float factor = to_float(scales[row]) / sqrt(float(R::BLOCK));
  const ToValues<T> out = {y + size_t(token) * width + first, signs + first, factor, there};
  hadamard_block<R, M>(values, out, memory, tid, place);
}
