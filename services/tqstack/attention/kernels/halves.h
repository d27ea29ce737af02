// Vectors as halves and a size each, which matrix units can multiply whatever the vectors' units are.
// A warp takes a vector: value i * 32 + lane of it is x[i] of a lane.

template <int D, typename T>
FN void read_vector(IN(T) from, bool there, int lane, LOCAL float (&x)[(D + 31) / 32]) {
  UNROLL for (int i = 0; i < (D + 31) / 32; i++)
    x[i] = there && i * 32 + lane < D ? to_float(from[i * 32 + lane]) : 0.0f;
}

// Writes a vector's halves, relative to its size, and with LOW what they leave of each value, as
// halves too. Returns the size.
template <int D, bool LOW>
FN float write_halves(const LOCAL float (&x)[(D + 31) / 32], int lane, OUT(half_t) high,
                      OUT(half_t) low) {
  float size = 1e-30f;
  UNROLL for (int i = 0; i < (D + 31) / 32; i++) size = fmax(size, fabs(x[i]));
  size = warp_max(size);
  UNROLL for (int i = 0; i < (D + 31) / 32; i++) {
    if (i * 32 + lane >= D) continue;
    const float value = x[i] / size;
    const half_t rounded = to_half(value);
    high[i * 32 + lane] = rounded;
    if (LOW) low[i * 32 + lane] = to_half(value - to_float(rounded));
  }
  return size;
}

struct HalvesCall {
  int vectors, padded, heads;  // of a head: how many there are, and have a place in what is written
};

// Query rows as they are and rotated: here, where ROTATE, or else as they are given.
template <int D, bool ROTATE, bool LOW, typename T, typename R>
FN void query_halves(IN(T) queries, IN(R) given, IN(float) signs, IN(HalvesCall) call,
                     OUT(half_t) raw, OUT(float) raw_sizes, OUT(half_t) rotated,
                     OUT(float) rotated_sizes, int tid, int block) {
  const int lane = tid % 32, index = block * WARPS + tid / 32;
  const int head = index / call->padded, row = index % call->padded;
  if (head >= call->heads) return;
  const bool there = row < call->vectors;
  const size_t from = (size_t(head) * call->vectors + row) * D, to = size_t(index) * D;
  const size_t low = size_t(call->heads) * call->padded * D + to;
  float x[(D + 31) / 32];
  read_vector<D>(queries + from, there, lane, x);
  const float raw_size = write_halves<D, LOW>(x, lane, raw + to, raw + low);
  if (ROTATE) {
    UNROLL for (int i = 0; i < (D + 31) / 32; i++) x[i] *= signs[i * 32 + lane];
    hadamard<(D + 31) / 32>(x, lane);
  } else {
    read_vector<D>(given + from, there, lane, x);
  }
  const float rotated_size = write_halves<D, LOW>(x, lane, rotated + to, rotated + low);
  if (lane == 0) raw_sizes[index] = raw_size, rotated_sizes[index] = rotated_size;
}

// The exact keys and values of a tail. Slots without a token may hold anything: zeros instead.
template <int DK, int DV, typename T>
FN void tail_halves(IN(T) tail_keys, IN(T) tail_values, IN(HalvesCall) call, OUT(half_t) keys,
                    OUT(half_t) values, OUT(float) sizes, int tid, int block) {
  const int lane = tid % 32, index = block * WARPS + tid / 32;
  const int head = index / call->padded, slot = index % call->padded;
  if (head >= call->heads) return;
  const bool there = slot < call->vectors;
  const size_t from = size_t(head) * call->vectors + slot;
  float k[(DK + 31) / 32], v[(DV + 31) / 32];
  read_vector<DK>(tail_keys + from * DK, there, lane, k);
  read_vector<DV>(tail_values + from * DV, there, lane, v);
  UNROLL for (int i = 0; i < (DK + 31) / 32; i++) k[i] = is_finite(k[i]) ? k[i] : 0.0f;
  UNROLL for (int i = 0; i < (DV + 31) / 32; i++) v[i] = is_finite(v[i]) ? v[i] : 0.0f;
  OUT(half_t) key = keys + size_t(index) * DK;
  OUT(half_t) value = values + size_t(index) * DV;
  const float key_size = write_halves<DK, false>(k, lane, key, key);
  const float value_size = write_halves<DV, false>(v, lane, value, value);
  if (lane == 0) write_sizes(sizes + size_t(index) * SIZES, key_size, value_size);
}
