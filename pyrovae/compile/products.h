// Products of float32 matrices of the shapes that layers have: tiles of the result are summed in registers, from where
// the factors lie or from a copy of a few columns. Everything else goes where it would have gone.
#include <ATen/cpu/vec/functional.h>
#include <algorithm>
#include <type_traits>
#include <vector>
#include <omp.h>

namespace pyrovae {
constexpr int ROWS = W == 16 ? 5 : 4, VECTORS = W == 16 ? 5 : 3;  // of a tile: so many registers there are
constexpr int FEWEST = VECTORS - 2;  // vectors of a panel, where there are as many columns
constexpr int64_t FAR = VECTORS * W;  // from row to row of a panel
constexpr int64_t DEPTH = 512;  // of a panel: so much lies near
constexpr int64_t NEAR = 1 << 17;  // numbers of a that lie near until the next panel
constexpr int64_t FEW = 1 << 18;  // numbers of b whose copy is kept for all of a
constexpr int64_t MANY = 64;  // rows that pay for the copy of a panel
constexpr int64_t WORTH = 1 << 17;  // multiplications that pay for a thread

struct Matrix {
  const float* at;
  int64_t row, column;  // strides
  const float* place(int64_t i, int64_t j) const { return at + i * row + j * column; }
  Matrix from(int64_t i, int64_t j) const { return {at ? place(i, j) : at, row, column}; }
};

// c = start + a b, R rows and C vectors of columns of it, the last of which begins at the column last
template <int R, int C>
[[gnu::noinline]] void tile(
    int64_t depth, Matrix a, Matrix b, float* c, int64_t stride, Matrix start, int64_t last) {
  V sums[R][C];
  auto at = [=](int j) { return j + 1 < C ? j * W : last; };
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 8
    for (int j = 0; j < C; j++) sums[i][j] = start.at ? V::loadu(start.place(i, at(j))) : V(0.f);
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 8
    for (int j = 0; j < C; j++) __builtin_prefetch(c + i * stride + at(j), 1);
  for (int64_t k = 0; k < depth; k++) {
    V row[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; j++) row[j] = V::loadu(b.at + k * b.row + at(j));
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
    for (int j = 0; j < C; j++) sums[i][j].store(c + i * stride + at(j));
}

// [columns, depth] to [depth, columns]
[[gnu::noinline]] inline void turn(const float* from, int64_t stride, float* to, int64_t columns, int64_t depth) {
  at::vec::transpose_mxn<float>(from, stride, to, FAR, columns, depth);
}

// All rows of so many columns, from a copy of those columns of b where that pays, or where they lie as rows
template <int C = VECTORS>
void panel(int64_t rows, int64_t columns, int64_t depth, Matrix a, Matrix b, float* c, int64_t stride, Matrix start,
           float* copy, bool copied) {
  constexpr int FEWER = C > FEWEST ? C - 1 : 1;
  if constexpr (C > 1)
    if (columns <= FEWER * W) return panel<FEWER>(rows, columns, depth, a, b, c, stride, start, copy, copied);
  int64_t last = columns - W;
  if (copied) {
    b = {copy, FAR, 1};
  } else if (b.column != 1) {
    turn(b.at, b.column, copy, columns, depth);
    b = {copy, FAR, 1};
  } else if (rows >= MANY) {
    for (int64_t k = 0; k < depth; k++)
      for (int j = 0; j < C; j++) {
        int64_t at = j + 1 < C ? j * W : last;
        V::loadu(b.place(k, at)).store(copy + k * FAR + at);
        __builtin_prefetch(b.place(k, at + columns));  // of the next panel
      }
    b = {copy, FAR, 1};
  }
  int64_t i = 0;
  for (; i + ROWS <= rows; i += ROWS)
    tile<ROWS, C>(depth, a.from(i, 0), b, c + i * stride, stride, start.from(i, 0), last);
  for (; i < rows; i++) tile<1, C>(depth, a.from(i, 0), b, c + i * stride, stride, start.from(i, 0), last);
}

// c = start + a b, at least a vector wide
[[gnu::noinline]] inline void product(
    int64_t rows, int64_t columns, int64_t depth, Matrix a, Matrix b, float* c, int64_t stride, const float* start) {
  thread_local std::vector<float> copy;
  int64_t panels = (columns + FAR - 1) / FAR, least = W, each = W;
  if (columns >= FEWEST * W) least = FEWEST * W, each = (columns / panels + W - 1) / W * W;
  int64_t some = NEAR / std::min(depth, DEPTH) / ROWS * ROWS;
  bool kept = rows > some && columns * depth <= FEW;
  size_t place = FAR * (kept ? (columns + each - 1) / each * depth : DEPTH);
  if (copy.size() < place) copy.resize(place);
  for (int64_t i = 0; i < rows; i += some)
    for (int64_t j = 0; j < columns; j += each) {
      int64_t at = std::min(j, columns - least), wide = std::min(each, columns - at);  // some twice, where they overlap
      for (int64_t k = 0; k < depth; k += DEPTH) {
        float* to = c + i * stride + at;
        Matrix first = k ? Matrix{to, stride, 1} : Matrix{start ? start + at : start, 0, 1};
        float* mine = copy.data() + (kept ? (j / each * depth + k) * FAR : 0);
        panel(std::min(some, rows - i), wide, std::min(DEPTH, depth - k), a.from(i, k), b.from(k, at), to, stride, first,
              mine, kept && i);
      }
    }
}

// The same, by as many threads as have work in it: of rows where there are more of them, else of columns
[[gnu::noinline]] inline void shared(
    int64_t rows, int64_t columns, int64_t depth, Matrix a, Matrix b, float* c, const float* start) {
  bool by_rows = rows > columns;
  int64_t unit = by_rows ? ROWS : W, units = (by_rows ? rows : columns) / unit;
  int64_t most = std::min<int64_t>(omp_get_max_threads(), units);
  int64_t threads = std::clamp<int64_t>(rows * columns * depth / WORTH, 1, most);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < threads; t++) {
    int64_t from = units * t / threads * unit, to = units * (t + 1) / threads * unit;
    if (t + 1 == threads) to = by_rows ? rows : columns;
    if (by_rows)
      product(to - from, columns, depth, a.from(from, 0), b, c + from * columns, columns, start);
    else
      product(rows, to - from, depth, a, b.from(0, from), c + from, columns, start ? start + from : start);
  }
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
  bool pays = rows >= MANY || omp_get_max_threads() > 1;  // MKL turns a few rows as well, but alone
  if (b.strides[1] != 1 && (b.strides[0] != 1 || !pays)) return false;
  const float* start = nullptr;
  if (bias) {
    Shape given(bias);
    if (given.dim != 1 || given.sizes[0] != columns || given.strides[0] != 1) return false;
    start = given.at;
  }
  Matrix x{a.at, a.strides[0], a.strides[1]}, y{b.at, b.strides[0], b.strides[1]};
  shared(rows, columns, depth, x, y, c.at, start);
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
