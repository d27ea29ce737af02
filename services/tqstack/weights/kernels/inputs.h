// Rotated inputs wait in memory as halves in the order in which they are multiplied: of every UNIT,
// two tiles' width, those that a lane holds of right factors lie side by side.

CONST int UNIT = 32;

FN int place_of_input(int i) {
  return (i & ~31) | (i & 6) << 2 | (i & 16) >> 2 | (i & 8) >> 2 | (i & 1);
}
