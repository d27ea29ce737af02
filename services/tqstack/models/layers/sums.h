// Sums over the lanes of a warp.

FN float warp_sum(float x) {
  UNROLL for (int lanes = 16; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
  return x;
}
