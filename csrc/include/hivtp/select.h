// The selection of one image's patches, by a group of workers.
//
// A Group has rank() and size(), sync(), which makes what one worker wrote visible to all,
// sum(value) over the group, and scan(value): the sum over the workers of lower rank. It falls into
// teams() groups, of which team() is the worker's own and team_rank() says which that is. On a CPU
// all of these are one worker, so that the loops below turn into vectors.
#ifndef HIVTP_SELECT_H_
#define HIVTP_SELECT_H_

#include "hivtp/api.h"
#include "hivtp/sort_key.h"

namespace hivtp {

// Stages of a selection, as in api.h.
constexpr int8_t kNone = 0, kGlobal = 1, kLocal = 2, kFilled = 3;

// i / divisor for 0 <= i < 4096 without an integer division. Exact: (i + 0.5) / divisor stays
// 0.5 / divisor away from an integer, which is far more than the rounding.
struct Divider {
  float inverse;
  HIVTP_HD explicit Divider(int32_t divisor) : inverse(1.0f / float(divisor)) {}
  HIVTP_HD int32_t operator()(int32_t i) const { return int32_t((float(i) + 0.5f) * inverse); }
};

// Half-open range of rows (or columns) of one region of `count` over `extent`.
struct Range {
  int32_t start, length;
  HIVTP_HD Range(int32_t region, int32_t extent, int32_t count)
      : start((region * extent + count - 1) / count),
        length(((region + 1) * extent + count - 1) / count - start) {}
};

// Where a region lies and how many patches it keeps.
struct Region {
  Range y, x;
  int32_t area, quota;
  HIVTP_HD Region(const HivtpRule& rule, int32_t row, int32_t column)
      : y(row, rule.height, rule.regions_y),
        x(column, rule.width, rule.regions_x),
        area(y.length * x.length) {
    const bool tall = y.length * rule.regions_y > rule.height;
    const bool wide = x.length * rule.regions_x > rule.width;
    const int32_t region = row * rule.regions_x + column;
    quota = of_class(rule.quota_base, tall, wide) + (region < of_class(rule.quota_cut, tall, wide));
  }

 private:
  // values[2 * tall + wide] without an index that only run time knows: a device has to keep an
  // array in memory for that.
  HIVTP_HD static int32_t of_class(const int32_t (&values)[4], bool tall, bool wide) {
    return tall ? wide ? values[3] : values[2] : wide ? values[1] : values[0];
  }
};

// The `quota`-th largest of n keys, or a smaller number that as many keys reach.
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
// whole image; regions use their own parts, so that several groups may share them out.
template <class Group>
HIVTP_HD void select_region(const Group& group, const float* scores, const HivtpRule& rule,
                            int32_t row, int32_t column, int64_t* keys, int8_t* stage) {
  const Region region(rule, row, column);
  const int32_t top = region.y.start * rule.width;
  const int32_t corner = top + region.x.start;
  const int32_t step = rule.width - region.x.length;
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

// Local stage and, where the rule asks for it, the filling. Patches kept have key 0 throughout.
template <class Group>
HIVTP_HD void select_rest(const Group& group, const float* scores, const HivtpRule& rule,
                          int64_t* keys, int8_t* stage) {
  const int32_t patches = rule.height * rule.width;
  for (int32_t i = group.rank(); i < patches; i += group.size()) {
    keys[i] = stage[i] == kNone ? sort_key(scores[i], i) : 0;
  }
  group.sync();

  const int32_t columns = (rule.width + rule.window_x - 1) / rule.window_x;
  const int32_t windows = (rule.height + rule.window_y - 1) / rule.window_y * columns;
  const Divider by_columns(columns);
  for (int32_t i = group.rank(); i < windows; i += group.size()) {
    const int32_t top = by_columns(i) * rule.window_y;
    const int32_t left = (i - by_columns(i) * columns) * rule.window_x;
    const int32_t bottom = top + rule.window_y < rule.height ? top + rule.window_y : rule.height;
    const int32_t right = left + rule.window_x < rule.width ? left + rule.window_x : rule.width;
    int64_t best = 0;
    for (int32_t y = top; y < bottom; ++y) {
      for (int32_t x = left; x < right; ++x) {
        const int64_t key = keys[y * rule.width + x];
        best = key > best ? key : best;
      }
    }
    if (best > 0) {
      stage[key_index(best)] = kLocal;
      keys[key_index(best)] = 0;
    }
  }
  group.sync();

  if (!rule.fill) return;
  int64_t kept = 0;
  for (int32_t i = group.rank(); i < patches; i += group.size()) kept += keys[i] == 0;
  const int32_t missing = rule.capacity - int32_t(group.sum(int64_t(kept)));
  if (missing <= 0) return;
  const int64_t cut = threshold(group, keys, patches, missing);
  for (int32_t i = group.rank(); i < patches; i += group.size()) {
    stage[i] = keys[i] >= cut ? kFilled : stage[i];
  }
  group.sync();
}

// Writes the kept patches in raster order, and the tail. Each worker takes a run of patches.
template <class Group>
HIVTP_HD void write_selection(const Group& group, const int8_t* stage, const HivtpRule& rule,
                              int32_t* indices, int32_t* count, int8_t* stages) {
  const int32_t patches = rule.height * rule.width;
  const int32_t run = (patches + group.size() - 1) / group.size();
  const int32_t begin = group.rank() * run < patches ? group.rank() * run : patches;
  const int32_t end = begin + run < patches ? begin + run : patches;
  int32_t kept = 0;
  for (int32_t i = begin; i < end; ++i) kept += stage[i] != kNone;
  int32_t slot = int32_t(group.scan(kept));
  const int32_t last = slot + kept;
  // No branch on the data: a patch not kept is overwritten by the next, and the loop ends with the
  // run's last kept patch, so that nobody writes into another worker's slots.
  for (int32_t i = begin; slot < last; ++i) {
    indices[slot] = i;
    stages[slot] = stage[i];
    slot += stage[i] != kNone;
  }
  const int32_t total = int32_t(group.sum(int64_t(kept)));
  for (int32_t i = total + group.rank(); i < rule.capacity; i += group.size()) {
    indices[i] = -1;
    stages[i] = kNone;
  }
  if (group.rank() == 0) *count = total;
}

// All of it for one image. `keys` and `stage` are scratch of height * width entries.
template <class Group>
HIVTP_HD void select_image(const Group& group, const float* scores, const HivtpRule& rule,
                           int64_t* keys, int8_t* stage, int32_t* indices, int32_t* count,
                           int8_t* stages) {
  const int32_t regions = rule.regions_y * rule.regions_x;
  for (int32_t region = group.team_rank(); region < regions; region += group.teams()) {
    select_region(group.team(), scores, rule, region / rule.regions_x, region % rule.regions_x,
                  keys, stage);
  }
  group.sync();
  select_rest(group, scores, rule, keys, stage);
  write_selection(group, stage, rule, indices, count, stages);
}

}  // namespace hivtp

#endif  // HIVTP_SELECT_H_
