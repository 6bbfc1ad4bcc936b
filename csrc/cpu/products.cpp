// The matrix products around a chunk of logits: the vocabulary is cut into tiles, one thread a tile.
//
// A threaded BLAS packs the whole weight anew for a chunk of a few hundred rows, and its threads meet in the middle of
// that. A tile's slice of the weight stays in L2 instead, and no thread waits for another.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kTile = 1024;

int64_t tile_count(int64_t vocabulary) { return (vocabulary + kTile - 1) / kTile; }

template <typename F>
void for_tiles(int64_t vocabulary, const F& each) {
  at::parallel_for(0, tile_count(vocabulary), 1, [&](int64_t first, int64_t last) {
    const at::AutoDispatchBelowADInplaceOrView below;  // a worker does not know of its caller's inference mode
    for (int64_t tile = first; tile < last; ++tile)
      each(tile * kTile, std::min(kTile, vocabulary - tile * kTile));
  });
}

// logits (n, V) = scale hidden (n, D) weight (V, D)^T + bias (V)
void logits_product_(const Tensor& hidden, const Tensor& weight, const optional<Tensor>& bias, double scale,
                     Tensor logits) {
  for_tiles(weight.size(0), [&](int64_t v, int64_t count) {
    Tensor out = logits.narrow(1, v, count);
    const Tensor addend = bias ? bias->narrow(0, v, count) : out;
    at::addmm_out(out, addend, hidden, weight.narrow(0, v, count).t(), bias ? 1 : 0, scale);
  });
}

// weight_gradient (V, D) float32 = keep weight_gradient + scale gradient (n, V)^T hidden (n, D)
void add_weight_gradient_(const Tensor& gradient, const Tensor& hidden, double scale, double keep,
                          Tensor weight_gradient) {
  const Tensor wide_hidden = hidden.to(at::kFloat);
  for_tiles(gradient.size(1), [&](int64_t v, int64_t count) {
    const Tensor of_tile = gradient.narrow(1, v, count).to(at::kFloat);
    weight_gradient.narrow(0, v, count).addmm_(of_tile.t(), wide_hidden, keep, scale);
  });
}

// hidden_gradient (n, D) float32 = scale gradient (n, V) weight (V, D), summed over each thread's tiles
Tensor hidden_gradient(const Tensor& gradient, const Tensor& weight, double scale) {
  const int64_t tiles = tile_count(weight.size(0)), parts = std::min<int64_t>(at::get_num_threads(), tiles);
  Tensor sums = at::zeros({parts, gradient.size(0), weight.size(1)}, gradient.options().dtype(at::kFloat));
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    const at::AutoDispatchBelowADInplaceOrView below;
    for (int64_t part = first; part < last; ++part) {
      Tensor sum = sums[part];
      for (int64_t tile = part * tiles / parts; tile < (part + 1) * tiles / parts; ++tile) {
        const int64_t v = tile * kTile, count = std::min(kTile, weight.size(0) - v);
        if (gradient.scalar_type() == at::kFloat)
          sum.addmm_(gradient.narrow(1, v, count), weight.narrow(0, v, count), 1, scale);
        else
          sum.add_(at::mm(gradient.narrow(1, v, count).to(at::kFloat), weight.narrow(0, v, count).to(at::kFloat)),
                   scale);
      }
    }
  });
  return sums.sum(0);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fdistill_native, library) {
  library.def("logits_product_(Tensor hidden, Tensor weight, Tensor? bias, float scale, Tensor(a!) logits) -> ()");
  library.def(
      "add_weight_gradient_(Tensor gradient, Tensor hidden, float scale, float keep, Tensor(a!) weight_gradient) "
      "-> ()");
  library.def("hidden_gradient(Tensor gradient, Tensor weight, float scale) -> Tensor");
  library.impl("logits_product_", c10::DispatchKey::CPU, TORCH_FN(logits_product_));
  library.impl("add_weight_gradient_", c10::DispatchKey::CPU, TORCH_FN(add_weight_gradient_));
  library.impl("hidden_gradient", c10::DispatchKey::CPU, TORCH_FN(hidden_gradient));
}
