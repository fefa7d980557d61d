// The C interface of the experts of a layer. A projection is described by a bwla_layer whose n is the rows of one part
// (experts_call.h): of the gate or of up, or of down.

namespace bwla {

struct ExpertsBody {
    const ExpertsCall& call;
    const ExpertsPlan& plan;
    Variant isa;
    void operator()(Team& team) const { isa.run_experts(call, plan, team); }
};

struct PackPartsBody {
    const Tensors& tensors;
    const Sizes& sizes;
    Order order;
    int64_t parts;
    uint8_t* packed;
    void operator()(Team& team) const {
        if (team.id == 0) pack_input_side(tensors, sizes, packed);
        const int64_t panels = sizes.panels(), all = parts * panels, rows = sizes.n * sizes.planes;
        for (int64_t i = all * team.id / team.size; i < all * (team.id + 1) / team.size; ++i) {
            const int64_t part = i / panels;
            Tensors from = tensors;
            from.words += part * rows * (sizes.k() / kColumns);
            from.scale += part * rows;
            if (sizes.rank) from.low_rank_b += part * sizes.n * sizes.rank;
            pack_panel(from, sizes, order, i % panels, packed + part * panels * sizes.panel_bytes());
        }
    }
};

inline int64_t parts_bytes(const Sizes& sizes, int64_t parts) {
    return sizes.panels_at() + parts * sizes.panels() * sizes.panel_bytes();
}

// Tokens that are computed at a time: their pairs are sorted, and everything between has its place in the workspace.
template <class Id>
int32_t execute_experts(ExpertsCall c, const Id* ids, int32_t isa, int32_t threads) {
    static thread_local Routing routing;
    if (!sort_by_expert(ids, c.m() * c.top_k, c.experts, routing)) return kBadArgument;
    c.down.m = int64_t(routing.pair.size());
    ExpertsPlan plan = make_experts_plan(c, threads, routing);
    char* base = workspace().reserve(place_experts(c, plan, Arena{nullptr, 0}));
    if (!base) return kNoMemory;
    place_experts(c, plan, Arena{base, 0});
    ExpertsBody body{c, plan, variant(isa)};
    run_parallel(plan.threads, body);
    return kOk;
}

template <class Id>
int32_t execute_batches(const ExpertsCall& c, const Id* ids, int32_t isa, int32_t threads) {
    const int64_t batch = experts_batch(c), item = c.out_dtype == kFloat32 ? 4 : 2;
    for (int64_t first = 0; first < c.m(); first += batch) {
        ExpertsCall part = c;
        part.gate_up.m = c.m() - first < batch ? c.m() - first : batch;
        part.gate_up.x = static_cast<const char*>(c.gate_up.x) + first * c.gate_up.x_stride * item;
        part.weights += first * c.top_k;
        part.out = static_cast<char*>(c.out) + first * c.width() * item;
        const int32_t status = execute_experts(part, ids + first * c.top_k, isa, threads);
        if (status) return status;
    }
    return kOk;
}

}  // namespace bwla

// A packed projection of `parts` parts.
BWLA_API int64_t bwla_experts_bytes(const bwla_layer* layer, int64_t parts) {
    return bwla::parts_bytes(sizes_of(*layer), parts);
}

// Repacks the stacked tensors of a projection, whose parts lie one after another, as bwla_pack does for a layer.
BWLA_API int32_t bwla_pack_experts(const bwla_layer* layer, int64_t parts, const int32_t* words, const float* scale,
                                   const uint16_t* low_rank_b, const float* left, const float* right,
                                   const float* column_scale, const uint16_t* low_rank_a, uint8_t* packed,
                                   int32_t threads) {
    const bwla::Sizes sizes = sizes_of(*layer);
    if (!sizes.valid() || parts < 1 || (sizes.rank && !(low_rank_a && low_rank_b))) return bwla::kBadArgument;
    const bwla::Tensors tensors{words, scale, low_rank_b, left, right, column_scale, low_rank_a};
    bwla::PackPartsBody body{tensors, sizes, order_of(*layer), parts, packed};
    bwla::run_parallel(parts * sizes.n * sizes.k() < (1 << 18) ? 1 : threads, body);
    return bwla::kOk;
}

// The experts: x [m, k], rows x_stride elements apart -> out [m, k] of the same dtype. weights float32 [m, top_k]; ids
// [m, top_k] of id_bytes 4 or 8, negative where an expert adds nothing. Biases are null or as in ExpertsCall. Returns 1
// if an id is not below `experts`.
BWLA_API int32_t bwla_experts(const bwla_layer* gate_up, const bwla_layer* down, int64_t experts, int32_t activation,
                              double limit, double alpha, const uint8_t* packed_gate_up, const uint8_t* packed_down,
                              const void* bias_gate_up, const void* bias_down, const void* x, int64_t m,
                              int64_t x_stride, int32_t dtype, const float* weights, const void* ids, int32_t id_bytes,
                              int64_t top_k, void* out, int32_t threads) {
    bwla::ExpertsCall c{};
    c.gate_up = call_of(*gate_up, packed_gate_up, m), c.down = call_of(*down, packed_down, 0);
    c.gate_up.x = x, c.gate_up.x_stride = x_stride, c.gate_up.x_dtype = dtype;
    c.gate_up.bias = bias_gate_up, c.down.bias = bias_down;
    c.gate_up.bias_dtype = c.down.bias_dtype = bwla::kBFloat16;
    c.experts = experts, c.top_k = top_k, c.activation = activation, c.weights = weights;
    c.limit = float(limit), c.alpha = float(alpha);
    c.out = out, c.out_dtype = dtype;
    const auto valid = [](const bwla::Call& call) { return call.z.valid() && call.bits >= 2 && call.bits <= 8; };
    if (!bwla::supported().has(gate_up->isa) || gate_up->isa != down->isa) return bwla::kUnsupportedIsa;
    if (!valid(c.gate_up) || !valid(c.down) || m < 0 || experts < 1 || top_k < 1) return bwla::kBadArgument;
    if (c.gate_up.z.n != c.inner() || c.gate_up.z.k() != c.width() || m * top_k > INT32_MAX) return bwla::kBadArgument;
    if (activation < 0 || activation >= bwla::kActivationCount) return bwla::kBadArgument;
    try {
        if (id_bytes == 4) return execute_batches(c, static_cast<const int32_t*>(ids), gate_up->isa, threads);
        return execute_batches(c, static_cast<const int64_t*>(ids), gate_up->isa, threads);
    } catch (const std::bad_alloc&) {
        return bwla::kNoMemory;
    }
}
