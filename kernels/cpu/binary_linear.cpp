// The CPU kernel of a BWLA layer behind a plain C interface: no Python, no torch headers, no OpenMP at link time.
//
// One file, compiled once without -march: the pieces in *.h are included again for every instruction set,
// each time in a namespace of its own under a target pragma, and a call picks one by number.
//
// How the product of 1-bit weights and integer activations is computed, and why by table lookup: see
// lut_vbmi.h. Processors with AMX multiply many tokens with it: see amx.h.

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <utility>

#include "experts_call.h"
#include "head_call.h"
#include "isa.h"
#include "layout.h"
#include "plan.h"
#include "runtime.h"
#include "sign_step.h"

#define NOINLINE __attribute__((noinline))
#if defined(__clang__)
#define BWLA_UNROLL _Pragma("clang loop unroll(full)")
#define BWLA_PRAGMA(text) _Pragma(#text)
#define BWLA_TARGET(list) \
    BWLA_PRAGMA(clang attribute push(__attribute__((target(list))), apply_to = function))
#define BWLA_TARGET_END _Pragma("clang attribute pop")
#else
// Without this GCC 12 keeps register tiles in memory.
#define BWLA_UNROLL _Pragma("GCC unroll 16")
#define BWLA_PRAGMA(text) _Pragma(#text)
#define BWLA_TARGET(list) _Pragma("GCC push_options") BWLA_PRAGMA(GCC target(list))
#define BWLA_TARGET_END _Pragma("GCC pop_options")
#endif

// A short loop over registers.
#define UNROLL(i, count) BWLA_UNROLL for (int i = 0; i < (count); ++i)

namespace bwla {

constexpr int64_t kReadAhead =
    8192;  // bytes ahead of which memory is fetched into the level-2 cache, over all streams

namespace scalar {
#define BWLA_STRIP_VECTORS 2
#include "vector_scalar.h"
#include "lut_scalar.h"
#include "head_scalar.h"
#include "variant.h"
#undef BWLA_STRIP_VECTORS
}  // namespace scalar

#if BWLA_X86

BWLA_TARGET("avx2,fma,f16c")
namespace avx2 {
#define BWLA_STRIP_VECTORS 2
#include "vector_avx2.h"
#include "tables_shuffle.h"
#include "lut_avx2.h"
#include "head_avx2.h"
#include "variant.h"
#undef BWLA_STRIP_VECTORS
}  // namespace avx2
BWLA_TARGET_END

#define BWLA_STRIP_VECTORS 5

BWLA_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512bw {
#include "vector_avx512.h"
#include "tables_shuffle.h"
#include "lut_avx512bw.h"
#include "head_avx2.h"
#include "variant.h"
}  // namespace avx512bw
BWLA_TARGET_END

BWLA_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")
namespace avx512vbmi {
#include "vector_avx512.h"
#include "lut_vbmi.h"
#include "head_vnni.h"
#include "variant.h"
}  // namespace avx512vbmi
BWLA_TARGET_END

#if BWLA_AMX
BWLA_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx512bf16,amx-tile,amx-int8")
namespace avx512vbmi {
namespace amx {
#include "amx_prepare.h"
#include "amx.h"
}  // namespace amx
}  // namespace avx512vbmi
BWLA_TARGET_END
#endif

#endif

// What a variant offers.
struct Variant {
    void (*run)(const Call&, const Plan&, Team&);
    void (*run_head)(const HeadCall&, const HeadPlan&, Team&);
    void (*run_signs)(const SignStep&, const SignScratch&, Team&);
    void (*run_experts)(const ExpertsCall&, const ExpertsPlan&, Team&);
    int lanes;
};

static Variant variant(int32_t isa) {
    switch (isa) {
#if BWLA_X86
        case kAvx2: return {avx2::run, avx2::run_head, avx2::run_signs, avx2::run_experts, avx2::kLanes};
        case kAvx512bw: return {avx512bw::run, avx512bw::run_head, avx512bw::run_signs, avx512bw::run_experts, avx512bw::kLanes};
        case kAvx512vbmi: return {avx512vbmi::run, avx512vbmi::run_head, avx512vbmi::run_signs, avx512vbmi::run_experts, avx512vbmi::kLanes};
#if BWLA_AMX
        case kAmx:
            return {avx512vbmi::amx::run, avx512vbmi::run_head, avx512vbmi::run_signs, avx512vbmi::run_experts, avx512vbmi::kLanes};
#endif
#endif
        default: return {scalar::run, scalar::run_head, scalar::run_signs, scalar::run_experts, scalar::kLanes};
    }
}

enum Status : int32_t { kOk = 0, kBadArgument = 1, kNoMemory = 2, kUnsupportedIsa = 3 };

struct RunBody {
    const Call& call;
    const Plan& plan;
    Variant isa;
    void operator()(Team& team) const { isa.run(call, plan, team); }
};

struct HeadBody {
    const HeadCall& call;
    const HeadPlan& plan;
    Variant isa;
    void operator()(Team& team) const { isa.run_head(call, plan, team); }
};

struct SignBody {
    const SignStep& step;
    const SignScratch& scratch;
    Variant isa;
    void operator()(Team& team) const { isa.run_signs(step, scratch, team); }
};

struct PackBody {
    const Tensors& tensors;
    const Sizes& sizes;
    Order order;
    uint8_t* packed;
    void operator()(Team& team) const {
        if (team.id == 0) pack_input_side(tensors, sizes, packed);
        const int64_t begin = sizes.panels() * team.id / team.size,
                      end = sizes.panels() * (team.id + 1) / team.size;
        for (int64_t panel = begin; panel < end; ++panel) pack_panel(tensors, sizes, order, panel, packed);
    }
};

struct UnpackBody {
    const uint8_t* packed;
    const Sizes& sizes;
    Order order;
    int64_t first, panels;
    float* weight;
    void operator()(Team& team) const {
        const int64_t begin = panels * team.id / team.size, end = panels * (team.id + 1) / team.size;
        for (int64_t panel = begin; panel < end; ++panel) {
            unpack_panel(packed, sizes, order, first + panel, weight + panel * kRows * sizes.k());
        }
    }
};

}  // namespace bwla

