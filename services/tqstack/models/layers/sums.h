// Sums over the lanes of a warp, and over a block of threads.

FN float warp_sum(float x) {
  UNROLL for (int lanes = 16; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
  return x;
}

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
