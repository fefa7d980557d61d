// The ops bwla::linear_cpu, bwla::head_cpu and bwla::experts_cpu, registered with torch from here. A decoding step calls them a hundred
// times and more with cold caches; Python between torch and the kernel would then cost as much as a small layer.
//
// No torch headers and no link: torch's C interface for extensions, which is stable over releases
// (torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable), is looked up by name in the library that the
// process has loaded. An op gets its arguments as an array of 64-bit values, owns the tensors among them, and
// leaves its results in the same array; it reports failure by a std::runtime_error.
#pragma once

#include <dlfcn.h>

#include <optional>
#include <stdexcept>
#include <string>

#if defined(__GLIBC__) && defined(__x86_64__)
// glibc 2.34 moved dlsym and gave it a new version. Nothing else here is newer than 2.14: with the old one, a wheel
// that is built on a new system loads on an old one.
__asm__(".symver dlsym, dlsym@GLIBC_2.2.5");
#endif

namespace bwla {

typedef void* TensorHandle;
typedef uint64_t Value;

struct TorchApi {
    int32_t (*library_init_impl)(const char* ns, const char* key, const char* file, uint32_t line, void** library);
    int32_t (*library_impl)(void* library, const char* name, void (*op)(Value*, uint64_t, uint64_t));
    int32_t (*delete_tensor)(TensorHandle);
    int32_t (*get_data_ptr)(TensorHandle, void**);
    int32_t (*get_dim)(TensorHandle, int64_t*);
    int32_t (*get_sizes)(TensorHandle, int64_t**);
    int32_t (*get_strides)(TensorHandle, int64_t**);
    int32_t (*get_dtype)(TensorHandle, int32_t*);
    int32_t (*empty_strided)(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                             int32_t device_type, int32_t device_index, TensorHandle*);
    int32_t (*copy)(TensorHandle to, TensorHandle from, int32_t non_blocking);
    int32_t (*get_num_threads)(uint32_t*);
    int32_t (*delete_value)(Value*);
    int32_t cpu, bfloat16, float16, float32, uint8, int8, int32, int64;  // torch's numbers
    int32_t isa;
};

inline TorchApi& torch_api() {
    static TorchApi api{};
    return api;
}

inline void must(int32_t status) {
    if (status) throw std::runtime_error("bwla: a call into torch failed");
}

inline void expect(bool holds, const char* what) {
    if (!holds) throw std::runtime_error(std::string("bwla: the CPU kernel expected ") + what);
}

// An owned tensor.
class Tensor {
public:
    explicit Tensor(TensorHandle handle) : handle_(handle) {
        const TorchApi& api = torch_api();
        must(api.get_data_ptr(handle, &data));
        must(api.get_dim(handle, &dim));
        must(api.get_sizes(handle, &sizes));
        must(api.get_strides(handle, &strides));
        must(api.get_dtype(handle, &dtype));
    }
    explicit Tensor(Value value) : Tensor(reinterpret_cast<TensorHandle>(value)) {}
    Tensor(Tensor&& other) noexcept
        : data(other.data), dim(other.dim), sizes(other.sizes), strides(other.strides), dtype(other.dtype),
          handle_(other.handle_) {
        other.handle_ = nullptr;
    }
    Tensor& operator=(Tensor&&) = delete;
    ~Tensor() {
        if (handle_) torch_api().delete_tensor(handle_);
    }

    TensorHandle handle() const { return handle_; }
    Value release() {
        const Value value = reinterpret_cast<Value>(handle_);
        handle_ = nullptr;
        return value;
    }
    int64_t numel() const {
        int64_t count = 1;
        for (int64_t i = 0; i < dim; ++i) count *= sizes[i];
        return count;
    }
    // Strides of axes of length 1 mean nothing.
    bool contiguous() const {
        int64_t stride = 1;
        for (int64_t i = dim; i-- > 0;) {
            if (sizes[i] != 1 && strides[i] != stride) return false;
            stride *= sizes[i];
        }
        return true;
    }
    // The library's number of a float type, -1 for others.
    int32_t float_type() const {
        const TorchApi& api = torch_api();
        return dtype == api.bfloat16 ? kBFloat16 : dtype == api.float16 ? kFloat16 : dtype == api.float32 ? kFloat32 : -1;
    }

