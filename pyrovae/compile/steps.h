// Training steps one after the other with no Python between them: a batch, its noise, the graph of this file, the
// verdict on what it gives, clipping, Adam or SGD.
#include <ATen/core/MT19937RNGEngine.h>
#include <ATen/cpu/vec/functional.h>
#include <chrono>
#include <cmath>
#include <cstring>
#include <omp.h>

void inductor_entry_impl(AtenTensorHandle* inputs, AtenTensorHandle* outputs);

namespace at {
struct CPUGeneratorImpl {  // what is called of torch's class, whose own header takes half a second to compile
  mt19937 engine();
  void set_engine(mt19937 engine);
};
}  // namespace at

namespace pyrovae {
using V = at::vec::Vectorized<float>;
constexpr int64_t W = V::size();

inline V fused(V a, V b, V c) { return at::vec::fmadd(a, b, c); }

// A column of the data: its rows, those of a batch, and whether a batch has bits of which the data are probabilities
struct Column {
  const char* data;
  char* batch;
  int64_t row, drawn;  // row: in bytes
};

// Noise that is the graph's input of that number: standard normals, or uniforms
struct Draw {
  int64_t input, normal, dims;
  const int64_t* sizes;
};

// A parameter, where its gradient is left, what its optimizer keeps of it (Adam counts steps), which output of the graph
// its gradient is, and its group
struct Moved {
  float *at, *gradient, *steps, *kept[3];
  int64_t size, output, group;
};

// Options of a group of parameters, as torch calls them; 0 where its optimizer has no such
struct Group {
  double beta1, beta2, eps, decoupled_weight_decay, momentum, dampening, nesterov, weight_decay, maximize;
};

// An input that the graph changes, and what it was before a step; size in bytes
struct Changed {
  char *at, *before;
  int64_t size;
};

struct Steps {
  AtenTensorHandle *inputs, *given, *outputs;
  const Column* columns;
  const Draw* draws;
  const Moved* moved;
  const Changed* changed;
  const Group* groups;
  int64_t num_inputs, num_outputs, num_columns, num_draws, num_moved, num_changed, batch_size;
  double clip_norm;  // 0 for none
  float* kl_weight;  // the input that it is, if any
  at::CPUGeneratorImpl* generator;
};

inline AtenTensorHandle drawn(bool normal, const int64_t* sizes, int64_t dims) {
  int32_t dtype = aoti_torch_dtype_float32(), layout = aoti_torch_layout_strided();
  int32_t device = aoti_torch_device_type_cpu(), pinned = 0;
  AtenTensorHandle made = nullptr;
  auto draw = normal ? aoti_torch_cpu_randn : aoti_torch_cpu_rand;
  AOTI_TORCH_ERROR_CODE_CHECK(draw(sizes, dims, &dtype, &layout, &device, 0, &pinned, &made));
  return made;
}

template <typename T>
T* values(AtenTensorHandle tensor) {
  void* at = nullptr;
  aoti_torch_get_data_ptr(tensor, &at);
  return static_cast<T*>(at);
}

// Several words of a Mersenne twister, and one
using Words [[gnu::vector_size(4 * W)]] = uint32_t;
using Numbers [[gnu::vector_size(4 * W)]] = int32_t;
using Floats [[gnu::vector_size(4 * W)]] = float;

template <typename T>
T read(const uint32_t* words) {
  T found;
  std::memcpy(&found, words, sizeof(T));
  return found;
}

template <typename T>
void renew(uint32_t* words, int64_t far, const uint32_t* next) {
  T v = read<T>(next), mixed = (read<T>(words) & at::UMASK) | (v & at::LMASK);
  v = read<T>(words + far) ^ (mixed >> 1) ^ (-(v & 1) & at::MATRIX_A);
  std::memcpy(words, &v, sizeof(T));
}

// Numbers in [0, 1) as torch draws them, by the state of its own generator
class Uniform {
  static constexpr int64_t N = at::MERSENNE_STATE_N, M = at::MERSENNE_STATE_M;
  at::CPUGeneratorImpl* generator;
  at::mt19937 engine;
  at::mt19937_data_pod state;
  float numbers[N];

  void renewed() {
    uint32_t* words = state.state_.data();
    auto some = [=](int64_t i, int64_t end, int64_t far) {
      for (; i + W <= end; i += W) renew<Words>(words + i, far, words + i + 1);
      for (; i < end; i++) renew<uint32_t>(words + i, far, words + i + 1);
    };
    some(0, N - M, M), some(N - M, N - 1, M - N), renew<uint32_t>(words + N - 1, M - N, words);
    state.left_ = N + 1, state.next_ = 0;
    temper();
  }

