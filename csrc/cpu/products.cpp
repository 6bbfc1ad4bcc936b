// The matrix products around a chunk of logits: the vocabulary is cut into tiles, one thread a tile.
//
// A threaded BLAS packs the whole weight anew for a chunk of a few hundred rows, and its threads meet in the middle of
// that. A tile's slice of the weight stays in L2 instead, and no thread waits for another. Each tile's product is
// torch's own, by the C functions that torch keeps for compiled programs (AOTInductor's), whose addresses Python gives.
#include <algorithm>
#include <memory>
#include <new>

#include "parallel.h"

namespace {

using Handle = void*;

struct Torch {
  int32_t (*create_tensor_from_blob)(void* data, int64_t dimensions, const int64_t* sizes, const int64_t* strides,
                                     int64_t offset, int32_t dtype, int32_t device_type, int32_t device, Handle*);
  int32_t (*delete_tensor_object)(Handle);
  int32_t (*copy_)(Handle to, Handle from, int32_t non_blocking);
  int32_t (*addmm_out)(Handle out, Handle addend, Handle left, Handle right, double beta, double alpha);
  int32_t float32;
};

// A (rows, columns) view of memory, 16-bit or float as `dtype` says; a vector has row stride 0.
struct Matrix {
  char* data;
  int64_t rows, columns, row_stride, column_stride;
  int32_t dtype, itemsize;

  Matrix of_rows(int64_t begin, int64_t count) const {
    return {data + begin * row_stride * itemsize, count, columns, row_stride, column_stride, dtype, itemsize};
  }
  Matrix of_columns(int64_t begin, int64_t count) const {
    return {data + begin * column_stride * itemsize, rows, count, row_stride, column_stride, dtype, itemsize};
  }
  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride, dtype, itemsize}; }
};

class Tensor {
 public:
  Tensor(const Torch& torch, const Matrix& m) : torch_(torch) {
    const int64_t sizes[] = {m.rows, m.columns}, strides[] = {m.row_stride, m.column_stride};
    if (torch.create_tensor_from_blob(m.data, 2, sizes, strides, 0, m.dtype, 0, 0, &handle_)) handle_ = nullptr;
  }
  ~Tensor() { if (handle_) torch_.delete_tensor_object(handle_); }
  Tensor(const Tensor&) = delete;
  operator Handle() const { return handle_; }

 private:
  const Torch& torch_;
  Handle handle_ = nullptr;
};

// out = beta addend + alpha left right; no addend: out itself
bool multiply(const Torch& torch, const Matrix& out, const Matrix* addend, const Matrix& left, const Matrix& right,
              double beta, double alpha) {
  const Tensor o(torch, out), a(torch, addend ? *addend : out), l(torch, left), r(torch, right);
  return o && a && l && r && !torch.addmm_out(o, addend ? a : o, l, r, beta, alpha);
}

// The matrix in float: itself, or copied into `room`.
bool widen(const Torch& torch, Matrix& matrix, std::unique_ptr<float[]>& room, int64_t most) {
  if (matrix.dtype == torch.float32) return true;
  if (!room) room.reset(new (std::nothrow) float[most]);
  if (!room) return false;
  const Matrix wide{reinterpret_cast<char*>(room.get()), matrix.rows, matrix.columns, matrix.columns, 1, torch.float32, 4};
  const Tensor to(torch, wide), from(torch, matrix);
  matrix = wide;
  return to && from && !torch.copy_(to, from, 0);
}

constexpr int64_t kTile = 1024;

int64_t tile_count(int64_t vocabulary) { return (vocabulary + kTile - 1) / kTile; }

struct Rooms {
  std::unique_ptr<float[]> one, two;
};

// each(rooms, part, v, count) for the tiles of each of `parts` ranges of tiles, a range on one thread; whether all went well.
template <typename Each>
bool for_tiles(int64_t vocabulary, int64_t parts, int threads, const Each& each) {
  std::atomic<bool> well{true};
  const int64_t tiles = tile_count(vocabulary);
  fdistill::for_pieces(parts, threads, [] { return Rooms(); }, [&](Rooms& rooms, int64_t part) {
    for (int64_t tile = part * tiles / parts; tile < (part + 1) * tiles / parts && well; ++tile)
      if (!each(rooms, part, tile * kTile, std::min(kTile, vocabulary - tile * kTile))) well = false;
  });
  return well;
}

}  // namespace

extern "C" {

// logits (n, V) = scale hidden (n, D) weight (V, D)^T + bias (V); no bias: null data. Whether it went well.
__attribute__((visibility("default"))) int fdistill_cpu_logits_product(
    const Torch* torch, const Matrix* hidden, const Matrix* weight, const Matrix* bias, double scale,
    const Matrix* logits, int threads) {
  return for_tiles(weight->rows, tile_count(weight->rows), threads, [&](Rooms&, int64_t, int64_t v, int64_t count) {
    Matrix addend = bias->of_columns(v, count);
    addend.rows = hidden->rows;  // one row, again and again
    return multiply(*torch, logits->of_columns(v, count), bias->data ? &addend : nullptr, *hidden,
                    weight->of_rows(v, count).transposed(), bias->data ? 1 : 0, scale);
  });
}

// weight_gradient (V, D) float = keep weight_gradient + scale gradient (n, V)^T hidden (n, D), hidden in float
__attribute__((visibility("default"))) int fdistill_cpu_add_weight_gradient(
    const Torch* torch, const Matrix* gradient, const Matrix* hidden, double scale, double keep,
    const Matrix* weight_gradient, int threads) {
  const int64_t vocabulary = gradient->columns, most = gradient->rows * kTile;
  return for_tiles(vocabulary, tile_count(vocabulary), threads, [&](Rooms& rooms, int64_t, int64_t v, int64_t count) {
    Matrix tile = gradient->of_columns(v, count);
    return widen(*torch, tile, rooms.one, most) &&
        multiply(*torch, weight_gradient->of_rows(v, count), nullptr, tile.transposed(), *hidden, keep, scale);
  });
}

// sums (parts n, D) float += scale gradient (n, V) weight (V, D), each part over its own range of tiles
__attribute__((visibility("default"))) int fdistill_cpu_hidden_gradient(
    const Torch* torch, const Matrix* gradient, const Matrix* weight, double scale, const Matrix* sums, int64_t parts,
    int threads) {
  const int64_t rows = gradient->rows, width = weight->columns;
  return for_tiles(weight->rows, parts, threads, [&](Rooms& rooms, int64_t part, int64_t v, int64_t count) {
    Matrix left = gradient->of_columns(v, count), right = weight->of_rows(v, count);
    return widen(*torch, left, rooms.one, rows * kTile) && widen(*torch, right, rooms.two, kTile * width) &&
        multiply(*torch, sums->of_rows(part * rows, rows), nullptr, left, right, 1, scale);
  });
}

}  // extern "C"