    void* data = nullptr;
    int64_t dim = 0;
    int64_t* sizes = nullptr;
    int64_t* strides = nullptr;
    int32_t dtype = 0;

private:
    TensorHandle handle_;
};

constexpr int64_t kMaxAxes = 16;

// Uninitialised, contiguous, of the sizes and dtype of `like` with a last axis of `width`.
inline TensorHandle empty_like(const Tensor& like, int64_t width) {
    int64_t sizes[kMaxAxes], strides[kMaxAxes], stride = 1;
    for (int64_t i = like.dim; i-- > 0; stride *= sizes[i]) {
        sizes[i] = i == like.dim - 1 ? width : like.sizes[i];
        strides[i] = stride;
    }
    TensorHandle made = nullptr;
    must(torch_api().empty_strided(like.dim, sizes, strides, like.dtype, torch_api().cpu, 0, &made));
    return made;
}

// The input of an op as m rows of k, `stride` elements apart.
struct Rows {
    Tensor x;
    std::optional<Tensor> copy;  // where no one stride reaches the rows of x
    int64_t m = 0, stride = 0;
    int32_t type = -1;

    Rows(Value value, int64_t k) : x(value) {
        type = x.float_type();
        expect(type >= 0, "x in bfloat16, float16 or float32");
        expect(x.dim >= 1 && x.dim <= kMaxAxes && x.sizes[x.dim - 1] == k, "x of the layer's input width");
        m = x.numel() / k, stride = k;
        if (x.contiguous()) return;
        if (x.dim == 2 && x.strides[1] == 1) {
            stride = x.strides[0];
        } else {
            copy.emplace(empty_like(x, k));
            must(torch_api().copy(copy->handle(), x.handle(), 0));
        }
    }
    const void* data() const { return copy ? copy->data : x.data; }
};

inline int32_t torch_threads() {
    uint32_t threads = 1;
    must(torch_api().get_num_threads(&threads));
    return int32_t(threads);
}

template <class T>
T from_value(Value value) {
    T result;
    std::memcpy(&result, &value, sizeof(result));
    return result;
}

inline std::optional<Tensor> optional_tensor(Value value) {
    std::optional<Tensor> tensor;
    if (Value* boxed = reinterpret_cast<Value*>(value)) {
        const Value inner = *boxed;
        torch_api().delete_value ? void(torch_api().delete_value(boxed)) : delete boxed;
        tensor.emplace(inner);
    }
    return tensor;
}

inline void check_status(int32_t status) {
    if (status) throw std::runtime_error("bwla: the CPU kernel failed with status " + std::to_string(status));
}

// linear_cpu(Tensor x, Tensor packed, Tensor? bias, int out_features, int rotation_groups, int n1, int n2,
//            int rank, int bits, float clip, int planes, bool grouped) -> Tensor
inline void linear_op(Value* stack, uint64_t, uint64_t) {
    const Tensor packed(stack[1]);
    const std::optional<Tensor> bias = optional_tensor(stack[2]);
    const bwla_layer layer{torch_api().isa,         int32_t(stack[8]),      int64_t(stack[3]),
                           int64_t(stack[4]),       int64_t(stack[5]),      int64_t(stack[6]),
                           int64_t(stack[7]),       int64_t(stack[10]),     from_value<double>(stack[9]), from_value<bool>(stack[11])};
    const Rows rows(stack[0], layer.blocks * layer.n1 * layer.n2);
    expect(packed.dtype == torch_api().uint8 && packed.contiguous() && packed.numel() == bwla_packed_bytes(&layer),
           "packed weights of this layer: pack it with the same sizes");
    expect(!bias || (bias->float_type() >= 0 && bias->contiguous() && bias->numel() == layer.n),
           "a contiguous bias of the layer's output width in bfloat16, float16 or float32");
    Tensor out(empty_like(rows.x, layer.n));
    check_status(bwla_linear(&layer, static_cast<const uint8_t*>(packed.data), rows.data(), rows.m, rows.stride,
                             rows.type, bias ? bias->data : nullptr, bias ? bias->float_type() : 0, out.data,
                             torch_threads()));
    stack[0] = out.release();
}

// head_cpu(Tensor x, Tensor weight_int8, Tensor weight_scale, Tensor row_sum) -> Tensor
inline void head_op(Value* stack, uint64_t, uint64_t) {
    const TorchApi& api = torch_api();
    const Tensor weight(stack[1]), scale(stack[2]), row_sum(stack[3]);
    expect(weight.dim == 2 && weight.dtype == api.int8 && weight.contiguous(), "contiguous weight_int8 [V, K]");
    const int64_t n = weight.sizes[0], k = weight.sizes[1];
    expect(scale.dtype == api.float32 && scale.contiguous() && scale.numel() == n, "weight_scale float32 [V]");
    expect(row_sum.dtype == api.int32 && row_sum.contiguous() && row_sum.numel() == n, "row_sum int32 [V]");
    const Rows rows(stack[0], k);
    Tensor out(empty_like(rows.x, n));
    check_status(bwla_head(api.isa, static_cast<const int8_t*>(weight.data), static_cast<const float*>(scale.data),
                           static_cast<const int32_t*>(row_sum.data), n, k, rows.data(), rows.m, rows.stride, rows.type,
                           out.data, torch_threads()));
    stack[0] = out.release();
}

// A projection of experts_cpu: rotation_groups, n1, n2, rank, bits, clip and planes from `at` on.
inline bwla_layer projection(const Value* at, int64_t rows) {
    return {torch_api().isa, int32_t(at[4]), rows,           int64_t(at[0]),          int64_t(at[1]),
            int64_t(at[2]),  int64_t(at[3]), int64_t(at[6]), from_value<double>(at[5]), 0};
}

// experts_cpu(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor packed_gate_up, Tensor packed_down,
//             Tensor? bias_gate_up, Tensor? bias_down, int experts, int activation, float limit, float alpha,
//             <a projection, gate_up>, <a projection, down>) -> Tensor
inline void experts_op(Value* stack, uint64_t, uint64_t) {
    const TorchApi& api = torch_api();
    const Tensor weights(stack[1]), ids(stack[2]), packed_gate_up(stack[3]), packed_down(stack[4]);
    const std::optional<Tensor> bias_gate_up = optional_tensor(stack[5]), bias_down = optional_tensor(stack[6]);
    const int64_t experts = int64_t(stack[7]);
    bwla_layer gate_up = projection(stack + 11, 1), down = projection(stack + 18, 1);
    gate_up.n = down.blocks * down.n1 * down.n2, down.n = gate_up.blocks * gate_up.n1 * gate_up.n2;
    const Rows rows(stack[0], down.n);
    const auto fits = [&](const Tensor& packed, const bwla_layer& layer, int64_t parts) {
        return packed.dtype == api.uint8 && packed.contiguous() && packed.numel() == bwla_experts_bytes(&layer, parts);
    };
    expect(fits(packed_gate_up, gate_up, 2 * experts) && fits(packed_down, down, experts),
           "packed experts of this layer: pack them with the same sizes");
    const auto bias_fits = [&](const std::optional<Tensor>& bias, int64_t numel) {
        return !bias || (bias->dtype == api.bfloat16 && bias->contiguous() && bias->numel() == numel);
    };
    expect(bias_fits(bias_gate_up, 2 * experts * round_up(gate_up.n, kRows)) && bias_fits(bias_down, experts * down.n),
           "contiguous biases of these experts in bfloat16, as they are packed");
    expect(ids.dim == 2 && ids.sizes[0] == rows.m && ids.contiguous() && (ids.dtype == api.int32 || ids.dtype == api.int64),
           "contiguous topk_ids [M, top-k] in int32 or int64");
    expect(weights.dim == 2 && weights.sizes[0] == rows.m && weights.sizes[1] == ids.sizes[1] && weights.contiguous() &&
               weights.dtype == api.float32,
           "contiguous topk_weights [M, top-k] in float32");
    Tensor out(empty_like(rows.x, down.n));
    const int32_t status = bwla_experts(
        &gate_up, &down, experts, int32_t(stack[8]), from_value<double>(stack[9]), from_value<double>(stack[10]),
        static_cast<const uint8_t*>(packed_gate_up.data), static_cast<const uint8_t*>(packed_down.data),
        bias_gate_up ? bias_gate_up->data : nullptr, bias_down ? bias_down->data : nullptr, rows.data(), rows.m,
        rows.stride, rows.type, static_cast<const float*>(weights.data), ids.data, ids.dtype == api.int64 ? 8 : 4,
        ids.sizes[1], out.data, torch_threads());
    expect(status != kBadArgument, "topk_ids below the number of experts");
    check_status(status);
    stack[0] = out.release();
}

template <class Function>
bool find(void* torch, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(torch, name));
    return function != nullptr;
}

