// Sum of batch norms, then perhaps a ReLU:  out = act(sum_k gamma_k (y_k - mean_k) / sqrt(var_k + eps_k) + beta_k)
//
// Forward and backward, each in two passes over memory whatever the number K of terms. Images are (N, C, H, W), stored
// either as rows (N*H*W, C), which is channels_last, or as planes (N*C, H*W). Statistics are summed in float (in double
// for double) over short runs, shifted by the first value of the channel so that a large mean costs no digits; runs are
// added up in double. Each thread takes one stretch of rows or planes, so equal numbers of threads give equal bits.

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

constexpr int64_t RUN = 64;  // vectors that are summed before the sum goes into a double
constexpr int64_t GRAIN = 16384;  // numbers that are worth a thread

struct bf16 {
    uint16_t bits;
};

// W numbers of type T as one vector of the type A that is computed in.
template <class T> struct Lanes {
    using A = T;
    static constexpr int W = 64 / sizeof(T);
    typedef T V __attribute__((vector_size(64)));
    static V load(const T* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
    static void store(T* p, V v) { std::memcpy(p, &v, sizeof v); }
};

template <> struct Lanes<bf16> {
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
    static void store(bf16* p, V v) {  // to the nearest, ties to even; not-a-number stays one
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

template <class T> typename Lanes<T>::V load(const T* p, int count) {
    if (count == Lanes<T>::W) return Lanes<T>::load(p);
    T some[Lanes<T>::W] = {};
    for (int i = 0; i < count; ++i) some[i] = p[i];
    return Lanes<T>::load(some);
}

template <class T> void store(T* p, typename Lanes<T>::V v, int count) {
    if (count == Lanes<T>::W) return Lanes<T>::store(p, v);
    T some[Lanes<T>::W];
    Lanes<T>::store(some, v);
    for (int i = 0; i < count; ++i) p[i] = some[i];
}

// The gradient in front of a ReLU; not-a-number in the outcome lets it through, as with PyTorch.
template <class V> V zero_where_not_positive(V v, V sign) {
    typedef decltype(sign > sign) Mask;
    Mask mask = ~(sign <= V{});
    Mask bits;
    std::memcpy(&bits, &v, sizeof bits);
    bits &= mask;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

// A ReLU that lets not-a-number through, as PyTorch's does.
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
    bool rows;
    int64_t outer;  // rows, or planes
    int64_t channels;
    int64_t inner;  // numbers in a plane
    int threads;

    int64_t numbers() const { return rows ? outer * channels : outer * inner; }
    int64_t per_channel() const { return numbers() / channels; }
    int team() const { return (int)std::max<int64_t>(1, std::min<int64_t>({threads, numbers() / GRAIN, outer})); }
};

// Visit every number once. A task is told the channel that its first lane is of (all lanes in planes, successive ones
// in rows), prepares its coefficients, takes vectors, and may write sums away at the end of each run.
template <class T, class Task> void sweep(const Geometry& g, int64_t from, int64_t to, Task task) {
    constexpr int W = Lanes<T>::W;
    if (g.rows) {
        for (int64_t row = from; row < to; row += RUN) {
            const int64_t last = std::min(row + RUN, to);
            for (int64_t c = 0; c < g.channels; c += W) {
                const int count = (int)std::min<int64_t>(W, g.channels - c);
                task.start_lanes(c, count);
                if (count == W)
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
        for (int64_t i = 0; i < g.inner; i += RUN * W) {
            const int64_t last = std::min(i + RUN * W, g.inner), whole = i + (last - i) / W * W;
            for (int64_t j = i; j < whole; j += W) task.take(base + j, W);
            if (whole < last) task.take(base + whole, (int)(last - whole));
            task.finish_plane(c);
        }
    }
}

// One task a thread, each on its own stretch.
template <class T, class Make> void in_team(const Geometry& g, Make make) {
    const int team = g.team();
#ifdef _OPENMP
#pragma omp parallel for num_threads(team) schedule(static, 1) if (team > 1)
#endif
    for (int t = 0; t < team; ++t) sweep<T>(g, g.outer * t / team, g.outer * (t + 1) / team, make(t));
}

template <class T> typename Lanes<T>::V broadcast(typename Lanes<T>::A a) { return typename Lanes<T>::V{} + a; }

// S sums a channel, each of all numbers of it.
template <class T, int S> struct Sums {
    using V = typename Lanes<T>::V;
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
            double all = 0;
            for (int i = 0; i < Lanes<T>::W; ++i) all += sum[s][i];
            total[s * channels + c] += all;
        }
        clear();
    }
};

template <class T, int K> struct Moments : Sums<T, 2 * K> {
    using V = typename Lanes<T>::V;
    const T* const* y;
    const typename Lanes<T>::A* shift;  // (K, C)
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
            if (count < Lanes<T>::W)
                for (int i = count; i < Lanes<T>::W; ++i) d[i] = 0;
            this->sum[2 * k] += d;
            this->sum[2 * k + 1] += d * d;
        }
    }
};

template <class T, int K, bool RELU> struct Affine {
    using V = typename Lanes<T>::V;
    using A = typename Lanes<T>::A;
    const T* const* y;
    T* out;
    const A* coefficients;  // (K + 1, C): the factors, and what is added
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

template <class T, int K, bool RELU> struct Inner : Sums<T, K + 1> {  // sum of g, and of g (y_k - mean_k)
    using V = typename Lanes<T>::V;
    const T* const* y;
    const T* gradient;
    const T* out;
    const typename Lanes<T>::A* mean;  // (K, C)
    V m[K];

    void start_lanes(int64_t c, int count) {
        this->clear();
        for (int k = 0; k < K; ++k) m[k] = ::load(mean + k * this->channels + c, count);
    }
    void start_plane(int64_t c) {
        this->clear();
        for (int k = 0; k < K; ++k) m[k] = broadcast<T>(mean[k * this->channels + c]);
    }
    void take(int64_t at, int count) {  // beyond count g is zero
        V g = ::load(gradient + at, count);
        if (RELU) g = zero_where_not_positive(g, ::load(out + at, count));
        this->sum[K] += g;
        for (int k = 0; k < K; ++k) this->sum[k] += g * (::load(y[k] + at, count) - m[k]);
    }
};

template <class T, int K, bool RELU> struct Gradients {  // dy_k = factor g + slope (y_k - mean_k) + offset
    using V = typename Lanes<T>::V;
    using A = typename Lanes<T>::A;
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
        if (RELU) g = zero_where_not_positive(g, ::load(out + at, count));
        for (int k = 0; k < K; ++k)
            if (dy[k])
                ::store(dy[k] + at, a[3 * k] * g + (a[3 * k + 1] * (::load(y[k] + at, count) - m[k]) + a[3 * k + 2]), count);
    }
};

std::vector<double> total(const std::vector<double>& parts, int64_t size) {
    std::vector<double> all(size, 0.0);
    for (size_t i = 0; i < parts.size(); ++i) all[i % size] += parts[i];
    return all;
}

template <class T> struct Call {
    using A = typename Lanes<T>::A;
    Geometry g;
    const T* const* y;
    T* out;
    const A* const* gamma;  // each may be null: 1
    const A* const* beta;  // each may be null: 0
    A* const* running_mean;  // each may be null: not kept
    A* const* running_var;
    const double* momentum;
    const double* eps;
    A* saved;  // (2 K, C): means, then 1 / sqrt(var + eps)
    const T* gradient;
    T* const* dy;
    A* const* dgamma;  // each may be null: not wanted
    A* const* dbeta;

    template <int K, bool RELU> void forward() const {
        const int64_t C = g.channels;
        const double count = (double)g.per_channel();
        std::vector<A> shift(K * C), coefficients((K + 1) * C);
        std::vector<double> offset(C, 0.0);
        for (int k = 0; k < K; ++k)
            for (int64_t c = 0; c < C; ++c)
                shift[k * C + c] = ::load(y[k] + (g.rows ? c : c * g.inner), 1)[0];
        std::vector<double> parts(g.team() * 2 * K * C, 0.0);
        in_team<T>(g, [&](int t) {
            Moments<T, K> task;
            task.total = parts.data() + t * 2 * K * C;
            task.channels = C;
            task.y = y;
            task.shift = shift.data();
            return task;
        });
        const std::vector<double> sums = total(parts, 2 * K * C);
        for (int k = 0; k < K; ++k)
            for (int64_t c = 0; c < C; ++c) {
                const double s = sums[2 * k * C + c], q = sums[(2 * k + 1) * C + c];
                const double mean = shift[k * C + c] + s / count, spread = std::max(q - s * s / count, 0.0);
                const double inverse = 1.0 / std::sqrt(spread / count + eps[k]);
                saved[k * C + c] = (A)mean;
                saved[(K + k) * C + c] = (A)inverse;
                if (running_mean[k]) {
                    running_mean[k][c] = (A)(momentum[k] * mean + (1 - momentum[k]) * running_mean[k][c]);
                    running_var[k][c] = (A)(momentum[k] * (spread / (count - 1)) + (1 - momentum[k]) * running_var[k][c]);
                }
                const double factor = inverse * (gamma[k] ? gamma[k][c] : 1.0);
                coefficients[k * C + c] = (A)factor;
                offset[c] += (beta[k] ? beta[k][c] : 0.0) - mean * factor;
            }
        std::copy(offset.begin(), offset.end(), coefficients.begin() + K * C);
        in_team<T>(g, [&](int) {
            return Affine<T, K, RELU>{y, out, coefficients.data(), C, {}};
        });
    }

    template <int K, bool RELU> void backward() const {
        const int64_t C = g.channels;
        const double count = (double)g.per_channel();
        std::vector<double> parts(g.team() * (K + 1) * C, 0.0);
        in_team<T>(g, [&](int t) {
            Inner<T, K, RELU> task;
            task.total = parts.data() + t * (K + 1) * C;
            task.channels = C;
            task.y = y;
            task.gradient = gradient;
            task.out = out;
            task.mean = saved;
            return task;
        });
        const std::vector<double> sums = total(parts, (K + 1) * C);
        std::vector<A> coefficients(3 * K * C);
        bool any = false;
        for (int k = 0; k < K; ++k) {
            any = any || dy[k];
            for (int64_t c = 0; c < C; ++c) {
                const double inverse = saved[(K + k) * C + c], s = sums[k * C + c], all = sums[K * C + c];
                const double factor = inverse * (gamma[k] ? gamma[k][c] : 1.0);
                coefficients[3 * k * C + c] = (A)factor;
                coefficients[(3 * k + 1) * C + c] = (A)(-factor * inverse * inverse * s / count);
                coefficients[(3 * k + 2) * C + c] = (A)(-factor * all / count);
                if (dgamma[k]) dgamma[k][c] = (A)(s * inverse);
                if (dbeta[k]) dbeta[k][c] = (A)all;
            }
        }
        if (any)
            in_team<T>(g, [&](int) {
                return Gradients<T, K, RELU>{y, gradient, out, dy, saved, coefficients.data(), C, {}, {}};
            });
    }

    template <int K> void run(bool with_relu) const {
        if (gradient) return with_relu ? backward<K, true>() : backward<K, false>();
        return with_relu ? forward<K, true>() : forward<K, false>();
    }
};

template <class T> int run(int terms, int with_relu, const Geometry& g, void* const* p, const double* numbers) {
    using A = typename Lanes<T>::A;
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

// pointers: y, gamma, beta, running mean, running var, dy, dgamma, dbeta, K of each; out, saved, gradient (null: forward).
// numbers: momentum and eps, K of each. Returns 0, or 1 where it has no code for the type or for so many terms.
extern "C" int repvgg_norm_sum(int type, int terms, int with_relu, int rows, int64_t outer, int64_t channels,
                               int64_t inner, int threads, void* const* pointers, const double* numbers) {
    const Geometry g{rows != 0, outer, channels, inner, threads};
    switch (type) {
        case 0: return run<float>(terms, with_relu, g, pointers, numbers);
        case 1: return run<double>(terms, with_relu, g, pointers, numbers);
        case 2: return run<bf16>(terms, with_relu, g, pointers, numbers);
    }
    return 1;
}
