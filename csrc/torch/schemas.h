// The operators' schemas. `slots`, `sequence` and `outputs`: see torch/slots.h. Compiled code and
// stored graphs know a schema by the operator's name: a schema that changes gets a new name.
#pragma once

namespace fastrnn {

// One layer, or one step of one direction (then x is [B, I], h0 and c0 are [B, *]).
// weight_format, the number of a WeightFormat, lets the CPU hold w_hh of float32 in that format
// where it is faster; CUDA raises an error unless it is 0, the native format.
constexpr const char* kForwardSchema =
    "recurrent_forward(Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, int slots, "
    "Tensor[]? sequence, str cell, int outputs, int weight_format=0) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved)";
// The same without `saved`, for graphs that are captured, by TorchScript, torch.export and
// torch.compile, and run later: its autograd (fastrnn/ops/autograd.py) decides whether to save.
constexpr const char* kLayerSchema =
    "recurrent_layer(Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, int slots, "
    "Tensor[]? sequence, str cell) -> (Tensor y, Tensor h_n, Tensor c_n)";
// recurrent_layer under the name and schema that graphs stored before 0.2 hold.
constexpr const char* kStoredLayerSchema =
    "layer(Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, str cell) "
    "-> (Tensor y, Tensor h_n, Tensor c_n)";
// CPU only: inference of stacked layers of one direction. h0, c0 (empty for a cell without), h_n
// and c_n hold one tensor [1, B, *] per layer; weights holds those of layer 0, then of layer 1, ...
constexpr const char* kStackSchema =
    "recurrent_stack(Tensor x, Tensor[] h0, Tensor[] c0, Tensor[] weights, int slots, "
    "Tensor[]? sequence, str cell) -> (Tensor y, Tensor[] h_n, Tensor[] c_n)";
// The time loop of backward, without the products after it: on CUDA, and on the CPU for cells with
// w_unit. d_pre [D, N, (Q+E)*H] holds the gradients at the pre-activations and, of each row, those
// of w_unit.
constexpr const char* kBackwardSchema =
    "recurrent_backward(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, Tensor h0, Tensor? c0, "
    "Tensor[] weights, int slots, Tensor[]? sequence, Tensor y, Tensor saved, str cell) "
    "-> (Tensor d_pre, Tensor d_h_all, Tensor d_h0, Tensor d_c0)";
// One layer with what every step leaves: c_steps [D, N, C*H], the cell states after it, and saved
// of recurrent_forward, from which Python takes the gates. Its autograd (fastrnn/ops/states.py)
// passes gradients through y, h_n, c_n and c_steps.
constexpr const char* kStatesSchema =
    "recurrent_states(Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, int slots, "
    "Tensor[]? sequence, str cell) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor c_steps, Tensor saved)";
// recurrent_backward with the gradient of c_steps.
constexpr const char* kStatesBackwardSchema =
    "recurrent_states_backward(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, Tensor d_c_steps, "
    "Tensor h0, Tensor? c0, Tensor[] weights, int slots, Tensor[]? sequence, Tensor y, "
    "Tensor saved, str cell) -> (Tensor d_pre, Tensor d_h_all, Tensor d_h0, Tensor d_c0)";
// CPU only: the time loop of backward and the products after it in one call. w_hr has no result of
// its own, and cells with w_unit are refused. (Layers of two directions have an operator of their
// own, so that one direction does not pay for the results of the second.)
constexpr const char* kGradientsSchema =
    "recurrent_gradients(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, Tensor x, Tensor h0, "
    "Tensor? c0, Tensor[] weights, int slots, Tensor[]? sequence, Tensor y, Tensor saved, "
    "str cell, int outputs) -> (Tensor d_x, Tensor d_h0, Tensor d_c0, Tensor d_h_all, "
    "Tensor d_w_ih, Tensor d_w_hh, Tensor d_b_ih, Tensor d_b_hh)";
constexpr const char* kBidirectionalGradientsSchema =
    "recurrent_bidirectional_gradients(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, Tensor x, "
    "Tensor h0, Tensor? c0, Tensor[] weights, int slots, Tensor[]? sequence, Tensor y, "
    "Tensor saved, str cell, int outputs) "
    "-> (Tensor d_x, Tensor d_h0, Tensor d_c0, Tensor d_h_all, "
    "Tensor d_w_ih, Tensor d_w_hh, Tensor d_b_ih, Tensor d_b_hh, "
    "Tensor d_w_ih_reverse, Tensor d_w_hh_reverse, Tensor d_b_ih_reverse, Tensor d_b_hh_reverse)";
// CPU only: training that computes the saved values again (cpu/recompute.h), in chunks of at least
// `chunk` steps. states [D, chunks, B*R + B*C*H] holds the states before each chunk; it is empty
// for a cell that saves no values.
constexpr const char* kChunkedForwardSchema =
    "recurrent_chunked_forward(Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, int slots, "
    "Tensor[]? sequence, str cell, int chunk) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor states)";
// The results of recurrent_bidirectional_gradients, for either number of directions. Cells with
// w_unit and layers with w_hr are refused; d_h_all is empty.
constexpr const char* kChunkedGradientsSchema =
    "recurrent_chunked_gradients(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, Tensor x, Tensor h0, "
    "Tensor? c0, Tensor[] weights, int slots, Tensor[]? sequence, Tensor y, Tensor states, "
    "str cell, int outputs, int chunk) -> (Tensor d_x, Tensor d_h0, Tensor d_c0, Tensor d_h_all, "
    "Tensor d_w_ih, Tensor d_w_hh, Tensor d_b_ih, Tensor d_b_hh, "
    "Tensor d_w_ih_reverse, Tensor d_w_hh_reverse, Tensor d_b_ih_reverse, Tensor d_b_hh_reverse)";
// CPU only: inference of one layer with int8 weights, without gradients. x, h0 and c0 are float32.
// weights holds 7 tensors per direction (problem/int8_layer.h): panels [ceil(H/16), ceil(K/4), G,
// 16, 4] of w_ih and of w_hh, then scales_ih, scales_hh (float32) and sums_ih, sums_hh (int32)
// [ceil(H/16), G, 16], and the bias [ceil(H/16), Q, 16].
constexpr const char* kInt8Schema =
    "recurrent_int8(Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, "
    "str cell) -> (Tensor y, Tensor h_n, Tensor c_n)";

// CUDA only: one layer over a padded batch some of whose states are replaced before a step. resets
// bool [D, T, B]; reset_h [1 or T, D, B, R] and reset_c [1 or T, D, B, C*H], the new states of all
// steps or of each, are zeros if they are not given.
constexpr const char* kResetForwardSchema =
    "recurrent_reset_forward(Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, int slots, "
    "Tensor resets, Tensor? reset_h, Tensor? reset_c, str cell, int outputs) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved)";
// recurrent_backward for it, with the gradient at the cell states after every step as in
// recurrent_states_backward. d_reset_h and d_reset_c have the shapes of the states and the type in
// which the kernels add; they are empty without the states.
constexpr const char* kResetBackwardSchema =
    "recurrent_reset_backward(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, Tensor? d_c_steps, "
    "Tensor h0, Tensor? c0, Tensor[] weights, int slots, Tensor resets, Tensor? reset_h, "
    "Tensor? reset_c, Tensor y, Tensor saved, str cell) -> (Tensor d_pre, Tensor d_h_all, "
    "Tensor d_h0, Tensor d_c0, Tensor d_reset_h, Tensor d_reset_c)";

// Cuts a padded batch into segments (problem/segments.h). lengths int64 [B], resets bool [T, B], on
// the CPU.
constexpr const char* kSegmentsSchema =
    "cut_segments(Tensor lengths, Tensor? resets, int steps, bool backwards) "
    "-> (Tensor batch_sizes, Tensor rows, Tensor initial, Tensor final)";

// One layer over a padded batch x [T, B, I] whose rows have lengths and resets: the segments as one
// packed batch. lengths int64 [B], resets bool or float64 (0 and 1) [T, B], both on the CPU;
// without them all rows have T steps and no reset. reset_h and reset_c, the states after a reset,
// have the shape of h0 and c0, or [T, D, B, *]; zeros if they are not given. y is zero beyond a
// row's length. No size depends on the values: saved [D, T*B, S*H] holds those of the padded batch
// if all rows have all steps and either there are no resets or the time loop replaces states;
// otherwise in its first rows those of the packed batch. On CUDA Python implements these operators
// by recurrent_reset_forward (fastrnn/ops/ragged_on_device.py): the marks may be on the device, and
// saved is that of the padded batch.
constexpr const char* kRaggedForwardSchema =
    "ragged_forward(Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, int slots, Tensor? lengths, "
    "Tensor? resets, Tensor? reset_h, Tensor? reset_c, str cell, int outputs) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved)";
// The same without `saved`, for graphs, as recurrent_layer.
constexpr const char* kRaggedLayerSchema =
    "ragged_layer(Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, int slots, Tensor? lengths, "
    "Tensor? resets, Tensor? reset_h, Tensor? reset_c, str cell) "
    "-> (Tensor y, Tensor h_n, Tensor c_n)";
// Its gradients, as recurrent_bidirectional_gradients: d_h_all [D, T*B, P] holds in its first rows
// those of the packed batch and is zero beyond.
constexpr const char* kRaggedGradientsSchema =
    "ragged_gradients(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, Tensor x, Tensor h0, Tensor? c0, "
    "Tensor[] weights, int slots, Tensor? lengths, Tensor? resets, Tensor? reset_h, "
    "Tensor? reset_c, Tensor y, Tensor saved, str cell, int outputs) "
    "-> (Tensor d_x, Tensor d_h0, Tensor d_c0, Tensor d_h_all, "
    "Tensor d_w_ih, Tensor d_w_hh, Tensor d_b_ih, Tensor d_b_hh, "
    "Tensor d_w_ih_reverse, Tensor d_w_hh_reverse, Tensor d_b_ih_reverse, Tensor d_b_hh_reverse, "
    "Tensor d_reset_h, Tensor d_reset_c)";

// CPU only: the time loop of one direction with layer normalisation, zoneout and recurrent dropout
// (problem/recurrence.h), in float32 or float64. pre_x [T, B, G*H] or packed [N, G*H] is the
// product of the input, h0 and c0 [B, H]. parts holds the tensors of `slots` (RecurrencePart in
// slots.h). saved [N, *] is a placeholder unless `saves`.
constexpr const char* kRecurrenceSchema =
    "recurrence(Tensor pre_x, Tensor h0, Tensor? c0, Tensor[] parts, int slots, "
    "Tensor? batch_sizes, bool reverse, str cell, float epsilon, bool saves) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved)";
// Its gradients. d_a [N, G*H] holds those at the product with w_hh, which is d_pre_x if d_a is a
// placeholder; d_vectors [2*G*H + 2*H] those of b_hh, gain_h, gain_c and bias_c.
constexpr const char* kRecurrenceGradientsSchema =
    "recurrence_gradients(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, Tensor h0, Tensor? c0, "
    "Tensor[] parts, int slots, Tensor? batch_sizes, bool reverse, str cell, float epsilon, "
    "Tensor y, Tensor saved) "
    "-> (Tensor d_pre_x, Tensor d_a, Tensor d_h0, Tensor d_c0, Tensor d_vectors)";

// The products of its input side by the kernels of backward, which are faster than those of MKL on
// CPUs of AMD: x w^T, and the gradients d w, d^T x and the column sums of d. Placeholders stand for
// those whose factor is absent.
constexpr const char* kRecurrenceProductSchema = "recurrence_product(Tensor x, Tensor w) -> Tensor";
constexpr const char* kRecurrenceProductGradientsSchema =
    "recurrence_product_gradients(Tensor d, Tensor? x, Tensor? w) "
    "-> (Tensor d_x, Tensor d_w, Tensor sums)";

// h_t = a_t * h_{t-1} + b_t elementwise (cells/linear_scan.h). a, b and h [T, ...], h0 [...], zeros
// if it is not given; `reverse`: from the last step to the first.
constexpr const char* kScanSchema =
    "linear_scan(Tensor a, Tensor b, Tensor? h0, bool reverse) -> Tensor";
// Its gradients; d_a is a placeholder unless it is needed.
constexpr const char* kScanGradientsSchema =
    "linear_scan_gradients(Tensor d_h, Tensor a, Tensor h, Tensor? h0, bool reverse, bool needs_a) "
    "-> (Tensor d_a, Tensor d_b, Tensor d_h0)";

// One direction of a layer whose cell is linear in the state (cells/scan_registry.h), after its
// product. pre [T, B, G*H], bias [G*H], x [T, B, H] of a cell whose output mixes it in, h0 [B, H].
// lengths int64 [B], resets bool [T, B] and reset_h [1 or T, B, H]: see problem/scan.h. states
// [T, B, H] is a placeholder unless the cell has an output and `saves`; else y holds the states.
constexpr const char* kScanLayerSchema =
    "scan_layer(Tensor pre, Tensor? bias, Tensor? x, Tensor? h0, Tensor? lengths, Tensor? resets, "
    "Tensor? reset_h, str cell, bool positive, bool reverse, bool saves) "
    "-> (Tensor y, Tensor h_n, Tensor states)";
// Its gradients, without that of bias, the sum of d_pre. d_x and d_reset_h are placeholders where
// there is no x or reset_h; d_reset_h has the type in which the kernels add.
constexpr const char* kScanLayerGradientsSchema =
    "scan_layer_gradients(Tensor d_y, Tensor? d_h_n, Tensor pre, Tensor? bias, Tensor? x, "
    "Tensor states, Tensor? h0, Tensor? lengths, Tensor? resets, Tensor? reset_h, str cell, "
    "bool positive, bool reverse) "
    "-> (Tensor d_pre, Tensor d_x, Tensor d_h0, Tensor d_reset_h)";

}  // namespace fastrnn
