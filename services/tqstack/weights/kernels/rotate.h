// The rotation of a layer's inputs: random signs, then orthonormal Hadamard blocks. Its inverse has
// the signs last.
//
// A block of M * P values, M 1 or 12 and P a power of two, is the transform of the P, and of the M:
// value m * P + p. A team of threads holds it in registers, TEAM values apart, and does the high
// bits of p and m there, the lowest five by shuffles, and those between after an exchange through
// shared memory.

template <int M, int P, int TEAM, int TEAMS>
struct Rotation {
  CONST int BLOCK = M * P, THREADS = TEAM * TEAMS;
  CONST int VALUES = BLOCK / TEAM;  // of a thread
  CONST int LANES = TEAM < 32 ? TEAM : 32, WARPS = TEAM / LANES;
  // Shared memory is 32 KB, in words; an exchange of more takes turns.
  CONST int TURNS = BLOCK * TEAMS > 8192 ? 2 : 1;
  CONST int SHARED_WORDS = WARPS > 1 ? BLOCK * TEAMS / TURNS : THREADS / 32;
};

FN float conference(int i, int j) {  // of order 6, without its diagonal
  const int d = (j - i + 6) % 5;
  return i == 0 || j == 0 || d == 0 || d == 2 ? 1.0f : -1.0f;
}

// The Hadamard matrix of order 12 that `mx.hadamard_transform` has (Paley's second), over values
// STRIDE apart.
template <int N, int STRIDE>
FN void hadamard_12(LOCAL float (&x)[N]) {
  UNROLL for (int at = 0; at < STRIDE; at++) {
    float sum[6], difference[6];
    UNROLL for (int j = 0; j < 6; j++) {
      const float even = x[2 * j * STRIDE + at], odd = x[(2 * j + 1) * STRIDE + at];
      sum[j] = even + odd;
      difference[j] = even - odd;
    }
    UNROLL for (int i = 0; i < 6; i++) {
      float even = difference[i], odd = -sum[i];
      UNROLL for (int j = 0; j < 6; j++)
        if (i != j) {
          even += conference(i, j) * sum[j];
          odd += conference(i, j) * difference[j];
        }
      x[2 * i * STRIDE + at] = even;
      x[(2 * i + 1) * STRIDE + at] = odd;
    }
  }
}

template <int N, int SIZE>
FN void butterflies(LOCAL float (&x)[N]) {
  UNROLL for (int step = 1; step < SIZE; step *= 2)
    UNROLL for (int i = 0; i < N; i++)
      if ((i & step) == 0) {
        const float low = x[i], high = x[i + step];
        x[i] = low + high;
        x[i + step] = low - high;
      }
}

// The sums of a block of which this thread holds values i * TEAM + place. `out` takes them, each
// with its index.
template <typename R, int M, typename O>
FN void hadamard_block(LOCAL float (&x)[R::VALUES], O out, SHARED(float) memory, int tid,
                       int place) {
  constexpr int TEAM = R::LANES * R::WARPS;
  butterflies<R::VALUES, R::VALUES / M>(x);
  if (M == 12) hadamard_12<R::VALUES, M == 12 ? R::VALUES / M : 0>(x);
  const int lane = tid % 32;
  UNROLL for (int lanes = 1; lanes < R::LANES; lanes *= 2)
    UNROLL for (int i = 0; i < R::VALUES; i++) {
      const float other = shuffle_xor(x[i], lanes);
      x[i] = lane & lanes ? other - x[i] : x[i] + other;
    }
  if (R::WARPS == 1) {
    UNROLL for (int i = 0; i < R::VALUES; i++) out.write(i * TEAM + place, x[i]);
    return;
  }
  constexpr int TURN = R::VALUES / R::TURNS, OWN = TURN / R::WARPS;
  SHARED(float) own = memory + tid / TEAM * (TURN * TEAM);
  UNROLL for (int turn = 0; turn < R::TURNS; turn++) {
    block_sync();
    UNROLL for (int i = 0; i < TURN; i++) own[i * TEAM + place] = x[turn * TURN + i];
    block_sync();
    UNROLL for (int i = 0; i < OWN; i++) {
      const int at = (place / 32 * OWN + i) * TEAM + lane;
      float y[R::WARPS];
      UNROLL for (int warp = 0; warp < R::WARPS; warp++) y[warp] = own[at + warp * 32];
      butterflies<R::WARPS, R::WARPS>(y);
      UNROLL for (int warp = 0; warp < R::WARPS; warp++)
        out.write(turn * TURN * TEAM + at + warp * 32, y[warp]);
    }
  }
}

struct ToInputs {
  OUT(half_t) to;
  bool there;
  FN void write(int i, float x) const {
    if (there) to[place_of_input(i)] = to_half(x);
  }
};

struct RotateCall {
  int blocks;       // of Hadamard, in a row
  int group;        // rows whose gates lie side by side, and then what these are for
  int head;         // values of a head of attention
  int stride;       // from one head's gate to the next one's
  int gates_width;  // from one token's gates to the next one's
};