  void temper() {
    for (int64_t i = 0; i < N; i += W) {
      Words y = read<Words>(state.state_.data() + i);
      y ^= y >> 11, y ^= (y << 7) & 0x9d2c5680, y ^= (y << 15) & 0xefc60000, y ^= y >> 18;
      Floats u = __builtin_convertvector(Numbers(y & 0xffffff), Floats) * 0x1p-24f;
      std::memcpy(numbers + i, &u, sizeof u);
    }
  }

 public:
  explicit Uniform(at::CPUGeneratorImpl* generator)
      : generator(generator), engine(generator->engine()), state(engine.data()) {
    temper();
  }
  ~Uniform() { engine.set_data(state), generator->set_engine(engine); }

  // x = whether numbers lie below p
  void below(const float* p, float* x, int64_t size) {
    while (size) {
      if (state.left_ == 1) renewed();
      int64_t number = std::min<int64_t>(size, state.left_ - 1), i = 0;
      const float* u = numbers + state.next_;
      for (; i + W <= number; i += W) V::loadu(u + i).lt(V::loadu(p + i)).store(x + i);
      for (; i < number; i++) x[i] = u[i] < p[i];
      state.left_ -= number, state.next_ += number, size -= number, p += number, x += number;
    }
  }
};

inline void gather(const Steps& s, const int64_t* index) {
  for (int64_t c = 0; c < s.num_columns; c++) {
    const Column& column = s.columns[c];
    auto row = [&](int64_t b) { return column.data + index[b] * column.row; };
    if (column.drawn) {
      Uniform uniform(s.generator);
      for (int64_t b = 0; b < s.batch_size; b++)
        uniform.below(reinterpret_cast<const float*>(row(b)), reinterpret_cast<float*>(column.batch + b * column.row),
                      column.row / sizeof(float));
    } else {
      for (int64_t b = 0; b < s.batch_size; b++) std::memcpy(column.batch + b * column.row, row(b), column.row);
    }
  }
}

// The sum of squares, or of zeros: no finite number where one of them is none
inline double total(const float* x, int64_t size, bool squares) {
  double sum = 0;
  for (int64_t i = 0; i < size;) {
    V part(0.f);
    for (int64_t end = std::min(size, i + 256 * W); i < end; i += W) {
      V some = V::loadu(x + i, std::min(W, size - i));
      part = fused(some, squares ? some : V(0.f), part);
    }
    sum += at::vec::vec_reduce_all<float>([](V a, V b) { return a + b; }, part);
  }
  return sum;
}

// The numbers that a step multiplies by
enum { SCALE, DECAY, KEEP, RATE, FIRST, SECOND, PAST, EPS, NEW, ALONG, DIRECT, NUMBERS };

// Some numbers by Adam, with one division for torch's two (3 kept: AMSGrad), or by SGD (1 kept: momentum)
template <int KEPT>
inline void update(const Moved& p, const float* gradient, int64_t i, int64_t count, const V* by, bool decays) {
  V x = V::loadu(p.at + i, count), d = by[SCALE] * V::loadu(gradient + i, count), kept[KEPT + 1];
  for (int k = 0; k < KEPT; k++) kept[k] = V::loadu(p.kept[k] + i, count);
  if (decays) d = fused(by[DECAY], x, d);
  if constexpr (KEPT > 1) {
    kept[0] = fused(by[FIRST], d - kept[0], kept[0]);
    kept[1] = fused(by[SECOND] * d, d, kept[1] * by[PAST]);
    if constexpr (KEPT > 2) kept[2] = at::vec::maximum(kept[2], kept[1]);
    d = kept[0] / (kept[KEPT - 1].sqrt() + by[EPS]);
  } else if constexpr (KEPT) {
    kept[0] = fused(by[PAST], kept[0], by[NEW] * d);
    d = fused(by[ALONG], kept[0], by[DIRECT] * d);
  }
  fused(by[RATE], d, by[KEEP] * x).store(p.at + i, count);
  for (int k = 0; k < KEPT; k++) kept[k].store(p.kept[k] + i, count);
}

template <int KEPT>
void move(const Moved& p, const float* gradient, const float* numbers, int threads) {
  V by[NUMBERS];
  std::copy(numbers, numbers + NUMBERS, by);
  int64_t whole = p.size / W * W;
  bool decays = numbers[DECAY] != 0;
#pragma omp parallel for num_threads(threads) if (threads > 1 && p.size > (1 << 15))
  for (int64_t i = 0; i < whole; i += W) update<KEPT>(p, gradient, i, W, by, decays);
  if (whole < p.size) update<KEPT>(p, gradient, whole, p.size - whole, by, decays);
}

inline void move(const Moved& p, const float* gradient, double rate, double clip, const Group& o, int threads) {
  float by[NUMBERS] = {};
  double loss = o.decoupled_weight_decay ? rate * o.weight_decay : 0;
  by[SCALE] = o.maximize ? -clip : clip, by[KEEP] = 1 - loss;
  by[DECAY] = o.decoupled_weight_decay ? 0 : o.weight_decay;
  if (p.steps) {
    double step = ++*p.steps, scale = std::sqrt(1 - std::pow(o.beta2, step));
    by[RATE] = -rate * scale / (1 - std::pow(o.beta1, step)), by[EPS] = o.eps * scale;
    by[FIRST] = 1 - o.beta1, by[SECOND] = 1 - o.beta2, by[PAST] = o.beta2;
    p.kept[2] ? move<3>(p, gradient, by, threads) : move<2>(p, gradient, by, threads);
  } else {
    by[RATE] = -rate, by[PAST] = o.momentum, by[NEW] = 1 - o.dampening;
    by[ALONG] = o.nesterov ? o.momentum : 1, by[DIRECT] = o.nesterov;
    p.kept[0] ? move<1>(p, gradient, by, threads) : move<0>(p, gradient, by, threads);
  }
}
}  // namespace pyrovae

