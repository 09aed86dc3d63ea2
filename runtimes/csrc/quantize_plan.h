// How the quantizers lay rows over warps, and how much shared memory that takes: plain C++, which tests run on the
// host.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <utility>

#include "unpack.h"

namespace qvdit {

constexpr int kVector = 8;     // elements that a thread has for every 256 of its warp
constexpr int kMaxWarps = 16;  // of a row, of a group of rows, and of a block that has several
constexpr int kLines = 8;      // of a warp: lanes 4 c … 4 c + 3 are line c, a row of the products' operands

// A block has several rows or groups only where that leaves so many blocks, but for few rows beside an alpha, and where
// fewer than kFewestWarps would run.
constexpr int64_t kBlocksWanted = 2 * 132;

// What so many warps of so many vectors a thread cost. Beside its vectors a warp has to find maxima and scales, which
// takes as long as two of them.
constexpr int64_t warps_cost(int64_t warps, int vectors) {
  constexpr int kOverhead = 2;
  return warps * (vectors + kOverhead);
}

constexpr int64_t warps_of(int64_t k_pad, int64_t held) { return (k_pad + held - 1) / held; }

// Vectors a thread, of those that a kernel has: what costs a row's warps least.
inline int vectors_per_thread(int64_t k_pad, std::initializer_list<int> candidates) {
  int best = 0;
  int64_t least = 0;
  for (int candidate : candidates) {
    const int64_t warps = warps_of(k_pad, 32 * candidate * kVector);
    if (warps > kMaxWarps) continue;
    const int64_t cost = warps_cost(warps, candidate);
    if (best == 0 || cost < least) best = candidate, least = cost;
  }
  return best;
}

// Rows of 16 bits, each in warps of its own: quantize_halves.cuh ------------------------------------------------------

constexpr int kKept = 16;  // rows whose results are written at once

// What a warp finds of a row.
template <bool kLowRank>
struct WarpResult {
  float scale;
  int stored_zero;
  int sum;                         // of what is stored
  float u[kLowRank ? kLines : 1];  // Σ (x_q - zero) alpha, of each line
};

struct HalvesPlan {
  int warps;   // of a row
  int rows;    // of a block
  int shared;  // bytes of a block
};

// shared_limit: bytes of shared memory that a block may have.
template <bool kLowRank>
HalvesPlan plan_halves(int64_t m, int64_t k_pad, int vectors, int shared_limit) {
  constexpr int kWarpsWanted = 4;  // a block
  // Few rows leave multiprocessors without work; of these too a block has several, as alpha is as many bytes as a row.
  constexpr int64_t kFewRows = 1024, kBlocksOfFew = 256;
  constexpr int kVectorBytes = 16, kAlphaBytes = kLowRank ? 16 : 0, kResults = kKept * sizeof(WarpResult<kLowRank>);
  const int warps = static_cast<int>(warps_of(k_pad, 32 * vectors * kVector));
  int rows = std::max(kWarpsWanted / warps, 1);
  while (rows > 1 && m < rows * kBlocksWanted) rows /= 2;
  if (kLowRank && m <= kFewRows) rows = static_cast<int>(std::clamp<int64_t>(m / kBlocksOfFew, 1, kMaxWarps / warps));
  const auto bytes = [&] { return warps * (32 * vectors * (rows * kVectorBytes + kAlphaBytes) + rows * kResults); };
  while (rows > 1 && bytes() > shared_limit) --rows;
  return {warps, rows, bytes()};
}

// Rows of 16 bits in groups: quantize_groups.cuh ----------------------------------------------------------------------

constexpr int kLineLanes = 4;          // hold a line's
constexpr int kSegment = 32;           // elements of a line, in a vector
constexpr int kSlots = 4;              // of a product
constexpr int kMaxGroups = kMaxWarps;  // a block
constexpr int kMostLog2Kept = 2;
constexpr int kMostKept = 1 << kMostLog2Kept;  // iterations whose results a group writes at once

// What the threads of a group tell each other.
struct GroupShared {
  uint32_t range[3][2][kLines];  // [iteration mod 3][highest, lowest][row], bits of floats >= 0
  float scale[kMostKept][kLines];
  int stored_zero[kMostKept][kLines];
  int row_sum[kMostKept][kLines];
};

// How rows lie in warps.
struct GroupShape {
  int log2_rows;  // of a group's rows: 3, 2 or 1
  int warps;      // of a group
  int log2_kept;  // iterations whose results are written at once

  QVDIT_HOST_DEVICE int rows() const { return 1 << log2_rows; }
  QVDIT_HOST_DEVICE int kept() const { return 1 << log2_kept; }
  QVDIT_HOST_DEVICE int log2_segments() const { return 3 - log2_rows; }
  QVDIT_HOST_DEVICE int segments() const { return 1 << log2_segments(); }
  // Pieces of a row, one of each warp and segment.
  QVDIT_HOST_DEVICE int pieces() const { return warps << log2_segments(); }
  // Products for every vector of a warp.
  QVDIT_HOST_DEVICE int sets(int rank) const { return (rank * segments() + kSlots - 1) / kSlots; }
  // Bytes of shared memory: a rank's alpha, for all groups; a group's parts of the low-rank term, as long as it keeps
  // them; all that a group has for itself.
  QVDIT_HOST_DEVICE int rank_bytes(int vectors) const { return odd_lines(pieces() * piece_bytes(vectors)); }
  QVDIT_HOST_DEVICE int alpha_bytes(int rank, int vectors) const { return rank * rank_bytes(vectors); }
  QVDIT_HOST_DEVICE int sum_bytes(int rank) const { return pieces() * rank * rows() * 4 << log2_kept; }
  QVDIT_HOST_DEVICE int group_bytes(int rank, int vectors) const {
    return static_cast<int>(sizeof(GroupShared)) + sum_bytes(rank) + warps * vectors * 32 * 16;
  }

