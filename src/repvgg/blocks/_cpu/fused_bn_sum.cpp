// Sum of batch norms in training mode, optionally followed by a ReLU:
//
//     out = act(sum_k gamma_k (y_k - mean_k) / sqrt(var_k + eps_k) + beta_k)
//
// Forward and backward take two passes over memory each, whatever the number K of terms. Images are (N, C, H, W),
// stored as channels_last, a matrix (N*H*W, C), or as planes, a matrix (N*C, H*W).
//
// Precision: statistics are accumulated in float (double for double) over short runs, and the runs in double. Values
// are shifted by the first value of their channel, so that a large mean does not cancel digits of the variance. Every
// thread owns a contiguous range of rows or planes, so equal thread counts give equal bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int64_t RUN_VECTORS = 64;  // vectors accumulated in float before the sum is added to a double
constexpr int64_t MIN_ELEMENTS_PER_THREAD = 16384;  // below that, starting a thread costs more than it saves

struct bf16 {
    uint16_t bits;
};

// W elements of storage type T as one 64-byte vector of arithmetic type A (GCC vector extensions: one AVX-512 register,
// or two AVX2 ones).
template <class T> struct Vector {
    using A = T;
    static constexpr int W = 64 / sizeof(T);
    typedef T V __attribute__((vector_size(64)));
    static V load(const T* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
    static void store(T* p, V v) { std::memcpy(p, &v, sizeof v); }
};

template <> struct Vector<bf16> {
    using A = float;
    static constexpr int W = 16;
    typedef float V __attribute__((vector_size(64)));
    typedef uint16_t Half __attribute__((vector_size(32)));
    typedef uint32_t Full __attribute__((vector_size(64)));
    static V load(const bf16* p) {
        Half half;
        std::memcpy(&half, p, sizeof half);
        Full full = __builtin_convertvector(half, Full) << 16;
        V v;
        std::memcpy(&v, &full, sizeof v);
        return v;
    }
    static void store(bf16* p, V v) {  // round to nearest even; NaN stays NaN
#ifdef __AVX512BF16__
        const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
        std::memcpy(p, &half, sizeof half);
#else
        Full full;
        std::memcpy(&full, &v, sizeof full);
        Full rounded = (full + 0x7fff + ((full >> 16) & 1)) >> 16;
        Full nan = (Full)(v != v);
        Half half = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Half);
        std::memcpy(p, &half, sizeof half);
#endif
    }
};

template <class T> typename Vector<T>::V load(const T* p, int count) {
    if (count == Vector<T>::W) return Vector<T>::load(p);
    T some[Vector<T>::W] = {};
    for (int i = 0; i < count; ++i) some[i] = p[i];
    return Vector<T>::load(some);
}

template <class T> void store(T* p, typename Vector<T>::V v, int count) {
    if (count == Vector<T>::W) return Vector<T>::store(p, v);
    T some[Vector<T>::W];
    Vector<T>::store(some, v);
    for (int i = 0; i < count; ++i) p[i] = some[i];
}

