#include "cpu/recompute.h"

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "cpu/plan.h"
#include "cpu/runtime/buffer_cache.h"

namespace fastrnn::cpu {
namespace {

std::int64_t h_size(const LayerShape& shape) {  // of the states h of a batch
  return shape.sequence.batch * shape.output_size();
}
std::int64_t c_size(const LayerShape& shape) {
  return shape.sequence.batch * cell_info(shape.cell).cell_states() * shape.hidden_size;
}

// The steps at which chunks begin in order of computation, and the number of all steps.
std::vector<std::int64_t> chunk_steps(const LayerShape& shape, std::int64_t length) {
  const Sequence& sequence = shape.sequence;
  const std::int64_t rows_ahead = pick_chunk_rows(shape);
  std::vector<std::int64_t> starts = {0};
  for (std::int64_t k = 0; k < sequence.steps; starts.push_back(k)) {
    const std::int64_t first = k;
    while (k < sequence.steps && k - first < length) k = sequence.chunk_end(k, rows_ahead);
  }
  return starts;
}

// The steps begin ... end - 1 of a layer in order of computation, as a layer of their own, whose
// rows begin at 0.
class Chunk {
 public:
  Chunk(const LayerShape& whole, std::int64_t begin, std::int64_t end)
      : shape(whole),
        rows(whole.sequence.rows_between(begin, end)),
        first_step(whole.sequence.step(begin)) {
    const Sequence& all = whole.sequence;
    const std::int64_t low = all.reverse ? all.step(end - 1) : begin;
    for (std::int64_t t = low; t < low + end - begin; ++t)
      offsets_.push_back(all.offset(t) - rows.first);
    shape.sequence = {end - begin, all.rows(low), all.reverse, offsets_.data(),
                      all.step_rows + low};
  }
  Chunk(const Chunk&) = delete;
  Chunk& operator=(const Chunk&) = delete;

  LayerShape shape;
  const RowRange rows;            // of the whole
  const std::int64_t first_step;  // of the whole, in order of computation

 private:
  std::vector<std::int64_t> offsets_;
};

std::int64_t most_rows(const LayerShape& shape, const std::vector<std::int64_t>& starts) {
  std::int64_t most = 0;
  for (std::size_t i = 0; i + 1 < starts.size(); ++i)
    most = std::max(most, shape.sequence.rows_between(starts[i], starts[i + 1]).count);
  return most;
}

template <class T>
void run_forward(const LayerForward<T, T>* directions, int count, const WholeLayer& whole,
                 int threads, ParallelFor parallel_for) {
  forward(directions, count, threads, parallel_for, &whole);
}
void run_forward(const Bfloat16Forward* directions, int count, const WholeLayer& whole, int threads,
                 ParallelFor parallel_for) {
  bfloat16_forward(directions, count, threads, parallel_for, &whole);
}

// Calls of a loop may each be too short to ask whether to stop.
void count_work(Interruption& interruption, const LayerShape& shape, Pass pass) {
  interruption.count_work(call_work(shape, pass));
  if (interruption.requested()) throw std::runtime_error(kInterrupted);
}

// Memory of a call for values of one type.
template <class Value>
class Buffer {
 public:
  explicit Buffer(std::int64_t size)
      : workspace_(std::max<std::int64_t>(size, 1) * sizeof(Value)) {}
  Value* data() const { return static_cast<Value*>(workspace_.data()); }

 private:
  Workspace workspace_;
};

// Backward of a direction; see backward_in_chunks.
template <class Storage, class T>
class BackwardInChunks {
  static constexpr bool kRounds = !std::is_same_v<Storage, T>;

 public:
  BackwardInChunks(const ChunkedBackward<Storage, T>& problem, std::int64_t length, int threads,
                   ParallelFor parallel_for)
      : problem_(problem),
        whole_{problem.backward.shape, problem.directions},
        shape_(whole_.shape),
        sequence_(shape_.sequence),
        cell_(cell_info(shape_.cell)),
        starts_(chunk_steps(shape_, length)),
        threads_(threads),
        parallel_for_(parallel_for),
        depth_(make_plan(shape_, Pass::kGradients, sizeof(T), threads).gradient_depth),
        width_(cell_.gradient_columns() * shape_.hidden_size),
        most_rows_(most_rows(shape_, starts_)),
        saved_(most_rows_ * cell_.saved * shape_.hidden_size),
        d_pre_((depth_ + most_rows_) * width_),
        y_(most_rows_ * shape_.output_size()),
        h_n_(h_size(shape_)),
        c_n_(c_size(shape_)),
        unrounded_c_(kRounds ? c_size(shape_) : 0),
        h_before_(h_size(shape_)) {}