inline bool find_number(void* torch, const char* name, int32_t& number) {
    int32_t (*function)() = nullptr;
    if (!find(torch, name, function)) return false;
    number = function();
    return true;
}

// Looks up torch's interface in `torch`, a handle of dlopen, and registers the ops, whose schemas exist already.
// Returns null, or the name of what was not found.
inline const char* register_ops(void* torch, int32_t isa) {
    TorchApi& api = torch_api();
#define BWLA_FIND(member, name) if (!find(torch, name, api.member)) return name
    BWLA_FIND(library_init_impl, "aoti_torch_library_init_impl");
    BWLA_FIND(library_impl, "aoti_torch_library_impl");
    BWLA_FIND(delete_tensor, "aoti_torch_delete_tensor_object");
    BWLA_FIND(get_data_ptr, "aoti_torch_get_data_ptr");
    BWLA_FIND(get_dim, "aoti_torch_get_dim");
    BWLA_FIND(get_sizes, "aoti_torch_get_sizes");
    BWLA_FIND(get_strides, "aoti_torch_get_strides");
    BWLA_FIND(get_dtype, "aoti_torch_get_dtype");
    BWLA_FIND(empty_strided, "aoti_torch_empty_strided");
    BWLA_FIND(copy, "aoti_torch_copy_");
    BWLA_FIND(get_num_threads, "torch_get_num_threads");
#undef BWLA_FIND
    find(torch, "torch_delete_stable_ivalue", api.delete_value);  // from 2.13; before, `delete` was asked for
#define BWLA_FIND(member, name) if (!find_number(torch, name, api.member)) return name
    BWLA_FIND(cpu, "aoti_torch_device_type_cpu");
    BWLA_FIND(bfloat16, "aoti_torch_dtype_bfloat16");
    BWLA_FIND(float16, "aoti_torch_dtype_float16");
    BWLA_FIND(float32, "aoti_torch_dtype_float32");
    BWLA_FIND(uint8, "aoti_torch_dtype_uint8");
    BWLA_FIND(int8, "aoti_torch_dtype_int8");
    BWLA_FIND(int32, "aoti_torch_dtype_int32");
    BWLA_FIND(int64, "aoti_torch_dtype_int64");
#undef BWLA_FIND
    api.isa = isa;
    void* library = nullptr;  // kept for the life of the process: to delete it would take the ops away
    if (api.library_init_impl("bwla", "CPU", __FILE__, __LINE__, &library) ||
        api.library_impl(library, "linear_cpu", linear_op) || api.library_impl(library, "head_cpu", head_op) ||
        api.library_impl(library, "experts_cpu", experts_op)) {
        return "the schemas of bwla::linear_cpu, bwla::head_cpu and bwla::experts_cpu";
    }
    return nullptr;
}

}  // namespace bwla