  // alpha of a piece. What lanes read at once is 64 bytes of two slots, in banks of their own.
  static QVDIT_HOST_DEVICE constexpr int piece_bytes(int vectors) { return odd_lines(vectors * kSegment * 2); }
  static QVDIT_HOST_DEVICE constexpr int odd_lines(int bytes) { return bytes | 64; }
};

// Vectors a thread and how rows lie. vectors is 0 where nothing fits.
struct GroupPlan {
  int vectors = 0;
  GroupShape shape = {};

  // Bytes of shared memory of a block of so many groups.
  int block_bytes(int groups, int rank) const {
    return shape.alpha_bytes(rank, vectors) + groups * shape.group_bytes(rank, vectors);
  }
};

constexpr int kFewestWarps = 8;  // beside one alpha: fewer would wait too long

// How many groups fit a block, beside one alpha.
inline int groups_that_fit(const GroupPlan& plan, int rank, int shared_limit) {
  const int room = shared_limit - plan.block_bytes(0, rank);
  return room < 0 ? 0 : std::min(room / plan.shape.group_bytes(rank, plan.vectors), kMaxGroups);
}

// How many groups of a plan run at once, roughly: as many as fit a block, and no more than kMaxWarps warps. What a
// multiprocessor really has is asked in groups_a_block.
inline int running_groups(const GroupPlan& plan, int rank, int shared_limit) {
  return std::min(groups_that_fit(plan, rank, shared_limit), kMaxWarps / plan.shape.warps);
}

// Groups of so many rows: of those of which two run at once, else of all, the vectors that cost least. Four iterations'
// results are written at once where there is room for them: each time the group meets once more.
inline GroupPlan plan_groups_of(int log2_rows, int64_t k_pad, int rank, int shared_limit) {
  GroupPlan best;
  std::pair<bool, int64_t> least;  // whether one alone runs; the cost
  for (int vectors : {12, 10, 8}) {
    const int64_t warps = warps_of(k_pad, kSegment * vectors * (kLines >> log2_rows));
    if (warps > kMaxWarps) continue;
    for (int log2_kept : {kMostLog2Kept, 0}) {
      const GroupPlan plan{vectors, {log2_rows, static_cast<int>(warps), log2_kept}};
      if (groups_that_fit(plan, rank, shared_limit) * warps < kFewestWarps) continue;
      const std::pair cost(running_groups(plan, rank, shared_limit) < 2, warps_cost(warps, vectors));
      if (best.vectors == 0 || cost < least) best = plan, least = cost;
      break;
    }
  }
  return best;
}

// The most rows a group that fit. Of a group of kLarge vectors and more a multiprocessor holds one or two, whose warps
// all wait at each meeting: of fewer rows then, as long as as many warps run and a vector takes at most kMostSets
// products (of rank 8 four made 106 µs of 98 at K = 3072). How many rows there are does not matter: no sum's order may
// depend on it.
//
// µs at rank 4 of 32768 rows on a GPU that bf16 products keep hot, in groups of eight with 8, 10 and 12 vectors, and of
// four: K = 1152: 43, 40, 40 | 49 at best; 1920: 65, 65, 61 | 65; 3072: 107, -, 91 | 101, 102, 89; 4608: -, 144, 142 |
// -, 150, 138; 5120: -, 154, 154 | -, 154, 161; 5760: -, -, 163 | -, -, 170. At rank 2 of 4608: 137 | 124, of 5120: 155
// | 145. With 14 to 20 vectors twelve warps run instead of sixteen: none was faster (H200, 2026-11-29).
inline GroupPlan plan_groups(int64_t k_pad, int rank, int shared_limit) {
  constexpr int kLarge = 96;  // vectors of all of a group's warps: 48 KB
  constexpr int kMostSets = 2;
  GroupPlan chosen;
  int running = 0;  // warps
  for (int log2_rows = 3; log2_rows >= 1; --log2_rows) {
    const GroupPlan plan = plan_groups_of(log2_rows, k_pad, rank, shared_limit);
    if (plan.vectors == 0) continue;
    const int would_run = running_groups(plan, rank, shared_limit) * plan.shape.warps;
    if (chosen.vectors > 0 && (plan.shape.sets(rank) > kMostSets || would_run < running)) break;
    chosen = plan, running = would_run;
    if (plan.shape.warps * plan.vectors < kLarge) break;
  }
  return chosen;
}

// What a multiprocessor has for a kernel.
struct Multiprocessor {
  int warps;   // that its registers hold
  int shared;  // bytes
};

// How many groups a block should have, so that with one alpha in shared memory for all of them as many warps as
// possible run at once: the fewest, as more groups, for fewer copies of alpha, took longer; and no more than
// most_groups, unless fewer than kFewestWarps would run.
inline int groups_a_block(const Multiprocessor& has, int shared_limit, const GroupPlan& plan, int rank,
                          int most_groups) {
  constexpr int kReserved = 1 << 10;  // bytes a block, by CUDA
  const int warps = plan.shape.warps, fit = groups_that_fit(plan, rank, shared_limit);
  int best = 1, most_warps = 0;
  for (int groups = 1; groups <= fit && groups * warps <= kMaxWarps; ++groups) {
    if (groups > most_groups && most_warps >= kFewestWarps) break;
    const int blocks =
        std::min(has.warps / (groups * warps), has.shared / (plan.block_bytes(groups, rank) + kReserved));
    if (blocks * groups * warps > most_warps) best = groups, most_warps = blocks * groups * warps;
  }
  return best;
}

}  // namespace qvdit
