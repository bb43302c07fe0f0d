// The selection of one image's patches, by a group of workers.
//
// A Group has rank() and size(); sync(), which makes each worker's writes visible to all;
// sum(value) over the group; and scan(value), the sum over the workers of lower rank. It consists
// of teams() smaller groups: team() is the worker's own and team_rank() its number. On a CPU a
// group is one worker, so that the compiler can vectorize the loops below.
#ifndef HIVTP_SELECT_H_
#define HIVTP_SELECT_H_

#include "hivtp/api.h"
#include "hivtp/sort_key.h"

namespace hivtp {

// HivtpStage as the type in which it is stored.
constexpr int8_t kNone = HIVTP_PADDING, kGlobal = HIVTP_GLOBAL, kLocal = HIVTP_LOCAL,
                 kFilled = HIVTP_FILLED;

// i / divisor for 0 <= i < HIVTP_MAX_PATCHES without an integer division. Exact: (i + 0.5) /
// divisor stays 0.5 / divisor away from an integer, far more than the rounding error.
struct Divider {
  float inverse;
  HIVTP_HD explicit Divider(int32_t divisor) : inverse(1.0f / float(divisor)) {}
  HIVTP_HD int32_t operator()(int32_t i) const { return int32_t((float(i) + 0.5f) * inverse); }
};

// Half-open range of rows (or columns) of one of `count` regions over `extent`.
struct Range {
  int32_t start, length;
  HIVTP_HD Range(int32_t region, int32_t extent, int32_t count)
      : start((region * extent + count - 1) / count),
        length(((region + 1) * extent + count - 1) / count - start) {}
};

// The place of a region and the number of patches it keeps.
struct Region {
  Range y, x;
  int32_t area, quota;
  HIVTP_HD Region(const HivtpSelectParams& params, int32_t row, int32_t column)
      : y(row, params.height, params.regions_y),
        x(column, params.width, params.regions_x),
        area(y.length * x.length) {
    const bool tall = y.length * params.regions_y > params.height;
    const bool wide = x.length * params.regions_x > params.width;
    const int32_t region = row * params.regions_x + column;
    quota =
        of_class(params.quota_base, tall, wide) + (region < of_class(params.quota_cut, tall, wide));
  }

