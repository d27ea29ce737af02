// The tail-biting search of tqstack/turboquant/viterbi.py: one block codes one vector, one thread
// per state of the trellis.

template <int BITS, int WINDOW>
struct Trellis {
  CONST int STATES = 1 << WINDOW, BRANCHES = 1 << BITS, GROUPS = STATES / BRANCHES;
  CONST int ROW = GROUPS + 1;  // an odd stride spreads the costs of a group over the banks
  CONST int COSTS = BRANCHES * ROW;
  CONST int FIELD = BITS == 3 ? 4 : BITS, PER_BYTE = 8 / FIELD;
};
CONST float FORBIDDEN = 1e9f;

// Of the 2^k states of this thread's group, the one of least cost, and its cost.
template <typename T>
FN int nearest_branch(SHARED(const float) costs, int group, LOCAL float& least) {
  int branch = 0;
  least = costs[group];
  UNROLL for (int i = 1; i < T::BRANCHES; i++) {
    float cost = costs[i * T::ROW + group];
    if (cost < least) least = cost, branch = i;
  }
  return branch;
}

// The best path over values first, first + 1, ... of the circular vector x, times sign. given: the
// bits that the first state starts with and the last ends with; -1 leaves both free.
template <typename T, int BITS>
FN void best_path(IN(float) x, int values, float sign, int first, int count, int given,
                  float level, SHARED(float) costs, SHARED(float) reached,
                  SHARED(unsigned char) backs, SHARED(unsigned short) path, int tid) {
  const int branch = tid % T::BRANCHES, group = tid / T::BRANCHES;
  const int from = tid % T::GROUPS;
  int held = 0;
  for (int i = 0; i <= count; i++) {
    if (i > 0) {  // the cheapest way into each group, over all its states at value i - 1
      if (tid < T::GROUPS) {
        float least;
        int back = nearest_branch<T>(costs, tid, least);
        reached[tid] = least;
        held |= back << (T::FIELD * ((i - 1) % T::PER_BYTE));
        if (i % T::PER_BYTE == 0 || i == count) {
          backs[(i - 1) / T::PER_BYTE * T::GROUPS + tid] = (unsigned char)held;
          held = 0;
        }
      }
      block_sync();
    }
    if (i == count) break;
    float entered = i > 0 ? reached[from] : given < 0 || from == given ? 0.0f : FORBIDDEN;
    if (i == count - 1 && given >= 0 && group != given) entered = FORBIDDEN;
    float miss = sign * x[(first + i) % values] - level;
    costs[branch * T::ROW + group] = entered + miss * miss;
    block_sync();
  }
  if (tid == 0) {
    int at = 0;
    for (int g = 1; g < T::GROUPS; g++)
      if (reached[g] < reached[at]) at = g;
    if (given >= 0) at = given;
    for (int i = count - 1; i >= 0; i--) {
      int shift = T::FIELD * (i % T::PER_BYTE);
      int back = backs[i / T::PER_BYTE * T::GROUPS + at] >> shift & (T::BRANCHES - 1);
      int state = at * T::BRANCHES + back;
      path[i] = (unsigned short)state;
      at = state % T::GROUPS;
    }
  }
  block_sync();
}

// The sum over the block of a number per thread, for every thread.
template <int THREADS>
FN float block_sum(float x, SHARED(float) sums, int tid) {
  block_sync();
  sums[tid] = x;
  for (int step = THREADS / 2; step > 0; step /= 2) {
    block_sync();
    if (tid < step) sums[tid] += sums[tid + step];
  }
  block_sync();
  return sums[0];
}

// x (vectors, DIM) of norm sqrt(DIM) -> codes (vectors, DIM), and how far what they stand for
// reaches along x, negative where the mirrored vector was closer.
template <int DIM, int BITS, int WINDOW>
FN void viterbi(IN(float) x, IN(float) codebook, OUT(word) codes, OUT(float) reaches,
                SHARED(float) costs, SHARED(float) reached, SHARED(unsigned char) backs,
                SHARED(unsigned short) path, int tid, int row) {
  typedef Trellis<BITS, WINDOW> T;
  constexpr int SEAM = DIM / 2 < 32 ? DIM / 2 : 32;
  x += size_t(row) * DIM;
  codes += size_t(row) * DIM;
  const float level = codebook[tid];
  float best = -1.0f;
  for (int mirrored = 0; mirrored < 2; mirrored++) {
    const float sign = mirrored ? -1.0f : 1.0f;
    best_path<T, BITS>(x, DIM, sign, DIM - SEAM, 2 * SEAM, -1, level, costs, reached, backs, path,
                       tid);
    const int given = path[SEAM] % T::GROUPS;
    block_sync();
    best_path<T, BITS>(x, DIM, sign, 0, DIM, given, level, costs, reached, backs, path, tid);
    float square = 0, product = 0;
    for (int i = tid; i < DIM; i += T::STATES) {
      float value = codebook[path[i]];
      square += value * value;
      product += sign * x[i] * value;
    }
    square = block_sum<T::STATES>(square, costs, tid);
    product = block_sum<T::STATES>(product, costs, tid);
    const float cosine = product / sqrt(square * DIM);
    if (cosine > best || mirrored == 0) {
      best = cosine;
      for (int i = tid; i < DIM; i += T::STATES) codes[i] = path[i] % T::BRANCHES;
      if (tid == 0) reaches[row] = sign * product / sqrt(float(DIM));
    }
    block_sync();
  }
}

// A tile of compressed weights: x (tiles, VALUES) of unit variance -> the state of each value.
template <int VALUES, int BITS, int WINDOW>
FN void tile_states(IN(float) x, IN(float) codebook, OUT(word) states, SHARED(float) costs,
                    SHARED(float) reached, SHARED(unsigned char) backs, SHARED(unsigned short) path,
                    int tid, int row) {
  typedef Trellis<BITS, WINDOW> T;
  constexpr int SEAM = 32;
  x += size_t(row) * VALUES;
  const float level = codebook[tid];
  best_path<T, BITS>(x, VALUES, 1.0f, VALUES - SEAM, 2 * SEAM, -1, level, costs, reached, backs,
                     path, tid);
  const int given = path[SEAM] % T::GROUPS;
  block_sync();
  best_path<T, BITS>(x, VALUES, 1.0f, 0, VALUES, given, level, costs, reached, backs, path, tid);
  for (int i = tid; i < VALUES; i += T::STATES) states[size_t(row) * VALUES + i] = path[i];
}