// The plain C interface. Functions return 0, or 1: sizes or arguments that make no sense, 2: out of memory,
// 3: an instruction set that this processor lacks. dtype: 0 bfloat16, 1 float16, 2 float32. threads: at most
// so many, fewer where more would not pay; negative: exactly so many (for tests).

#define BWLA_API extern "C" __attribute__((visibility("default")))

// What stays the same from call to call.
struct bwla_layer {
    int32_t isa;  // 0 scalar, 1 AVX2, 2 AVX-512BW, 3 AVX-512 VBMI + VNNI, 4 AMX
    int32_t bits;
    int64_t n, blocks, n1, n2, rank, planes;
    double clip;
    int64_t grouped;
};

static bwla::Sizes sizes_of(const bwla_layer& layer) {
    return {layer.n, layer.blocks, layer.n1, layer.n2, layer.rank, layer.planes, layer.grouped != 0};
}

static bwla::Order order_of(const bwla_layer& layer) {
    const bool row_major = layer.isa == bwla::kAvx512vbmi || layer.isa == bwla::kAmx;
    return row_major ? bwla::Order::kRowMajor : bwla::Order::kByteMajor;
}

static bwla::Call call_of(const bwla_layer& layer, const uint8_t* packed, int64_t m) {
    bwla::Call c{};
    c.packed = packed, c.z = sizes_of(layer), c.m = m, c.bits = layer.bits, c.clip = layer.clip;
    return c;
}

static int32_t execute(const bwla_layer& layer, const bwla::Call& c, int32_t threads) {
    if (!bwla::supported().has(layer.isa)) return bwla::kUnsupportedIsa;
    if (!c.z.valid() || c.m < 0 || c.bits < 2 || c.bits > 8) return bwla::kBadArgument;
    if (c.m == 0) return bwla::kOk;
    bwla::Plan plan = bwla::make_plan(c, threads, layer.isa == bwla::kAmx);
    char* base = bwla::workspace().reserve(bwla::place(c, plan, bwla::Arena{nullptr, 0}));
    if (!base) return bwla::kNoMemory;
    bwla::place(c, plan, bwla::Arena{base, 0});
    bwla::RunBody body{c, plan, bwla::variant(layer.isa)};
    bwla::run_parallel(plan.threads, body);
    return bwla::kOk;
}

// Identifies the source that this library was compiled from.
#ifndef BWLA_BUILD_ID
#define BWLA_BUILD_ID "unknown"
#endif
BWLA_API const char* bwla_build_id() { return BWLA_BUILD_ID; }

// The fastest instruction set that this processor can run.
BWLA_API int32_t bwla_best_isa() {
    int32_t isa = bwla::kIsaCount - 1;
    while (!bwla::supported().has(isa)) --isa;
    return isa;
}

