// Rotated inputs wait in memory as halves in the order in which they are multiplied: of every UNIT,
// two tiles' width, those that a lane holds of right factors lie side by side. Behind a row's inputs
// stands its scale: an array of its own would cost the host more than a launch costs the GPU.

CONST int UNIT = 32;
CONST int SCALE_PLACE = 8;  // halves, so that rows begin where 16 bytes can be read at once

FN int row_stride(int inputs) { return inputs + SCALE_PLACE; }
FN float scale_of(IN(half_t) x, int inputs, int row) {
  return ((IN(float))(x + size_t(row) * row_stride(inputs) + inputs))[0];
}
FN void keep_scale(OUT(half_t) row, int inputs, float scale) {
  ((OUT(float))(row + inputs))[0] = scale;
}

FN int place_of_input(int i) {
  return (i & ~31) | (i & 6) << 2 | (i & 16) >> 2 | (i & 8) >> 2 | (i & 1);
}
