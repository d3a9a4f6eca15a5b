// Numbers of the operators' optional arguments and of their results. No torch in here: fastrnn._C
// exports the names, and fastrnn/spec.py has the same table.
//
// `int slots` of an operator: bit i says that every direction has weight slot i, or that the batch
// has sequence slot i. The list `weights` holds, for each direction, the tensors that are there in
// the order of their slots; the list `sequence` holds those that describe the sequences of the
// batch (null if there are none: passing an empty list takes longer). Stored graphs contain the
// bits: the number of a slot never changes.
//
// `int outputs` of an operator: bit i asks for its result i. A result that is not asked for, or
// that the layer does not have, is an empty placeholder where leaving it out saves work. (An
// operator returns a fixed number of tensors because compiled C++ code cannot receive a list.)
#pragma once

#include <cstdint>

namespace fastrnn {

enum WeightSlot : int {
  kWIh,
  kWHh,
  kBIh,
  kBHh,
  kWHr,
  kWUnit,
  // of layer normalisation; the operators of plain layers have none of these
  kGainIh,
  kGainHh,
  kGainC,
  kBiasC,
  kWeightSlots
};
inline constexpr const char* kWeightSlotNames[kWeightSlots] = {
    "w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "w_unit", "gain_ih", "gain_hh", "gain_c", "bias_c"};

// `int slots` of the operator recurrence: which parts of problem/recurrence.h are in its list.
enum RecurrencePart : int {
  kPartWHh,
  kPartBHh,
  kPartGainH,
  kPartGainC,
  kPartBiasC,
  kPartMaskH,
  kPartZoneH,
  kPartZoneC,
  kPartBX,
  kPartClipC,
  kRecurrenceParts
};
inline constexpr const char* kRecurrencePartNames[kRecurrenceParts] = {
    "w_hh", "b_hh", "gain_h", "gain_c", "bias_c", "mask_h", "zone_h", "zone_c", "b_x", "clip_c"};

enum SequenceSlot : int { kBatchSizes = 16, kSequenceSlotsEnd };
inline constexpr int kFirstSequenceSlot = kBatchSizes;
inline constexpr const char* kSequenceSlotNames[kSequenceSlotsEnd - kFirstSequenceSlot] = {
    "batch_sizes"};

// Results of recurrent_forward.
enum ForwardOutput : int { kY, kHN, kCN, kSaved, kForwardOutputs };
inline constexpr const char* kForwardOutputNames[kForwardOutputs] = {"y", "h_n", "c_n", "saved"};

// Results of recurrent_gradients. recurrent_bidirectional_gradients continues with the weights of
// the second direction. d_h_all, the gradients at the projected outputs, stands for that of w_hr.
enum GradientOutput : int { kDX, kDH0, kDC0, kDHAll, kDWIh, kDWHh, kDBIh, kDBHh, kGradientOutputs };
inline constexpr const char* kGradientOutputNames[kGradientOutputs] = {
    "d_x", "d_h0", "d_c0", "d_h_all", "d_w_ih", "d_w_hh", "d_b_ih", "d_b_hh"};
inline constexpr int kGradientsPerDirection = kGradientOutputs - kDWIh;

// Results of ragged_gradients: as recurrent_bidirectional_gradients, then those of the states after
// a reset.
enum RaggedGradientOutput : int {
  kDResetH = kGradientOutputs + kGradientsPerDirection,
  kDResetC,
  kRaggedGradientOutputs
};

constexpr bool has_slot(std::int64_t mask, int slot) { return mask >> slot & 1; }
// Slots from `first` on and below `end` that are present.
constexpr int count_between(std::int64_t mask, int first, int end) {
  return __builtin_popcountll((std::uint64_t(mask) & ((std::uint64_t(1) << end) - 1)) >> first);
}
// The number of tensors before slot `end` in a direction, or in `sequence`.
constexpr int count_slots(std::int64_t mask, int end = kWeightSlots) {
  return count_between(mask, 0, end);
}
constexpr int count_sequence_slots(std::int64_t mask, int end = kSequenceSlotsEnd) {
  return count_between(mask, kFirstSequenceSlot, end);
}

}  // namespace fastrnn
