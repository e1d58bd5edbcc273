// The numbers that the shape of a kernel follows from, each with its reason; docs/kernels.md has more of them.
#pragma once

namespace lserve::cuda {

// Products are m16n8k16: 16 rows, 8 columns. What there is most of is made the rows.
constexpr int kThreads = 128;  // of a block of attention: four warps, so that an SM holds several that wait at different times
constexpr int kKeys = 64;      // of a tile that a block shares: the keys of one page, by default
constexpr int kWarpKeys = 16;  // of a warp's tile in decode: the rows, since it has one query
constexpr int kGroup = 8;      // query heads of decode that share a pass over the keys: the columns
constexpr int kQueries = 64;   // of a tile of prefill: the rows, 16 a warp
constexpr int kMassRows = 16;  // pairs of query and head in attention_mass: the rows; a warp's 16 keys are two times 8 columns
constexpr int kScoreHeads = 16;  // query heads that share a pass over statistics: the rows

// Tiles in shared memory at a time. One is used while the others come.
constexpr int kDecodeStages = 3;      // 26 KB a warp with 128 channels, so two blocks an SM; three keep memory busy
constexpr int kDecodeFewStages = 2;   // with 256 channels, 34 KB a warp; and for the few tokens that are not codes
constexpr int kDecodeCodeStages = 3;  // as kDecodeStages
constexpr int kPrefillStages = 2;     // 68 KB with 128 channels, so two blocks an SM; a tile is multiplied longer than it comes
constexpr int kScoreStages = 2;       // each thread waits for its own copies only

// Blocks that share a sequence leave a partial result each, and the table of them has to end somewhere.
constexpr int kMaxSplits = 64;      // of decode; a longer sequence has longer splits
constexpr int kPrefillSplits = 32;  // of few queries, whose partial results are larger
constexpr int kSplitChunk = 512;    // tokens: a split of few queries is worth a block's prologue and a partial result
constexpr int kSplitQueries = 16;   // of a sequence, at most: with more, prefill fills its own tiles

// Threads of a block that has no tiles of keys.
constexpr int kPageThreads = 128;    // a page has 64 tokens: two threads a token, or one for 8 channels of a group
constexpr int kScoreThreads = 128;   // four to a group of statistics, 8 groups a warp: the columns
constexpr int kSelectThreads = 512;  // one block a row has to read all of it
constexpr int kMassQueries = 8;      // of general_mass_kernel, in shared memory at a time; each half takes every other one
constexpr int kMassBatch = kThreads / kMassRows;  // steps of so many rows that are put down together, a thread each

}  // namespace lserve::cuda