// ReLU backward: zero the gradient where the output is <= 0. A NaN output passes the gradient on, as PyTorch does.
template <class V> V relu_backward(V v, V out) {
    typedef decltype(out > out) Mask;
    Mask mask = ~(out <= V{});
    Mask bits;
    std::memcpy(&bits, &v, sizeof bits);
    bits &= mask;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

// ReLU that propagates NaN, as PyTorch's does; a bit mask, because max(NaN, 0) would return 0.
template <class V> V relu(V v) {
    typedef decltype(v < v) Mask;
    Mask negative = v < V{};
    Mask bits;
    std::memcpy(&bits, &v, sizeof bits);
    bits &= ~negative;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

struct Geometry {
    bool channels_last;
    int64_t outer;  // rows N*H*W if channels_last, else planes N*C
    int64_t channels;
    int64_t inner;  // elements of a plane, H*W
    int threads;

    int64_t elements() const { return channels_last ? outer * channels : outer * inner; }
    int64_t elements_per_channel() const { return elements() / channels; }
    int team_size() const {
        const int64_t most = std::min<int64_t>({threads, elements() / MIN_ELEMENTS_PER_THREAD, outer});
        return (int)std::max<int64_t>(1, most);
    }
};

// Visit elements [from, to) of the outer dimension once, in vectors. Before each run the task loads its coefficients
// for the channels at hand (start_lanes: consecutive channels in the lanes; start_plane: one channel in all lanes);
// take() processes `count` elements; after each run finish_*() may flush float sums into doubles.
template <class T, class Task> void sweep(const Geometry& g, int64_t from, int64_t to, Task task) {
    constexpr int W = Vector<T>::W;
    if (g.channels_last) {
        for (int64_t row = from; row < to; row += RUN_VECTORS) {
            const int64_t last = std::min(row + RUN_VECTORS, to);
            for (int64_t c = 0; c < g.channels; c += W) {
                const int count = (int)std::min<int64_t>(W, g.channels - c);
                task.start_lanes(c, count);
                if (count == W)  // a constant count: compiled to plain vector loads and stores
                    for (int64_t r = row; r < last; ++r) task.take(r * g.channels + c, W);
                else
                    for (int64_t r = row; r < last; ++r) task.take(r * g.channels + c, count);
                task.finish_lanes(c, count);
            }
        }
        return;
    }
    for (int64_t plane = from; plane < to; ++plane) {
        const int64_t c = plane % g.channels, base = plane * g.inner;
        task.start_plane(c);
        for (int64_t i = 0; i < g.inner; i += RUN_VECTORS * W) {
            const int64_t last = std::min(i + RUN_VECTORS * W, g.inner), full_end = i + (last - i) / W * W;
            for (int64_t j = i; j < full_end; j += W) task.take(base + j, W);
            if (full_end < last) task.take(base + full_end, (int)(last - full_end));
            task.finish_plane(c);
        }
    }
}

// Run one task per thread, each on its own range; static scheduling fixes which thread sums what.
template <class T, class Make> void parallel_sweep(const Geometry& g, Make make) {
    const int team = g.team_size();
#ifdef _OPENMP
#pragma omp parallel for num_threads(team) schedule(static, 1) if (team > 1)
#endif
    for (int t = 0; t < team; ++t) sweep<T>(g, g.outer * t / team, g.outer * (t + 1) / team, make(t));
}

template <class T> typename Vector<T>::V broadcast(typename Vector<T>::A a) { return typename Vector<T>::V{} + a; }

// S sums per channel, accumulated as vectors within a run and as doubles across runs.
template <class T, int S> struct Sums {
    using V = typename Vector<T>::V;
    double* total;  // (S, C)
    int64_t channels;
    V sum[S];

    void clear() { for (V& s : sum) s = V{}; }
    void finish_lanes(int64_t c, int count) {
        for (int s = 0; s < S; ++s)
            for (int i = 0; i < count; ++i) total[s * channels + c + i] += sum[s][i];
    }
    void finish_plane(int64_t c) {
        for (int s = 0; s < S; ++s) {
            double sum_of_lanes = 0;
            for (int i = 0; i < Vector<T>::W; ++i) sum_of_lanes += sum[s][i];
            total[s * channels + c] += sum_of_lanes;
        }
        clear();
    }
};

// Forward, pass 1: per term the sum of (y - shift) and of its square.
template <class T, int K> struct Moments : Sums<T, 2 * K> {
    using V = typename Vector<T>::V;
    const T* const* y;
    const typename Vector<T>::A* shift;  // (K, C)
    V origin[K];

    void start_lanes(int64_t c, int count) {
        this->clear();
        for (int k = 0; k < K; ++k) origin[k] = ::load(shift + k * this->channels + c, count);
    }
    void start_plane(int64_t c) {
        this->clear();
        for (int k = 0; k < K; ++k) origin[k] = broadcast<T>(shift[k * this->channels + c]);
    }
    void take(int64_t at, int count) {
        for (int k = 0; k < K; ++k) {
            V d = ::load(y[k] + at, count) - origin[k];
            // Lanes beyond count hold 0 - origin: they must not be summed.
            if (count < Vector<T>::W)
                for (int i = count; i < Vector<T>::W; ++i) d[i] = 0;
            this->sum[2 * k] += d;
            this->sum[2 * k + 1] += d * d;
        }
    }
};

// Forward, pass 2: out = act(sum_k a_k y_k + a_K).
template <class T, int K, bool RELU> struct Affine {
    using V = typename Vector<T>::V;
    using A = typename Vector<T>::A;
    const T* const* y;
    T* out;
    const A* coefficients;  // (K + 1, C): K factors, then the offset
    int64_t channels;
    V a[K + 1];

    void start_lanes(int64_t c, int count) {
        for (int k = 0; k <= K; ++k) a[k] = ::load(coefficients + k * channels + c, count);
    }
    void start_plane(int64_t c) {
        for (int k = 0; k <= K; ++k) a[k] = broadcast<T>(coefficients[k * channels + c]);
    }
    void finish_lanes(int64_t, int) {}
    void finish_plane(int64_t) {}
    void take(int64_t at, int count) {
        V v = a[K];
        for (int k = 0; k < K; ++k) v += a[k] * ::load(y[k] + at, count);
        ::store(out + at, RELU ? relu(v) : v, count);
    }
};

// Backward, pass 1: the sum of g (y_k - mean_k) per term, and of g, where g is the gradient before the ReLU.
template <class T, int K, bool RELU> struct GradientSums : Sums<T, K + 1> {
    using V = typename Vector<T>::V;
    const T* const* y;
    const T* gradient;
    const T* out;
    const typename Vector<T>::A* mean;  // (K, C)
    V m[K];

    void start_lanes(int64_t c, int count) {
        this->clear();
        for (int k = 0; k < K; ++k) m[k] = ::load(mean + k * this->channels + c, count);
    }
    void start_plane(int64_t c) {
        this->clear();
        for (int k = 0; k < K; ++k) m[k] = broadcast<T>(mean[k * this->channels + c]);
    }
    void take(int64_t at, int count) {  // lanes beyond count add nothing: load() fills g with 0 there
        V g = ::load(gradient + at, count);
        if (RELU) g = relu_backward(g, ::load(out + at, count));
        this->sum[K] += g;
        for (int k = 0; k < K; ++k) this->sum[k] += g * (::load(y[k] + at, count) - m[k]);
    }
};

// Backward, pass 2: dy_k = factor g + slope (y_k - mean_k) + offset. dy_k may alias y_k: each vector is read first.
template <class T, int K, bool RELU> struct InputGradients {
    using V = typename Vector<T>::V;
    using A = typename Vector<T>::A;
    const T* const* y;
    const T* gradient;
    const T* out;
    T* const* dy;
    const A* mean;  // (K, C)
    const A* coefficients;  // (3 K, C)
    int64_t channels;
    V m[K], a[3 * K];

    void start_lanes(int64_t c, int count) {
        for (int k = 0; k < K; ++k) m[k] = ::load(mean + k * channels + c, count);
        for (int k = 0; k < 3 * K; ++k) a[k] = ::load(coefficients + k * channels + c, count);
    }
    void start_plane(int64_t c) {
        for (int k = 0; k < K; ++k) m[k] = broadcast<T>(mean[k * channels + c]);
        for (int k = 0; k < 3 * K; ++k) a[k] = broadcast<T>(coefficients[k * channels + c]);
    }
    void finish_lanes(int64_t, int) {}
    void finish_plane(int64_t) {}
    void take(int64_t at, int count) {
        V g = ::load(gradient + at, count);
        if (RELU) g = relu_backward(g, ::load(out + at, count));
        for (int k = 0; k < K; ++k)
            if (dy[k])
                ::store(dy[k] + at,
                        a[3 * k] * g + (a[3 * k + 1] * (::load(y[k] + at, count) - m[k]) + a[3 * k + 2]), count);
    }
};

// Add up the partial sums of all threads, in the order of the threads.
std::vector<double> add_partial_sums(const std::vector<double>& parts, int64_t size) {
    std::vector<double> sums(size, 0.0);
    for (size_t i = 0; i < parts.size(); ++i) sums[i % size] += parts[i];
    return sums;
}

// One call from Python: arguments by name, and the forward and the backward pass.
template <class T> struct Call {
    using A = typename Vector<T>::A;
    Geometry g;
    const T* const* y;
    T* out;
    const A* const* gamma;  // null entry: 1
    const A* const* beta;  // null entry: 0
    A* const* running_mean;  // null entry: no running statistics
    A* const* running_var;
    const double* momentum;
    const double* eps;
    A* saved;  // (2 K, C): means, then 1 / sqrt(var + eps)
    const T* gradient;
    T* const* dy;
    A* const* dgamma;  // null entry: gradient not needed
    A* const* dbeta;

    template <int K, bool RELU> void forward() const {
        const int64_t C = g.channels;
        const double count = (double)g.elements_per_channel();
        std::vector<A> shift(K * C), coefficients((K + 1) * C);
        std::vector<double> offset(C, 0.0);
        // Any value near the mean serves as shift; the first one of each channel needs no pass of its own.
        for (int k = 0; k < K; ++k)
            for (int64_t c = 0; c < C; ++c)
                shift[k * C + c] = ::load(y[k] + (g.channels_last ? c : c * g.inner), 1)[0];
        std::vector<double> parts(g.team_size() * 2 * K * C, 0.0);
        parallel_sweep<T>(g, [&](int t) {
            Moments<T, K> task;
            task.total = parts.data() + t * 2 * K * C;
            task.channels = C;
            task.y = y;
            task.shift = shift.data();
            return task;
        });
        const std::vector<double> sums = add_partial_sums(parts, 2 * K * C);
        for (int k = 0; k < K; ++k)
            for (int64_t c = 0; c < C; ++c) {
                const double s = sums[2 * k * C + c], q = sums[(2 * k + 1) * C + c];
                // max: rounding may make the sum of squared deviations of a constant channel slightly negative.
                const double mean = shift[k * C + c] + s / count, squares = std::max(q - s * s / count, 0.0);
                const double inverse = 1.0 / std::sqrt(squares / count + eps[k]);
                saved[k * C + c] = (A)mean;
                saved[(K + k) * C + c] = (A)inverse;
                if (running_mean[k]) {
                    running_mean[k][c] = (A)(momentum[k] * mean + (1 - momentum[k]) * running_mean[k][c]);
                    // As in PyTorch, the running variance divides by count - 1, the normalization by count.
                    running_var[k][c] =
                        (A)(momentum[k] * (squares / (count - 1)) + (1 - momentum[k]) * running_var[k][c]);
                }
                const double factor = inverse * (gamma[k] ? gamma[k][c] : 1.0);
                coefficients[k * C + c] = (A)factor;
                offset[c] += (beta[k] ? beta[k][c] : 0.0) - mean * factor;
            }
        std::copy(offset.begin(), offset.end(), coefficients.begin() + K * C);
        parallel_sweep<T>(g, [&](int) {
            return Affine<T, K, RELU>{y, out, coefficients.data(), C, {}};
        });
    }

    template <int K, bool RELU> void backward() const {
        const int64_t C = g.channels;
        const double count = (double)g.elements_per_channel();
        std::vector<double> parts(g.team_size() * (K + 1) * C, 0.0);
        parallel_sweep<T>(g, [&](int t) {
            GradientSums<T, K, RELU> task;
            task.total = parts.data() + t * (K + 1) * C;
            task.channels = C;
            task.y = y;
            task.gradient = gradient;
            task.out = out;
            task.mean = saved;
            return task;
        });
        const std::vector<double> sums = add_partial_sums(parts, (K + 1) * C);
        std::vector<A> coefficients(3 * K * C);
        bool any_dy = false;
        for (int k = 0; k < K; ++k) {
            any_dy = any_dy || dy[k];
            for (int64_t c = 0; c < C; ++c) {
                const double inverse = saved[(K + k) * C + c], s = sums[k * C + c], g_sum = sums[K * C + c];
                const double factor = inverse * (gamma[k] ? gamma[k][c] : 1.0);
                coefficients[3 * k * C + c] = (A)factor;
                coefficients[(3 * k + 1) * C + c] = (A)(-factor * inverse * inverse * s / count);
                coefficients[(3 * k + 2) * C + c] = (A)(-factor * g_sum / count);
                if (dgamma[k]) dgamma[k][c] = (A)(s * inverse);
                if (dbeta[k]) dbeta[k][c] = (A)g_sum;
            }
        }
        if (any_dy)  // a frozen network before this block needs no input gradients
            parallel_sweep<T>(g, [&](int) {
                return InputGradients<T, K, RELU>{y, gradient, out, dy, saved, coefficients.data(), C, {}, {}};
            });
    }

    template <int K> void run(bool with_relu) const {
        if (gradient) return with_relu ? backward<K, true>() : backward<K, false>();
        return with_relu ? forward<K, true>() : forward<K, false>();
    }
};

template <class T> int run(int terms, int with_relu, const Geometry& g, void* const* p, const double* numbers) {
    using A = typename Vector<T>::A;
    const int K = terms;
    Call<T> call{g, (const T* const*)p, (T*)p[8 * K], (const A* const*)(p + K), (const A* const*)(p + 2 * K),
                 (A* const*)(p + 3 * K), (A* const*)(p + 4 * K), numbers, numbers + K, (A*)p[8 * K + 1],
                 (const T*)p[8 * K + 2], (T* const*)(p + 5 * K), (A* const*)(p + 6 * K), (A* const*)(p + 7 * K)};
    switch (K) {
        case 1: call.template run<1>(with_relu); return 0;
        case 2: call.template run<2>(with_relu); return 0;
        case 3: call.template run<3>(with_relu); return 0;
    }
    return 1;
}

}  // namespace

// The only entry point.
// type: 0 float, 1 double, 2 bfloat16.
// pointers: K each of y, gamma, beta, running mean, running var, dy, dgamma, dbeta; then out, saved, gradient. A null
//     gradient selects the forward pass.
// numbers: K momentums, then K eps.
// Returns 0, or 1 if there is no code for the type or for this number of terms.
extern "C" int repvgg_fused_bn_sum(int type, int terms, int with_relu, int channels_last, int64_t outer,
                                   int64_t channels, int64_t inner, int threads, void* const* pointers,
                                   const double* numbers) {
    const Geometry g{channels_last != 0, outer, channels, inner, threads};
    switch (type) {
        case 0: return run<float>(terms, with_relu, g, pointers, numbers);
        case 1: return run<double>(terms, with_relu, g, pointers, numbers);
        case 2: return run<bf16>(terms, with_relu, g, pointers, numbers);
    }
    return 1;
}