// Steps until one is withheld (its loss is NaN), leaves data out or fails, or the time is over: how many were gone
// through. The last one's batch and (clipped) gradients stay, unless one failed. Rates are of all steps, group by group.
extern "C" int64_t pyrovae_steps(const pyrovae::Steps* steps, int64_t number, const int64_t* index, const double* rates,
                                 const double* kl_weights, double* losses, int64_t* left_out, double seconds) {
  using namespace pyrovae;
  const Steps& s = *steps;
  auto began = std::chrono::steady_clock::now();
  int threads = omp_get_max_threads();
  bool last = false;
  int64_t n = 0;
  auto changed = [&](auto copy) { std::for_each(s.changed, s.changed + s.num_changed, copy); };
  auto restored = [](const Changed& c) { std::memcpy(c.at, c.before, c.size); };
  for (; !last; n++) try {
      changed([](const Changed& c) { std::memcpy(c.before, c.at, c.size); });
      gather(s, index + n * s.batch_size);
      if (s.kl_weight) *s.kl_weight = kl_weights[n];
      std::fill(s.given, s.given + s.num_inputs, nullptr);
      for (int64_t d = 0; d < s.num_draws; d++)
        s.given[s.draws[d].input] = drawn(s.draws[d].normal, s.draws[d].sizes, s.draws[d].dims);
      for (int64_t i = 0; i < s.num_inputs; i++)
        if (!s.given[i]) AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(s.inputs[i], &s.given[i]));
      inductor_entry_impl(s.given, s.outputs);
      float loss = *values<float>(s.outputs[0]);
      left_out[n] = *values<int64_t>(s.outputs[1]);
      auto gradient = [&](const Moved& p) { return values<float>(s.outputs[p.output]); };
      double sum = 0;
      for (int64_t i = 0; i < s.num_moved; i++) sum += total(gradient(s.moved[i]), s.moved[i].size, s.clip_norm > 0);
      bool good = std::isfinite(loss) && std::isfinite(float(sum));
      losses[n] = good ? loss : NAN;
      if (!good) changed(restored);
      float clip = good && s.clip_norm > 0 ? std::min(1., s.clip_norm / (std::sqrt(sum) + 1e-6)) : 1.;
      // the last gradient that was judged lies near
      for (int64_t i = s.num_moved; good && i--;) {
        const Moved& p = s.moved[i];
        move(p, gradient(p), rates[p.group * number + n], clip, s.groups[p.group], threads);
      }
      std::chrono::duration<double> passed = std::chrono::steady_clock::now() - began;
      last = !good || left_out[n] || n + 1 == number || passed.count() > seconds;
      for (int64_t i = 0; last && i < s.num_moved; i++) {
        const Moved& p = s.moved[i];
        std::transform(gradient(p), gradient(p) + p.size, p.gradient, [=](float g) { return clip * g; });
      }
      for (int64_t i = 0; i < s.num_outputs; i++) aoti_torch_delete_tensor_object(s.outputs[i]);
    } catch (const std::exception&) {
      changed(restored);
      break;
    }
  return n;
}
