// Products of float32 matrices of the shapes that layers have: tiles of the result are summed in registers, from where
// the factors lie or from a copy of a few columns. Everything else goes where it would have gone.
#include <ATen/cpu/vec/functional.h>
#include <algorithm>
#include <type_traits>
#include <vector>
#include <omp.h>

namespace pyrovae {
constexpr int ROWS = W == 16 ? 5 : 4, VECTORS = W == 16 ? 5 : 3;  // of a tile: so many registers there are
constexpr int64_t DEPTH = 512;  // of a panel: so much lies near
constexpr int64_t MANY = 64;    // rows that pay for the copy of a panel
constexpr int64_t WORTH = 1 << 20;  // multiplications that pay for a second thread

struct Matrix {
  const float* at;
  int64_t row, column;  // strides
  const float* place(int64_t i, int64_t j) const { return at + i * row + j * column; }
  Matrix from(int64_t i, int64_t j) const { return {at ? place(i, j) : at, row, column}; }
};

// c = start + a b, R rows and C vectors of columns of it
template <int R, int C>
[[gnu::noinline]] void tile(int64_t depth, Matrix a, Matrix b, float* c, int64_t stride, Matrix start) {
  V sums[R][C];
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 8
    for (int j = 0; j < C; j++) sums[i][j] = start.at ? V::loadu(start.place(i, j * W)) : V(0.f);
  for (int64_t k = 0; k < depth; k++) {
    V row[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; j++) row[j] = V::loadu(b.at + k * b.row + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      V x(*a.place(i, k));
#pragma GCC unroll 8
      for (int j = 0; j < C; j++) sums[i][j] = at::vec::fmadd(x, row[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 8
    for (int j = 0; j < C; j++) sums[i][j].store(c + i * stride + j * W);
}

template <int R, int C>
inline void tiles(int64_t rows, int64_t depth, Matrix a, Matrix b, float* c, int64_t stride, Matrix start) {
  int64_t i = 0;
  for (; i + R <= rows; i += R) tile<R, C>(depth, a.from(i, 0), b, c + i * stride, stride, start.from(i, 0));
  if constexpr (R > 1)
    if (i < rows) tiles<R / 2, C>(rows - i, depth, a.from(i, 0), b, c + i * stride, stride, start.from(i, 0));
}

// [columns, depth] to [depth, columns]
[[gnu::noinline]] inline void turn(const float* from, int64_t stride, float* to, int64_t columns, int64_t depth) {
  at::vec::transpose_mxn<float>(from, stride, to, columns, columns, depth);
}

// All rows of C vectors of columns, from a copy of those columns of b where that pays, or where they lie as rows
template <int C>
[[gnu::noinline]] void panel(
    int64_t rows, int64_t depth, Matrix a, Matrix b, float* c, int64_t stride, Matrix start, float* copy) {
  if (b.column != 1) {
    turn(b.at, b.column, copy, C * W, depth);
    b = {copy, C * W, 1};
  } else if (rows >= MANY) {
    for (int64_t k = 0; k < depth; k++)
      for (int64_t j = 0; j < C * W; j += W) V::loadu(b.at + k * b.row + j).store(copy + k * C * W + j);
    b = {copy, C * W, 1};
  }
  tiles<ROWS, C>(rows, depth, a, b, c, stride, start);
}

// c = start + a b, c contiguous and at least a vector wide
[[gnu::noinline]] inline void product(
    int64_t rows, int64_t columns, int64_t depth, Matrix a, Matrix b, float* c, const float* start) {
  thread_local std::vector<float> copy;
  copy.resize(VECTORS * W * DEPTH);
  auto at = [&](auto vectors, int64_t j) {
    for (int64_t k = 0; k < depth; k += DEPTH) {
      Matrix first = k ? Matrix{c + j, columns, 1} : Matrix{start ? start + j : start, 0, 1};
      panel<vectors()>(rows, std::min(DEPTH, depth - k), a.from(0, k), b.from(k, j), c + j, columns, first, copy.data());
    }
  };
  int64_t j = 0;
  for (; j + VECTORS * W <= columns; j += VECTORS * W) at(std::integral_constant<int, VECTORS>{}, j);
  for (; j < columns; j += W) at(std::integral_constant<int, 1>{}, std::min(j, columns - W));  // twice, where they overlap
}

// A matrix or vector of float32; of another kind it has no dims
struct Shape {
  int64_t dim = -1, *sizes = nullptr, *strides = nullptr;
  float* at = nullptr;

  explicit Shape(AtenTensorHandle tensor) {
    int32_t dtype = -1;
    aoti_torch_get_dtype(tensor, &dtype);
    if (dtype != aoti_torch_dtype_float32()) return;
    aoti_torch_get_dim(tensor, &dim);
    aoti_torch_get_sizes(tensor, &sizes);
    aoti_torch_get_strides(tensor, &strides);
    void* data = nullptr;
    aoti_torch_get_data_ptr(tensor, &data);
    at = static_cast<float*>(data);
  }
};

// Whether out = bias + left right was computed here
[[gnu::noinline]] inline bool multiplied(
    AtenTensorHandle out, AtenTensorHandle bias, AtenTensorHandle left, AtenTensorHandle right) {
  Shape c(out), a(left), b(right);
  if (c.dim != 2 || a.dim != 2 || b.dim != 2) return false;
  int64_t rows = c.sizes[0], columns = c.sizes[1], depth = a.sizes[1];
  if (!rows || !depth || columns < W || c.strides[1] != 1 || c.strides[0] != columns) return false;
  if (b.strides[1] != 1 && (b.strides[0] != 1 || rows < MANY)) return false;
  const float* start = nullptr;
  if (bias) {
    Shape given(bias);
    if (given.dim != 1 || given.sizes[0] != columns || given.strides[0] != 1) return false;
    start = given.at;
  }
  Matrix x{a.at, a.strides[0], a.strides[1]}, y{b.at, b.strides[0], b.strides[1]};
  int64_t threads = rows * columns * depth < WORTH ? 1 : omp_get_max_threads();
  int64_t each = (rows + threads * ROWS - 1) / (threads * ROWS) * ROWS;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < rows; i += each)
    product(std::min(each, rows - i), columns, depth, x.from(i, 0), y, c.at + i * columns, start);
  return true;
}

inline AOTITorchError mm_out(AtenTensorHandle out, AtenTensorHandle left, AtenTensorHandle right) {
  return multiplied(out, nullptr, left, right) ? AOTI_TORCH_SUCCESS : aoti_torch_cpu_mm_out(out, left, right);
}

inline AOTITorchError addmm_out(
    AtenTensorHandle out, AtenTensorHandle bias, AtenTensorHandle left, AtenTensorHandle right, double beta, double alpha) {
  bool plain = beta == 1 && alpha == 1;
  return plain && multiplied(out, bias, left, right) ? AOTI_TORCH_SUCCESS
                                                     : aoti_torch_cpu_addmm_out(out, bias, left, right, beta, alpha);
}
}  // namespace pyrovae

#define aoti_torch_cpu_mm_out pyrovae::mm_out
#define aoti_torch_cpu_addmm_out pyrovae::addmm_out