  void run() {
    const LayerBackward<T, T>& p = problem_.backward;
    start(p.d_h_n, p.d_h0, h_size(shape_));
    if (p.d_c0 != nullptr) start(p.d_c_n, p.d_c0, c_size(shape_));
    kept_ = {sequence_.reverse ? 0 : sequence_.total_rows(), 0};
    for (std::int64_t k = std::int64_t(starts_.size()) - 2; k >= 0; --k) {
      const Chunk chunk(shape_, starts_[k], starts_[k + 1]);
      count_work(interruption_, chunk.shape, Pass::kBackward);
      const T* states = nullptr;
      if (cell_.saved > 0) {
        states = problem_.states + k * chunk_state_size(shape_);
        compute_saved(chunk, states);
      }
      compute_d_pre(chunk, states);
      compute_gradients(chunk, k == 0);
    }
  }

 private:
  // The gradients of the initial states hold those of the final states, then those of the states
  // between two chunks.
  static void start(const T* from, T* to, std::int64_t size) {
    if (from == nullptr) {
      std::fill_n(to, size, T(0));
    } else {
      std::copy_n(from, size, to);
    }
  }

  void compute_saved(const Chunk& chunk, const T* states) {
    LayerForward<Storage, T> forward = problem_.forward;
    forward.shape = chunk.shape;
    forward.x += chunk.rows.first * forward.x_stride;
    forward.h0 = reinterpret_cast<const Storage*>(states);
    const T* c = states + h_size(shape_);
    if constexpr (kRounds) {
      std::copy_n(c, c_size(shape_), unrounded_c_.data());
      forward.c0 = nullptr;
      forward.unrounded_c = unrounded_c_.data();
    } else {
      forward.c0 = c;
    }
    forward.y = y_.data();
    forward.y_stride = shape_.output_size();
    forward.h_n = h_n_.data();
    forward.c_n = c_n_.data();
    forward.saved = saved_.data();
    run_forward(&forward, 1, whole_, threads_, parallel_for_);
  }

  // d_pre of the chunk's rows, in time beside the kept rows of later chunks.
  void compute_d_pre(const Chunk& chunk, const T* states) {
    T* d_pre = d_pre_.data();
    if (sequence_.reverse) {
      d_pre += kept_.count * width_;
    } else {
      std::copy_backward(d_pre, d_pre + kept_.count * width_,
                         d_pre + (chunk.rows.count + kept_.count) * width_);
    }
    LayerBackward<T, T> backward = problem_.backward;
    // h is read as forward has returned it, in a half type rounded
    const StepRows at = sequence_.at(chunk.first_step);
    const std::int64_t units = shape_.output_size();
    for (std::int64_t b = 0; b < chunk.shape.sequence.batch; ++b)
      std::copy_n(b < at.rows
                      ? at.state_before(b, backward.y, backward.y_stride, backward.h0, units)
                      : backward.h0 + b * units,
                  units, h_before_.data() + b * units);
    backward.shape = chunk.shape;
    backward.h0 = h_before_.data();
    if (states != nullptr) backward.c0 = states + h_size(shape_);
    backward.y += chunk.rows.first * backward.y_stride;
    backward.saved = saved_.data();
    if (backward.d_y != nullptr) backward.d_y += chunk.rows.first * backward.d_y_stride;
    if (backward.d_c_steps != nullptr)
      backward.d_c_steps +=
          chunk.rows.first * cell_info(shape_.cell).cell_states() * shape_.hidden_size;
    backward.d_h_n = backward.d_h0;
    backward.d_c_n = backward.d_c0;
    backward.d_pre = d_pre;
    fastrnn::cpu::backward(&backward, 1, threads_, parallel_for_, &whole_);
  }

  // The products over whole blocks of rows (kernels/schedule/gradients.h). The rows of a block that
  // is not complete are kept for the next chunk; after the last chunk, none are.
  void compute_gradients(const Chunk& chunk, bool last) {
    const std::int64_t chunk_end = chunk.rows.first + chunk.rows.count;
    LayerGradients<T> gradients = problem_.gradients;
    gradients.d_pre = d_pre_.data();
    std::int64_t begin, end, split;
    if (sequence_.reverse) {
      begin = kept_.first;
      end = chunk_end;
      split = last ? end : std::max(begin, end / depth_ * depth_);
      gradients.rows = {begin, split - begin};
      kept_ = {split, end - split};
    } else {
      begin = chunk.rows.first;
      end = begin + chunk.rows.count + kept_.count;
      split = last ? begin : std::min(end, divide_up(begin, depth_) * depth_);
      gradients.rows = {split, end - split};
      gradients.d_pre += (split - begin) * width_;
      kept_ = {begin, split - begin};
    }
    if (gradients.rows.count > 0 || (last && !added_)) {
      gradients.add_to_weights = added_;
      fastrnn::cpu::gradients(&gradients, 1, threads_, parallel_for_);
      added_ = true;
    }
    if (sequence_.reverse)
      std::copy_n(d_pre_.data() + (split - begin) * width_, kept_.count * width_, d_pre_.data());
  }