BWLA_API int32_t bwla_isa_supported(int32_t isa) { return bwla::supported().has(isa); }

// Why the AMX variant is not offered; empty if it is.
BWLA_API const char* bwla_no_amx() { return bwla::supported().no_amx; }

// Hands over an OpenMP runtime: GOMP_parallel, GOMP_barrier, omp_get_thread_num, omp_get_num_threads.
BWLA_API void bwla_set_openmp(void* parallel, void* barrier, void* thread_num, void* num_threads) {
    bwla::OpenMP& runtime = bwla::openmp();
    runtime.parallel = reinterpret_cast<decltype(runtime.parallel)>(parallel);
    runtime.barrier = reinterpret_cast<decltype(runtime.barrier)>(barrier);
    runtime.thread_num = reinterpret_cast<decltype(runtime.thread_num)>(thread_num);
    runtime.num_threads = reinterpret_cast<decltype(runtime.num_threads)>(num_threads);
}

// Asks for huge pages under memory that was not touched yet.
BWLA_API void bwla_advise_huge_pages(void* data, int64_t size) {
    bwla::advise_huge_pages(data, std::size_t(size));
}

BWLA_API int64_t bwla_packed_bytes(const bwla_layer* layer) { return sizes_of(*layer).bytes(); }

// Repacks a layer's tensors (bwla::Tensors says which) for the layer's instruction set into
// bwla_packed_bytes.
BWLA_API int32_t bwla_pack(const bwla_layer* layer, const int32_t* words, const float* scale,
                           const uint16_t* low_rank_b, const float* left, const float* right,
                           const float* column_scale, const uint16_t* low_rank_a, uint8_t* packed,
                           int32_t threads) {
    const bwla::Sizes sizes = sizes_of(*layer);
    if (!sizes.valid() || (sizes.rank && !(low_rank_a && low_rank_b))) return bwla::kBadArgument;
    const bwla::Tensors tensors{words, scale, low_rank_b, left, right, column_scale, low_rank_a};
    bwla::PackBody body{tensors, sizes, order_of(*layer), packed};
    bwla::run_parallel(sizes.n * sizes.k() < (1 << 18) ? 1 : threads, body);
    return bwla::kOk;
}

// Dequantizes the rows of `panels` panels (64 rows each, the last one of a layer may have fewer) from panel `first`
// on, in the rotated basis and without the low-rank part: weight float32 [rows, k].
BWLA_API int32_t bwla_unpack(const bwla_layer* layer, const uint8_t* packed, int64_t first, int64_t panels,
                             float* weight, int32_t threads) {
    const bwla::Sizes sizes = sizes_of(*layer);
    if (!sizes.valid() || first < 0 || panels < 0 || first + panels > sizes.panels()) return bwla::kBadArgument;
    bwla::UnpackBody body{packed, sizes, order_of(*layer), first, panels, weight};
    bwla::run_parallel(panels * bwla::kRows * sizes.k() < (1 << 18) ? 1 : threads, body);
    return bwla::kOk;
}

// The whole layer: x [m, k], rows x_stride elements apart -> out [m, n] of the same dtype. bias [n] may be
// null.
BWLA_API int32_t bwla_linear(const bwla_layer* layer, const uint8_t* packed, const void* x, int64_t m,
                             int64_t x_stride, int32_t dtype, const void* bias, int32_t bias_dtype, void* out,
                             int32_t threads) {
    bwla::Call c = call_of(*layer, packed, m);
    c.x = x, c.x_stride = x_stride, c.x_dtype = dtype;
    c.bias = bias, c.bias_dtype = bias_dtype;
    c.out = out, c.out_dtype = dtype;
    return execute(*layer, c, threads);
}

// Only the input transform: x -> codes q [m, k], scale float32 [m, blocks], u float32 [m, rank].
BWLA_API int32_t bwla_prepare_input(const bwla_layer* layer, const uint8_t* packed, const void* x, int64_t m,
                                    int64_t x_stride, int32_t dtype, int8_t* q, float* scale, float* u,
                                    int32_t threads) {
    bwla::Call c = call_of(*layer, packed, m);
    c.x = x, c.x_stride = x_stride, c.x_dtype = dtype;
    c.q = q, c.scale = scale, c.u = u;
    return execute(*layer, c, threads);
}

