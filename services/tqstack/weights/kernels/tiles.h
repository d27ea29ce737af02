// A tile of 16 x 16 weights: 256 values in one circular stream of BITS bits each, in the order of
// `multiply_add`'s left factor. Eight neighbouring values are a lane's; each decodes from the WINDOW
// bits that begin with its own. WINDOW == BITS: a scalar code.

CONST int LARGE_TABLE = TABLE_COPIES == 32 ? 32768 : 4096;  // words, see `lookup.h`

template <int BITS, int WINDOW>
struct Tile {
  typedef Table<BITS, WINDOW == BITS ? 0 : WINDOW, LARGE_TABLE> Levels;
  CONST int WORDS = 8 * BITS, SPAN = 8 * BITS;             // of a tile, in words; of a lane, in bits
  CONST int LAST = BITS % 2 ? 24 : BITS == 2 ? 16 : 0;    // where the latest span of a word begins
  CONST bool TWO = LAST + SPAN + WINDOW - BITS > 32;       // lanes may reach into a second word
  word first;

  FN void read(IN(word) tile, int lane) {
    word one[1];
    read_words<1, 1>(tile + stream_lane(lane) * SPAN / 32, one);
    first = one[0];
  }
  // The left factor. All lanes take part: a span's end may be in another one's word.
  FN void decode(SHARED(const word) table, int lane, LOCAL word (&a)[4]) const {
    word words[2];
    spans(lane, words);
    UNROLL for (int i = 0; i < 4; i++) a[i] = pair(words, table, lane, i);
  }
  // A lane's span, from the lowest bit on.
  FN void spans(int lane, LOCAL word (&words)[2]) const {
    const int at = stream_lane(lane) * SPAN;
    words[0] = first, words[1] = 0;
    if (TWO) {
      const int next = ((at / 32 + 1) * 32 + SPAN - 1) / SPAN % 32;  // whose word is the next one
      words[1] = shuffle_word(first, fragment_lane(next / 4, next % 4));
    }
    if (LAST) words[0] = funnel_shift(words[0], words[1], at % 32);
  }
  FN static word pair(const LOCAL word (&words)[2], SHARED(const word) table, int lane, int i) {
    return decode_pair<Levels>(words, i, table, lane % Levels::COPIES * 4);
  }
  FN static int stream_lane(int lane) { return fragment_row(lane) * 4 + fragment_pair(lane); }
};
