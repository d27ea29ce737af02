// From packed codes to halves, for two kinds of codes. A value of a scalar code stands in BITS bits
// of its own (WINDOW 0). One of a trellis code reads WINDOW bits, its own and the next values', and
// the stream of a vector is a circle.

// A table in shared memory gives a pair of halves per pair of scalar codes up to 4 bits (16
// entries at 2 bits, 256 at 4), or else one value twice. Lanes read copies of their own, so that
// they do not wait for each other's banks. LARGE: words that all copies may take.
template <int BITS, int WINDOW, int LARGE>
struct Table {
  CONST bool PAIRS = BITS <= 4 && WINDOW == 0;
  CONST int FIELD = PAIRS ? 2 * BITS : WINDOW ? WINDOW : BITS;
  CONST int STRIDE = PAIRS ? 2 * BITS : BITS;  // bits from a field to the next
  CONST int ENTRIES = 1 << FIELD;
  CONST int COPIES = ENTRIES * TABLE_COPIES > LARGE ? LARGE / ENTRIES : TABLE_COPIES;
  CONST int SHIFT = COPIES == 32 ? 7 : COPIES == 16 ? 6 : COPIES == 8 ? 5 : COPIES == 4 ? 4 : 2;
  CONST int WORDS = ENTRIES * COPIES;
};

template <typename T, int THREADS>
FN void fill_table(SHARED(word) table, IN(word) entries, int tid) {
  if (T::COPIES % 4) {
    UNROLL_8 for (int i = tid; i < T::WORDS; i += THREADS) table[i] = entries[i / T::COPIES];
  } else {
    UNROLL_8 for (int i = 4 * tid; i < T::WORDS; i += 4 * THREADS) {
      const word entry = entries[i / T::COPIES], four[4] = {entry, entry, entry, entry};
      write_4(table + i, four);
    }
  }
}

// Bits [at, at + FIELD) of a lane's words, as a byte offset into its copy of the table.
template <typename T, int N>
FN word table_offset(const LOCAL word (&words)[N], int at, word copy) {
  int first = at / 32, shift = at % 32;  // constants once the caller's loop is unrolled
  word x = words[first];
  if (shift + T::FIELD > 32) {
    x = funnel_shift(x, words[first + 1], shift - T::SHIFT);
  } else {
    x = shift > T::SHIFT ? x >> (shift - T::SHIFT) : x << (T::SHIFT - shift);
  }
  return (x & ((T::ENTRIES - 1) << T::SHIFT)) | copy;
}

// Values 2 * pair and 2 * pair + 1 of a lane's words.
template <typename T, int N>
FN word decode_pair(const LOCAL word (&words)[N], int pair, SHARED(const word) table, word copy) {
  if (T::PAIRS) return read_shared(table, table_offset<T>(words, T::STRIDE * pair, copy));
  word low = read_shared(table, table_offset<T>(words, 2 * T::STRIDE * pair, copy));
  word high = read_shared(table, table_offset<T>(words, (2 * pair + 1) * T::STRIDE, copy));
  return low_halves(low, high);
}

// Where the values of a packed row are: GROUPS groups of DIM / GROUPS, each shared by LANES lanes
// that take SPAN neighbouring values of it. A lane may reach behind a group's end; what it finds
// there must not count.
template <int DIM, int BITS, int WINDOW, int GROUPS, int LANES>
struct Layout {
  CONST int GROUP = DIM / GROUPS;
  CONST int SPAN = (GROUP + 8 * LANES - 1) / (8 * LANES) * 8;
  CONST int ROW_BYTES = DIM * BITS / 8;
  CONST int GROUP_BYTES = GROUP * BITS / 8;
  CONST int SPAN_BYTES = SPAN * BITS / 8;
  CONST int ODD = ROW_BYTES | GROUP_BYTES | SPAN_BYTES | 16;
  CONST int ALIGN = GROUP == SPAN * LANES ? (ODD & -ODD) : 1;  // of a span's first byte
  CONST int OWN = (SPAN_BYTES + 3) / 4;
  CONST int WORDS = WINDOW ? (SPAN_BYTES + 4) / 4 : OWN;  // trellis: and a byte that follows

  // The words of a lane, whose span of some row and group begins `at` bytes into a block, in a row
  // and group that begin `offset` bytes later. Addresses then differ by constants. It may read up
  // to 68 bytes behind the last row, where a block has scales.
  FN static void read(IN(word) block, word at, int offset, int lane,
                      LOCAL word (&words)[WORDS]) {
    const word first = at + offset;
    word own[OWN];
    if (ALIGN >= 4) {
      read_words<OWN, ALIGN / 4>(block + at / 4 + offset / 4, own);
    } else {
      const word index = first / 4;
      const int shift = first % 4 * 8;
      word x = block[index];
      UNROLL for (int i = 0; i < OWN; i++) {
        word next = block[index + i + 1];
        own[i] = funnel_shift(x, next, shift);
        x = next;
      }
    }
    UNROLL for (int i = 0; i < OWN; i++) words[i] = own[i];
    if (WINDOW) {
      const word next = lane + 1 < LANES ? first + SPAN_BYTES : first - lane * SPAN_BYTES;
      const word follows = block[next / 4] >> (next % 4 * 8) & 255;
      constexpr int at = SPAN_BYTES / 4, shift = SPAN_BYTES % 4 * 8;
      const word kept = shift ? own[OWN - 1] & ((1u << shift) - 1) : 0;
      words[at] = kept | (follows << shift);
    }
  }
};