  const ChunkedBackward<Storage, T>& problem_;
  const WholeLayer whole_;
  const LayerShape& shape_;
  const Sequence& sequence_;
  const CellInfo& cell_;
  const std::vector<std::int64_t> starts_;
  const int threads_;
  const ParallelFor parallel_for_;
  const std::int64_t depth_;  // rows of a block
  const std::int64_t width_;  // of a row of d_pre
  const std::int64_t most_rows_;
  const Buffer<T> saved_, d_pre_;
  const Buffer<Storage> y_, h_n_, c_n_;  // results of forward that nothing reads
  const Buffer<T> unrounded_c_, h_before_;
  RowRange kept_{};     // rows of d_pre that no product has read, of the whole
  bool added_ = false;  // whether the gradients of the weights hold a sum
  Interruption interruption_;
};

// See forward_in_chunks.
template <class Storage, class T>
void run_chunks(const LayerForward<Storage, T>* directions, int count, std::int64_t length,
                T* const* states, int threads, ParallelFor parallel_for) {
  const WholeLayer whole = {directions[0].shape, count};
  const std::int64_t h = h_size(whole.shape), c = c_size(whole.shape);
  LayerForward<Storage, T> problems[kMaxDirections];
  // The states between two chunks: h in h_n, c in c_n or, unrounded, here.
  constexpr bool kRounds = !std::is_same_v<Storage, T>;
  const Buffer<T> unrounded_c(kRounds ? count * c : 0);
  T* cells[kMaxDirections];
  for (int d = 0; d < count; ++d) {
    problems[d] = directions[d];
    std::copy_n(directions[d].h0, h, directions[d].h_n);
    problems[d].h0 = directions[d].h_n;
    if constexpr (kRounds) {
      cells[d] = problems[d].unrounded_c = unrounded_c.data() + d * c;
    } else {
      cells[d] = directions[d].c_n;
      problems[d].c0 = directions[d].c_n;
    }
    std::transform(directions[d].c0, directions[d].c0 + c, cells[d],
                   [](Storage value) { return T(value); });
  }
  std::vector<std::int64_t> starts[kMaxDirections];
  for (int d = 0; d < count; ++d) starts[d] = chunk_steps(directions[d].shape, length);
  Interruption interruption;
  for (std::size_t k = 0;; ++k) {
    LayerForward<Storage, T> running[kMaxDirections];  // packed sequences may have other chunks
    std::optional<Chunk> chunks[kMaxDirections];       // in each direction
    int now = 0;
    for (int d = 0; d < count; ++d) {
      if (k + 1 >= starts[d].size()) continue;
      const Chunk& chunk = chunks[d].emplace(directions[d].shape, starts[d][k], starts[d][k + 1]);
      T* kept = states[d] + k * (h + c);
      std::copy_n(directions[d].h_n, h, reinterpret_cast<Storage*>(kept));
      std::copy_n(cells[d], c, kept + h);
      LayerForward<Storage, T>& problem = running[now++] = problems[d];
      problem.shape = chunk.shape;
      problem.x += chunk.rows.first * problem.x_stride;
      problem.y += chunk.rows.first * problem.y_stride;
    }
    if (now == 0) return;
    count_work(interruption, running[0].shape, Pass::kForward);
    run_forward(running, now, whole, threads, parallel_for);
  }
}

}  // namespace

std::int64_t chunk_state_size(const LayerShape& shape) { return h_size(shape) + c_size(shape); }

std::int64_t chunk_count(const LayerShape& shape, std::int64_t length) {
  return std::int64_t(chunk_steps(shape, length).size()) - 1;
}

template <class T>
void forward_in_chunks(const LayerForward<T, T>* directions, int count, std::int64_t length,
                       T* const* states, int threads, ParallelFor parallel_for) {
  run_chunks(directions, count, length, states, threads, parallel_for);
}

void forward_in_chunks(const Bfloat16Forward* directions, int count, std::int64_t length,
                       float* const* states, int threads, ParallelFor parallel_for) {
  run_chunks(directions, count, length, states, threads, parallel_for);
}

template <class T>
void backward_in_chunks(const ChunkedBackward<T, T>& direction, std::int64_t length, int threads,
                        ParallelFor parallel_for) {
  BackwardInChunks<T, T>(direction, length, threads, parallel_for).run();
}

void backward_in_chunks(const ChunkedBackward<Bfloat16, float>& direction, std::int64_t length,
                        int threads, ParallelFor parallel_for) {
  BackwardInChunks<Bfloat16, float>(direction, length, threads, parallel_for).run();
}

template void forward_in_chunks(const LayerForward<float, float>*, int, std::int64_t, float* const*,
                                int, ParallelFor);
template void forward_in_chunks(const LayerForward<double, double>*, int, std::int64_t,
                                double* const*, int, ParallelFor);
template void backward_in_chunks(const ChunkedBackward<float, float>&, std::int64_t, int,
                                 ParallelFor);
template void backward_in_chunks(const ChunkedBackward<double, double>&, std::int64_t, int,
                                 ParallelFor);

}  // namespace fastrnn::cpu
