// A span of packed blocks to halves, once for all query rows that will read it. A block of threads
// takes one KV head of a block of tokens. What a vector's halves are relative to is its size, the
// largest of its scales: with one scale a vector they are the codebook's own values, exactly.

CONST float LEAST = 6e-8f;  // about the smallest half above zero

template <int D, int BITS, int WINDOW, int GROUPS, bool ALONE>
struct Expand {
  CONST int GROUP_SPANS = D / GROUPS / 8;  // spans of 8 values
  typedef Layout<D, BITS, WINDOW, GROUPS, GROUP_SPANS> L;
  typedef Table<BITS, WINDOW, ALONE ? 8192 : 4096> T;

  FN static float size(IN(half_t) scales) {
    float largest = LEAST;
    UNROLL for (int g = 0; g < GROUPS; g++) largest = fmax(largest, fabs(to_float(scales[g])));
    return largest;
  }

  // `tokens` vectors, whose codes are `plane` bytes into a block.
  FN static void vectors(IN(word) block, word plane, IN(half_t) scales, int tokens,
                         SHARED(const word) table, OUT(word) out, int tid) {
    const word copy = tid % 32 % T::COPIES * 4;
    for (int i = tid; i < tokens * (D / 8); i += THREADS) {
      const int token = i / (D / 8), group = i % (D / 8) / GROUP_SPANS, lane = i % GROUP_SPANS;
      word codes[L::WORDS], halves[4];
      const word at = plane + token * L::ROW_BYTES + group * L::GROUP_BYTES + lane * L::SPAN_BYTES;
      L::read(block, at, 0, lane, codes);
      const float own = to_float(scales[token * GROUPS + group]);
      const float factor = own / size(scales + token * GROUPS);
      UNROLL for (int pair = 0; pair < 4; pair++) {
        const word x = decode_pair<T>(codes, pair, table, copy);
        halves[pair] = pack_halves(low_half(x) * factor, high_half(x) * factor);
      }
      write_4(out + size_t(i) * 4, halves);
    }
  }
};

template <int DK, int DV, int KB, int VB, int KW, int VW, int KG, int VG, bool ONE_TABLE, int BLOCK,
          int SLABS>
FN void expand(const LOCAL Slabs<SLABS>& slabs, IN(int) table, IN(word) key_entries,
               IN(word) value_entries, IN(Span) span, IN(Call) call, OUT(word) keys,
               OUT(word) values, OUT(float) sizes, SHARED(word) memory, int tid, int index,
               int head) {
  typedef Expand<DK, KB, KW, KG, ONE_TABLE> K;
  typedef Expand<DV, VB, VW, VG, ONE_TABLE> V;
  SHARED(word) value_table = memory + (ONE_TABLE ? 0 : K::T::WORDS);
  fill_table<typename K::T, THREADS>(memory, key_entries, tid);
  if (!ONE_TABLE) fill_table<typename V::T, THREADS>(value_table, value_entries, tid);
  block_sync();

  const int kv_heads = call->kv_heads;
  const word own = head % kv_heads * BLOCK, all = kv_heads * BLOCK;
  const word key_scales = all * K::L::ROW_BYTES, value_codes = key_scales + all * 2 * KG;
  const word value_scales = value_codes + all * V::L::ROW_BYTES;
  const int words = (value_scales + all * 2 * VG) / 4;
  table += size_t(head / kv_heads) * call->capacity + span->first / BLOCK;
  IN(word) block = block_row(slabs, table[index], words);
  IN(half_t) key_scale = (IN(half_t))block + key_scales / 2 + own * KG;
  IN(half_t) value_scale = (IN(half_t))block + value_scales / 2 + own * VG;
  const size_t first = size_t(head) * span->tokens + index * BLOCK;  // of all heads' tokens
  K::vectors(block, own * K::L::ROW_BYTES, key_scale, BLOCK, memory, keys + first * (DK / 2), tid);
  V::vectors(block, value_codes + own * V::L::ROW_BYTES, value_scale, BLOCK, value_table,
             values + first * (DV / 2), tid);
  for (int token = tid; token < BLOCK; token += THREADS)
    write_sizes(sizes + (first + token) * SIZES, K::size(key_scale + token * KG),
                V::size(value_scale + token * VG));
}