// Where rows come from: they are there, or gates times what these are for.
template <typename T>
struct AsTheyAre {
  IN(T) x;
  int width;
  FN float at(int row, int i) const { return to_float(x[size_t(row) * width + i]); }
};

// silu(gate) * up of neighbours' MLPs, such as a token's experts.
template <typename T>
struct Activated {
  IN(T) x;
  int width, group;
  FN float at(int row, int i) const {
    IN(T) from = x + (size_t(row / group) * 2 * group + row % group) * width + i;
    const float gate = to_float(from[0]), up = to_float(from[size_t(group) * width]);
    return to_float(from_float<T>(gate / (1 + exp(-gate)) * up));
  }
};

// Attention's answers times the sigmoid of gates, which lie behind each head's query.
template <typename T>
struct GatedAnswers {
  IN(T) x;
  IN(T) gates;
  int width, head, stride, gates_width;
  FN float at(int row, int i) const {
    const float gate = to_float(gates[size_t(row) * gates_width + i / head * stride + i % head]);
    const float answer = to_float(x[size_t(row) * width + i]);
    return to_float(from_float<T>(answer / (1 + exp(-gate))));
  }
};

// Rotated halves of a row, as large as can be without an overflow; its scale makes them its rotation.
// values: of this thread, with their signs, TEAM apart from `first + place` on. most: the largest of
// the row that this thread has seen. scales: this thread keeps the scale.
template <typename R, int M>
FN void rotate_held(LOCAL float (&values)[R::VALUES], float most, OUT(half_t) row, int width,
                    int first, bool there, bool scales, SHARED(float) memory, int tid, int place) {
  most = warp_max(most);
  if (R::THREADS > 32) {
    if (tid % 32 == 0) memory[tid / 32] = most;
    block_sync();
    UNROLL for (int warp = 0; warp < R::THREADS / 32; warp++) most = fmax(most, memory[warp]);
  }
  // A sum is at most BLOCK * most, and a half 65504.
  const float room = most > 0 ? 15 - fast_log2(most) - fast_log2(float(R::BLOCK)) : 0.0f;
  const float exponent = fmax(-100.0f, fmin(100.0f, float(floor(room))));
  const float factor = fast_exp2(exponent);
  UNROLL for (int i = 0; i < R::VALUES; i++) values[i] *= factor;
  const ToInputs out = {row + first, there};
  hadamard_block<R, M>(values, out, memory, tid, place);
  if (scales) keep_scale(row, width, fast_exp2(-exponent) / sqrt(float(R::BLOCK)));
}

// A block of threads takes TEAMS of a row's Hadamard blocks.
template <int M, int P, int TEAM, int TEAMS, typename From>
FN void rotate_from(const From from, IN(float) signs, int blocks, OUT(half_t) halves,
                    SHARED(float) memory, int tid, int part, int row) {
  typedef Rotation<M, P, TEAM, TEAMS> R;
  const int place = tid % TEAM, block = part * TEAMS + tid / TEAM, width = blocks * R::BLOCK;
  const bool there = block < blocks;
  const int first = there ? block * R::BLOCK : 0;
  float values[R::VALUES], most = 0;
  UNROLL for (int i = 0; i < R::VALUES; i++) {
    const int at = first + i * TEAM + place;
    values[i] = from.at(row, at);
    most = fmax(most, fabs(values[i]));
    values[i] *= signs[at];
  }
  if (blocks > TEAMS)
    for (int i = tid; i < width; i += R::THREADS) most = fmax(most, fabs(from.at(row, i)));
  rotate_held<R, M>(values, most, halves + size_t(row) * row_stride(width), width, first, there,
                    part == 0 && tid == 0, memory, tid, place);
}

template <int M, int P, int TEAM, int TEAMS, typename T>
FN void rotate(IN(T) x, IN(float) signs, IN(RotateCall) call, OUT(half_t) halves,
               SHARED(float) memory, int tid, int part, int row) {
  const AsTheyAre<T> from = {x, call->blocks * (M * P)};
  rotate_from<M, P, TEAM, TEAMS>(from, signs, call->blocks, halves, memory, tid, part, row);
}

template <int M, int P, int TEAM, int TEAMS, typename T>
FN void rotate_activated(IN(T) x, IN(float) signs, IN(RotateCall) call, OUT(half_t) halves,
                         SHARED(float) memory, int tid, int part, int row) {
  const Activated<T> from = {x, call->blocks * (M * P), call->group};
  rotate_from<M, P, TEAM, TEAMS>(from, signs, call->blocks, halves, memory, tid, part, row);
}

template <int M, int P, int TEAM, int TEAMS, typename T>
FN void rotate_answers(IN(T) x, IN(T) gates, IN(float) signs, IN(RotateCall) call,
                       OUT(half_t) halves, SHARED(float) memory, int tid, int part, int row) {
  const GatedAnswers<T> from = {x, gates + call->stride - call->head, call->blocks * (M * P), call->head,
                                call->stride, call->gates_width};
  rotate_from<M, P, TEAM, TEAMS>(from, signs, call->blocks, halves, memory, tid, part, row);
}