// Only the GEMM, without the bias, from codes that fit the layer's bits: q, scale, u -> out [m, n].
BWLA_API int32_t bwla_binary_matmul(const bwla_layer* layer, const uint8_t* packed, const int8_t* q,
                                    const float* scale, const float* u, int64_t m, void* out, int32_t dtype,
                                    int32_t threads) {
    bwla::Call c = call_of(*layer, packed, m);
    c.q = const_cast<int8_t*>(q), c.scale = const_cast<float*>(scale), c.u = const_cast<float*>(u);
    c.out = out, c.out_dtype = dtype;
    return execute(*layer, c, threads);
}

// Only the integer dot products of that, sums int32 [m, blocks, planes, n].
BWLA_API int32_t bwla_dot_products(const bwla_layer* layer, const uint8_t* packed, const int8_t* q, int64_t m,
                                   int32_t* sums, int32_t threads) {
    bwla::Call c = call_of(*layer, packed, m);
    c.q = const_cast<int8_t*>(q), c.sums = sums;
    return execute(*layer, c, threads);
}

// The 8-bit head: x [m, k], rows x_stride elements apart -> out [m, n] of the same dtype. weight int8 [n, k],
// scale float32 [n], row_sum int32 [n]: the sum of each row of weight.
BWLA_API int32_t bwla_head(int32_t isa, const int8_t* weight, const float* scale, const int32_t* row_sum,
                           int64_t n, int64_t k, const void* x, int64_t m, int64_t x_stride, int32_t dtype,
                           void* out, int32_t threads) {
    if (!bwla::supported().has(isa)) return bwla::kUnsupportedIsa;
    if (n < 1 || k < 1 || k > 65536 || m < 0) return bwla::kBadArgument;
    if (m == 0) return bwla::kOk;
    const bwla::HeadCall c{weight, scale, row_sum, n, k, m, x, x_stride, dtype, out};
    const bool alone = threads >= 0 && n * k * m / 32 < bwla::kSerialCost;
    threads = alone || threads == 0 ? 1 : threads < 0 ? -threads : threads;
    bwla::Arena measure{nullptr, 0};
    bwla::place_head(c, threads, measure);
    char* base = bwla::workspace().reserve(measure.used);
    if (!base) return bwla::kNoMemory;
    bwla::Arena arena{base, 0};
    const bwla::HeadPlan plan = bwla::place_head(c, threads, arena);
    std::memset(plan.shares, 0, std::size_t(threads) * sizeof(bwla::Share));
    bwla::HeadBody body{c, plan, bwla::variant(isa)};
    bwla::run_parallel(threads, body);
    return bwla::kOk;
}

// A step of the sign search, see bwla::SignStep: a sweep of coordinate descent where `change` is given, else error
// feedback in a block. The number of columns is a multiple of 32. planes: 0 for binary weights,
// else 2 to 4.
BWLA_API int32_t bwla_sign_step(int32_t isa, const float* target, float* product, const float* matrix,
                                const float* pivots, const float* scale, float* sign, float* change, float* dots,
                                float* norms, int64_t columns, int64_t candidates, int64_t n, int64_t planes,
                                int32_t threads) {
    if (!bwla::supported().has(isa)) return bwla::kUnsupportedIsa;
    if (planes && (planes < 2 || planes > bwla::kMaxPlanes)) return bwla::kBadArgument;
    if (columns < 1 || columns > (change ? bwla::kMostColumns : bwla::kMaxBlock)) return bwla::kBadArgument;
    if (columns % bwla::kColumns || n < 1 || candidates < 1) return bwla::kBadArgument;
    const bwla::SignStep step{target, product, matrix, pivots,  scale,      sign, change,
                              dots,   norms,   columns, candidates, n, planes};
    const bwla::Variant variant = bwla::variant(isa);
    threads = threads < 1 ? 1 : threads;
    bwla::Arena measure{nullptr, 0};
    bwla::place_signs(step, variant.lanes, threads, measure);
    char* base = bwla::workspace().reserve(measure.used);
    if (!base) return bwla::kNoMemory;
    bwla::Arena arena{base, 0};
    const bwla::SignScratch scratch = bwla::place_signs(step, variant.lanes, threads, arena);
    std::memset(static_cast<void*>(scratch.shares), 0, std::size_t(threads) * sizeof(bwla::Share));
    bwla::SignBody body{step, scratch, variant};
    bwla::run_parallel(threads, body);
    return bwla::kOk;
}

#include "experts_api.h"

// Registers this library's torch ops; `torch` is a handle of libtorch_cpu. Returns null, or what was not found.
#include "torch_ops.h"
BWLA_API const char* bwla_register_ops(void* torch, int32_t isa) { return bwla::register_ops(torch, isa); }
