// The variants, and which of them this processor and this system run.
#pragma once

#include <cerrno>
#include <cstdint>
#include <cstdio>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#define BWLA_X86 1
#if defined(__has_include)
#if defined(__linux__) && (__has_include(<amxint8intrin.h>) || __has_include(<amxintrin.h>))
#define BWLA_AMX 1  // headers of GCC and clang, from version 11 on
#endif
#endif
#endif

#if BWLA_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bwla {

enum Isa : int32_t { kScalar = 0, kAvx2 = 1, kAvx512bw = 2, kAvx512vbmi = 3, kAmx = 4, kIsaCount = 5 };

struct Supported {
    uint32_t variants = 1u << kScalar;            // one bit for each Isa
    char no_amx[96] = "this processor lacks it";  // why AMX is not among them; empty if it is

    bool has(int32_t isa) const { return isa >= 0 && isa < kIsaCount && (variants >> isa & 1u); }
};

#if BWLA_X86

// Asks Linux for the AMX registers. A process has to ask once, because they add 8 KiB to the state of every
// thread that uses them; old kernels and some sandboxes refuse.
static bool allow_amx(Supported& found) {
#if BWLA_AMX
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    if (syscall(SYS_arch_prctl, kRequest, kTileData) == 0) return true;
    std::snprintf(found.no_amx, sizeof(found.no_amx),
                  "the system refused its registers: arch_prctl, error %d", errno);
#else
    std::snprintf(found.no_amx, sizeof(found.no_amx),
                  "the compiler or system that it was built with does not know it");
#endif
    return false;
}

// CPUID itself rather than the compiler's wrapper of it, which not every compiler's runtime fills in.
static Supported find_supported() {
    Supported found;
    unsigned a = 0, b = 0, c1 = 0, d = 0, b7 = 0, c7 = 0, d7 = 0, saved = 0;
    if (!__get_cpuid(1, &a, &b, &c1, &d) || !__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return found;
    const auto has = [](unsigned word, unsigned bit) { return (word >> bit & 1u) != 0; };
    if (has(c1, 27))
        __asm__ volatile("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));  // registers that the system saves
    const bool avx2 =
        (saved & 0x06u) == 0x06u && has(c1, 12) && has(c1, 29) && has(b7, 5);  // FMA, F16C, AVX2
    const bool avx512bw =
        avx2 && (saved & 0xE6u) == 0xE6u && has(b7, 16) && has(b7, 17) && has(b7, 30) && has(b7, 31);
    const bool vbmi = avx512bw && has(c7, 1) && has(c7, 11);             // VBMI, VNNI; before: F, DQ, BW, VL
    bool amx = vbmi && has(d7, 24) && has(d7, 25);                       // AMX-TILE, AMX-INT8
    amx = amx && __get_cpuid_count(7, 1, &a, &b, &c7, &d) && has(a, 5);  // AVX512_BF16
    if (amx && (saved & 0x60000u) != 0x60000u) {
        amx = false;
        std::snprintf(found.no_amx, sizeof(found.no_amx), "the system does not save its registers");
    }
    amx = amx && allow_amx(found);
    if (amx) found.no_amx[0] = 0;
    found.variants |= uint32_t(avx2) << kAvx2 | uint32_t(avx512bw) << kAvx512bw |
                      uint32_t(vbmi) << kAvx512vbmi | uint32_t(amx) << kAmx;
    return found;
}

#else

static Supported find_supported() { return {}; }

#endif

static const Supported& supported() {
    static const Supported found = find_supported();  // once: in a virtual machine each question is slow
    return found;
}

}  // namespace bwla
