// Which experts a token goes to, and with what score: a warp per token.
//
// logits: EXPERTS of a row, and behind them that of the shared expert's gate. The shared expert is the
// last of the stack, and always chosen. gates: for every chosen expert its place among the gate
// matrices, then its place among the up matrices, which follow them in one stack.

CONST float NOWHERE = -3.4e38f;  // below every logit

template <int EXPERTS, int CHOSEN, bool NORMALISED, typename T>
FN void route(IN(T) logits, OUT(word) gates_and_ups, OUT(word) downs, OUT(float) scores, int lane,
              int token) {
  constexpr int N = (EXPERTS + 31) / 32, ALL = CHOSEN + 1;
  IN(T) row = logits + size_t(token) * (EXPERTS + 1);
  float x[N], peak = 0, total = 0, own = 0;
  int own_index = EXPERTS;
  UNROLL for (int i = 0; i < N; i++)
    x[i] = lane + 32 * i < EXPERTS ? to_float(row[lane + 32 * i]) : NOWHERE;

  UNROLL for (int n = 0; n < CHOSEN; n++) {
    float best = x[0];
    int index = min(lane, EXPERTS - 1);
    UNROLL for (int i = 1; i < N; i++)
      if (x[i] > best) best = x[i], index = lane + 32 * i;
    UNROLL for (int lanes = 16; lanes > 0; lanes /= 2) {
      const float other = shuffle_xor(best, lanes);
      const int other_index = int(shuffle_xor(float(index), lanes));
      if (other > best || (other == best && other_index < index)) best = other, index = other_index;
    }
    if (n == 0) {
      peak = best;
      UNROLL for (int i = 0; i < N; i++) total += exp(x[i] - peak);
    }
    if (lane == n) own = exp(best - peak), own_index = index;
    UNROLL for (int i = 0; i < N; i++)
      if (lane + 32 * i == index) x[i] = NOWHERE;
  }
  total = warp_sum(NORMALISED ? own : total);
  if (lane < ALL) {
    const int at = token * ALL + lane;
    const float shared = 1 / (1 + exp(-to_float(row[EXPERTS])));
    scores[at] = lane < CHOSEN ? own / total : shared;
    downs[at] = own_index;
    gates_and_ups[at + token * ALL] = own_index;
    gates_and_ups[at + token * ALL + ALL] = own_index + EXPERTS + 1;
  }
}
