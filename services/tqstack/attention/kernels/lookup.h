// From packed codes to halves. A codec of another kind replaces Table and decode_pair.

// A table in shared memory gives a pair of halves per code pair (up to 4 bits; 16 entries at 2
// bits, 256 at 4), or one value twice per code. Lanes read copies of their own, so that they do
// not wait for each other's banks.
template <int BITS, bool ALONE>
struct Table {
  CONST bool PAIRS = BITS <= 4;
  CONST int FIELD = PAIRS ? 2 * BITS : BITS;
  CONST int ENTRIES = 1 << FIELD;
  CONST int LIMIT = !PAIRS ? 2048 : ALONE ? 8192 : 4096;  // words; 48 KB hold all of a block
  CONST int COPIES = ENTRIES * TABLE_COPIES > LIMIT ? LIMIT / ENTRIES : TABLE_COPIES;
  CONST int SHIFT = COPIES == 32 ? 7 : COPIES == 16 ? 6 : COPIES == 8 ? 5 : COPIES == 4 ? 4 : 2;
  CONST int WORDS = ENTRIES * COPIES;
};

template <typename T, int THREADS>
FN void fill_table(SHARED(word) table, IN(word) entries, int thread) {
  UNROLL_8 for (int i = thread; i < T::WORDS; i += THREADS) table[i] = entries[i / T::COPIES];
}

// Bits [at, at + FIELD) of a lane's words, as a byte offset into its copy of the table.
template <typename T, int N>
FN word table_offset(const LOCAL word (&words)[N], int at, word copy) {
  int first = at / 32, shift = at % 32;  // constants once the caller's loop is unrolled
  word x = words[first];
  if (shift + T::FIELD > 32) {
    x = funnel_shift(x, words[first + 1], shift) << T::SHIFT;
  } else {
    x = shift > T::SHIFT ? x >> (shift - T::SHIFT) : x << (T::SHIFT - shift);
  }
  return (x & ((T::ENTRIES - 1) << T::SHIFT)) | copy;
}

// Values 2 * pair and 2 * pair + 1 of a lane's words.
template <typename T, int N>
FN word decode_pair(const LOCAL word (&words)[N], int pair, SHARED(const word) table, word copy) {
  if (T::PAIRS) return read_shared(table, table_offset<T>(words, T::FIELD * pair, copy));
  word low = read_shared(table, table_offset<T>(words, 2 * T::FIELD * pair, copy));
  word high = read_shared(table, table_offset<T>(words, (2 * pair + 1) * T::FIELD, copy));
  return low_halves(low, high);
}

// LENGTH neighbouring codes of BITS bits. They start at a byte that is a multiple of ALIGN.
template <int BITS, int LENGTH, int ALIGN>
struct Span {
  CONST int WORDS = (LENGTH * BITS + 31) / 32;

  // last: index of the plane's last word; nothing behind it is read.
  FN static void read(IN(word) plane, word byte, word last, LOCAL word (&words)[WORDS]) {
    if (ALIGN >= 4) {
      read_words<WORDS, ALIGN / 4>(plane + byte / 4, words);
    } else {
      word index = byte / 4, shift = byte % 4 * 8, x = plane[index < last ? index : last];
      UNROLL for (int i = 0; i < WORDS; i++) {
        word next = plane[index + i < last ? index + i + 1 : last];
        words[i] = funnel_shift(x, next, shift);
        x = next;
      }
    }
  }
};

// Where the values of a packed row are: GROUPS groups of DIM / GROUPS, each shared by LANES lanes
// that take SPAN neighbouring values of it. A lane may reach behind a group's end; what it finds
// there must not count.
template <int DIM, int BITS, int GROUPS, int LANES>
struct Layout {
  CONST int GROUP = DIM / GROUPS;
  CONST int SPAN = (GROUP + 8 * LANES - 1) / (8 * LANES) * 8;
  CONST int ROW_BYTES = DIM * BITS / 8;
  CONST int GROUP_BYTES = GROUP * BITS / 8;
  CONST int SPAN_BYTES = SPAN * BITS / 8;
  CONST int ODD = ROW_BYTES | GROUP_BYTES | SPAN_BYTES | 16;
  CONST int ALIGN = GROUP == SPAN * LANES ? (ODD & -ODD) : 1;
  typedef Span<BITS, SPAN, ALIGN> Codes;
  CONST int WORDS = Codes::WORDS;
};
