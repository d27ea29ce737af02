// What the parts of an attention share: what changes from call to call, what a query sees, and
// where the blocks of packed tokens are.

CONST int WARPS = 4;
CONST int THREADS = 32 * WARPS;
CONST int COLUMNS = 8;           // query rows per block of threads
CONST int ROW_BITS = 24;         // as in blocks.py: a block's id is slab << ROW_BITS | row
CONST float FLOOR = -1e30f;      // below every score, and finite
CONST float LOG2_E = 1.44269504f;

// What changes from call to call.
struct Call {
  int batch, kv_heads;
  int capacity, slots;  // of a sequence: ids in its table, tokens in its tail
  int exact_splits;     // of its tail
  int splits, share;    // of its packed keys, and how many keys each of them takes
  int rows;             // query rows per KV head: query heads that share it * query tokens
  int query_tokens;     // the last tokens of every sequence
  int exact_tokens;     // that a query sees exactly before its own block
  int causal, window;
  int mask_strides[4];  // batch, query head, query token, key
  float scale;
};

// Packed keys that a launch finds as halves (`expand.h`): the position of the first, a multiple of a
// block, and how many there are of a sequence.
struct Span {
  int first, tokens;
  int padded_rows;  // of queries as halves
  int goes_on;      // behind an earlier span
  int exact;        // whether the exact keys are in this launch
};
CONST int SIZES = 4;  // of a token: its key's size, its value's log2, and that inverted
FN void write_sizes(OUT(float) out, float key, float value) {
  out[0] = key, out[1] = fast_log2(value), out[2] = 1 / value, out[3] = 0;
}

// A sequence: the positions where its tail begins and where it ends.
struct Extent {
  int start, length;
};

// The first position that a query sees exactly; BLOCK tokens are a block.
template <int BLOCK>
FN int packed_limit(IN(Call) call, Extent extent, int position) {
  return max(position / BLOCK * BLOCK - call->exact_tokens, extent.start);
}

// The first position that any query of a sequence sees.
FN int first_seen(IN(Call) call, Extent extent) {
  return call->window ? max(0, extent.length - call->query_tokens - call->window + 1) : 0;
}

// What a query row of a KV head sees: positions from lower up to upper, packed ones before limit.
struct Seen {
  int lower, limit, upper;
  size_t mask_row;
};

template <int BLOCK>
FN Seen seen_by(IN(Call) call, Extent extent, int head, int index) {
  const int tokens = call->query_tokens, token = index % tokens;
  const int self = extent.length - tokens + token;
  const int query_head = head % call->kv_heads * (call->rows / tokens) + index / tokens;
  Seen seen;
  seen.lower = call->window ? self - call->window + 1 : 0;
  seen.limit = packed_limit<BLOCK>(call, extent, self);
  seen.upper = index >= call->rows ? -1 : call->causal ? self + 1 : extent.length;
  seen.mask_row = size_t(head / call->kv_heads) * call->mask_strides[0] +
                  size_t(query_head) * call->mask_strides[1] +
                  size_t(token) * call->mask_strides[2];
  return seen;
}

// The pieces of memory that hold blocks as rows of words.
template <int SLABS>
struct Slabs {
  IN(word) at[SLABS];
};

// The words of a block. Pointers are read before they are compared for: an index would put them in
// memory.
template <int SLABS>
FN IN(word) block_row(const LOCAL Slabs<SLABS>& slabs, int id, int words) {
  IN(word) slab = slabs.at[0];
  UNROLL for (int i = 1; i < SLABS; i++) {
    IN(word) other = slabs.at[i];
    slab = id >> ROW_BITS == i ? other : slab;
  }
  return slab + size_t(id & ((1 << ROW_BITS) - 1)) * words;
}