 private:
  // values[2 * tall + wide] without an index known only at run time, for which a device would have
  // to keep the array in memory.
  HIVTP_HD static int32_t of_class(const int32_t (&values)[4], bool tall, bool wide) {
    return tall ? wide ? values[3] : values[2] : wide ? values[1] : values[0];
  }
};

// The `quota`-th largest of n keys, or a smaller number that exactly as many keys reach, for
// 1 <= quota <= number of keys above 0. Found bit by bit, from the top.
template <class Group>
HIVTP_HD int64_t threshold(const Group& group, const int64_t* keys, int32_t n, int32_t quota) {
  int64_t cut = 0;
  for (int32_t bit = kKeyBits - 1; bit >= 0; --bit) {
    const int64_t candidate = cut | int64_t(1) << bit;
    int64_t count = 0;
    for (int32_t i = group.rank(); i < n; i += group.size()) count += keys[i] >= candidate;
    count = group.sum(count);
    if (count >= quota) cut = candidate;
    if (count == quota) break;
  }
  return cut;
}

// Global stage of one region: writes the stage of each of its patches. `keys` is scratch for the
// whole image; each region uses its own part, so several groups may work at once.
template <class Group>
HIVTP_HD void select_region(const Group& group, const float* scores,
                            const HivtpSelectParams& params, int32_t row, int32_t column,
                            int64_t* keys, int8_t* stage) {
  const Region region(params, row, column);
  const int32_t top = region.y.start * params.width;
  const int32_t corner = top + region.x.start;
  const int32_t step = params.width - region.x.length;
  const Divider by_width(region.x.length);
  keys += top + region.y.length * region.x.start;
  for (int32_t i = group.rank(); i < region.area; i += group.size()) {
    const int32_t index = corner + i + by_width(i) * step;
    keys[i] = sort_key(scores[index], index);
  }
  group.sync();
  // Every key reaches 0 and none reaches 2^kKeyBits.
  int64_t cut = region.quota > 0 ? 0 : int64_t(1) << kKeyBits;
  if (region.quota > 0 && region.quota < region.area) {
    cut = threshold(group, keys, region.area, region.quota);
  }
  for (int32_t i = group.rank(); i < region.area; i += group.size()) {
    stage[corner + i + by_width(i) * step] = keys[i] >= cut ? kGlobal : kNone;
  }
}

// Local stage and, if `params.fill`, filling up to the capacity. Kept patches always have key 0.
template <class Group>
HIVTP_HD void select_rest(const Group& group, const float* scores, const HivtpSelectParams& params,
                          int64_t* keys, int8_t* stage) {
  const int32_t patches = params.height * params.width;
  for (int32_t i = group.rank(); i < patches; i += group.size()) {
    keys[i] = stage[i] == kNone ? sort_key(scores[i], i) : 0;
  }
  group.sync();

  const int32_t columns = (params.width + params.window_x - 1) / params.window_x;
  const int32_t windows = (params.height + params.window_y - 1) / params.window_y * columns;
  const Divider by_columns(columns);
  for (int32_t i = group.rank(); i < windows; i += group.size()) {
    const int32_t top = by_columns(i) * params.window_y;
    const int32_t left = (i - by_columns(i) * columns) * params.window_x;
    const int32_t bottom =
        top + params.window_y < params.height ? top + params.window_y : params.height;
    const int32_t right =
        left + params.window_x < params.width ? left + params.window_x : params.width;
    int64_t best = 0;
    for (int32_t y = top; y < bottom; ++y) {
      for (int32_t x = left; x < right; ++x) {
        const int64_t key = keys[y * params.width + x];
        best = key > best ? key : best;
      }
    }
    if (best > 0) {
      stage[key_index(best)] = kLocal;
      keys[key_index(best)] = 0;
    }
  }
  group.sync();

  if (!params.fill) return;
  int64_t kept = 0;
  for (int32_t i = group.rank(); i < patches; i += group.size()) kept += keys[i] == 0;
  const int32_t missing = params.capacity - int32_t(group.sum(int64_t(kept)));
  if (missing <= 0) return;
  const int64_t cut = threshold(group, keys, patches, missing);
  for (int32_t i = group.rank(); i < patches; i += group.size()) {
    stage[i] = keys[i] >= cut ? kFilled : stage[i];
  }
  group.sync();
}

// Writes the kept patches in raster order, then the padding. Each worker takes a run of patches.
template <class Group>
HIVTP_HD void write_selection(const Group& group, const int8_t* stage,
                              const HivtpSelectParams& params, int32_t* indices, int32_t* count,
                              int8_t* stages) {
  const int32_t patches = params.height * params.width;
  const int32_t run = (patches + group.size() - 1) / group.size();
  const int32_t begin = group.rank() * run < patches ? group.rank() * run : patches;
  const int32_t end = begin + run < patches ? begin + run : patches;
  int32_t kept = 0;
  for (int32_t i = begin; i < end; ++i) kept += stage[i] != kNone;
  int32_t slot = int32_t(group.scan(kept));
  const int32_t last = slot + kept;
  // No branch on the data: a patch not kept is overwritten by the next. The loop ends at the run's
  // last kept patch, so that no worker writes into another's slots.
  for (int32_t i = begin; slot < last; ++i) {
    indices[slot] = i;
    stages[slot] = stage[i];
    slot += stage[i] != kNone;
  }
  const int32_t total = int32_t(group.sum(int64_t(kept)));
  for (int32_t i = total + group.rank(); i < params.capacity; i += group.size()) {
    indices[i] = -1;
    stages[i] = kNone;
  }
  if (group.rank() == 0) *count = total;
}

// The whole selection of one image. `keys` and `stage` are scratch of height * width entries.
template <class Group>
HIVTP_HD void select_image(const Group& group, const float* scores, const HivtpSelectParams& params,
                           int64_t* keys, int8_t* stage, int32_t* indices, int32_t* count,
                           int8_t* stages) {
  const int32_t regions = params.regions_y * params.regions_x;
  for (int32_t region = group.team_rank(); region < regions; region += group.teams()) {
    select_region(group.team(), scores, params, region / params.regions_x,
                  region % params.regions_x, keys, stage);
  }
  group.sync();
  select_rest(group, scores, params, keys, stage);
  write_selection(group, stage, params, indices, count, stages);
}

}  // namespace hivtp

#endif  // HIVTP_SELECT_H_
