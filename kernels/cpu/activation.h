// f(gate) * up of the experts, and gpt-oss's function of both. Products and sums are not fused, so that every variant computes the same values.

static inline V plus(V a, float b) { return add(a, set1(b)); }
static inline V times(V a, float b) { return mul(a, set1(b)); }

// exp(x), clamped to the range of normal floats, to about one unit in the last place (Cephes' expf).
static inline V exp_of(V x) {
    x = clamp(x, -87.0f, 88.0f);
    const V n = plus(plus(times(x, 1.44269504088896341f), 12582912.0f), -12582912.0f);  // rounded: 2^23 * 1.5 has no fraction
    const V r = add(add(x, times(n, -0.693359375f)), times(n, 2.12194440e-4f));
    V p = set1(1.9875691500e-4f);
    p = plus(mul(p, r), 1.3981999507e-3f);
    p = plus(mul(p, r), 8.3334519073e-3f);
    p = plus(mul(p, r), 4.1665795894e-2f);
    p = plus(mul(p, r), 1.6666665459e-1f);
    p = plus(mul(p, r), 5.0000001201e-1f);
    p = plus(add(mul(p, mul(r, r)), r), 1.0f);
    return mul(p, power_of_two(n));
}

// v / (1 + exp(-scaled)).
static inline V logistic_product(V v, V scaled) { return div(v, plus(exp_of(negate(scaled)), 1.0f)); }

static inline V gelu_of(V gate) {
    float lanes[kLanes];
    store(lanes, gate);
    for (float& g : lanes) g = 0.5f * g * (1.0f + __builtin_erff(g * 0.70710678118654752f));
    return load(lanes);
}

static NOINLINE void activate(const ExpertsCall& c, const float* gate, const float* up, int64_t n, float* to) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const int64_t left = n - i < kLanes ? n - i : kLanes;
        V g = load_n(gate + i, left), u = load_n(up + i, left), f;
        if (c.activation == kSilu) {
            f = logistic_product(g, g);
        } else if (c.activation == kGeluTanh) {  // 0.5 (1 + tanh(z)) = 1 / (1 + exp(-2 z))
            const V z = times(add(g, times(mul(g, mul(g, g)), 0.044715f)), 0.7978845608028654f);
            f = logistic_product(g, times(z, 2.0f));
        } else if (c.activation == kGelu) {
            f = gelu_of(g);
        } else {  // gpt-oss: the gate is limited from above, up on both sides
            g = clamp(g, -__builtin_inff(), c.limit);
            u = plus(clamp(u, -c.limit, c.limit), 1.0f);
            f = logistic_product(g, times(g, c.alpha));
        }
        store_n(to + i, mul(f, u), left);
    }
}
