// Threads: the OpenMP runtime that the process already has, the division of work, and a workspace.
//
// Linking an OpenMP runtime here would load a second one beside torch's, with a second pool of spinning
// threads. So none is linked: the loader hands over the entry points of torch's own runtime (GNU libgomp;
// LLVM's and Intel's export the same names), and the one parallel region of a layer is entered by calling
// them.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bwla {

constexpr std::size_t kHugePage = std::size_t(2) << 20;

struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
    void (*barrier)();
    int (*thread_num)();
    int (*num_threads)();
};

// Set once by the loader, before the first call; all null means: every call runs on its own thread.
inline OpenMP& openmp() {
    static OpenMP runtime{};
    return runtime;
}

struct Team {
    int id;
    int size;
    uint32_t stage = 1;  // stretches of work between barriers are counted, see Units

    void barrier() {
        ++stage;
        if (size > 1) openmp().barrier();
    }
};

// Runs body(Team&) on up to `threads` threads; inside another region the runtime may give fewer.
template <class Body>
void run_parallel(int threads, Body& body) {
    if (threads <= 1 || !openmp().parallel) {
        Team alone{0, 1};
        body(alone);
        return;
    }
    openmp().parallel(
        [](void* data) {
            Team team{openmp().thread_num(), openmp().num_threads()};
            (*static_cast<Body*>(data))(team);
        },
        &body, unsigned(threads), 0);
}

// How `total` items are divided among a team: each member has one contiguous part, which it walks in units of
// `streams` items that lie far apart (so that memory is read in several sequential streams), and the rest one
// by one.
struct Split {
    int64_t total, size, streams;

    Split(int64_t items, const Team& team, int64_t interleaved = 1)
        : total(items), size(team.size), streams(interleaved) {}
    int64_t begin(int64_t member) const { return total * member / size; }
    int64_t gap(int64_t member) const { return (begin(member + 1) - begin(member)) / streams; }
    int64_t units(int64_t member) const {
        return gap(member) + (begin(member + 1) - begin(member)) % streams;
    }
};

// What is left of one member's part in one stage: units [front, back).
struct alignas(64) Share {
    std::atomic<uint64_t> state{0};  // stage 16 bits, front 24, back 24
};

// The units that a thread does in this stage: its own from the front, then what it can take from the back of
// others', so that a core which is slower, or busy with something else, does not hold up the rest. The stage
// number tells a share that its owner has not reached yet from an empty one. Zero-filled shares and one loop
// of Units a stage:
//     for (Units unit(shares, split, team); unit.next();) use(unit.owner, unit.index);
class Units {
public:
    int64_t owner;      // whose part the unit belongs to
    int64_t index = 0;  // of the unit in that part

    Units(Share* shares, const Split& split, const Team& team)
        : owner(team.id), shares_(shares), split_(split), team_(team) {}

    // The item, where units are single items.
    int64_t item() const { return split_.begin(owner) + index; }

    bool next() {
        if (++index < end_) return true;
        if (take(team_.id, true)) return true;
        for (int other = 1; other < team_.size; ++other) {
            if (take((team_.id + other) % team_.size, false)) return true;
        }
        return false;
    }

private:
    Share* shares_;
    Split split_;
    const Team& team_;
    int64_t end_ = 0;  // of the units in hand

    bool take(int member, bool own) {
        std::atomic<uint64_t>& state = shares_[member].state;
        const uint64_t tag = team_.stage & 0xFFFFu, whole = uint64_t(split_.units(member));
        uint64_t seen = state.load(std::memory_order_relaxed);
        for (;;) {
            const bool fresh = seen >> 48 != tag;
            uint64_t front = fresh ? 0 : seen >> 24 & 0xFFFFFFu, back = fresh ? whole : seen & 0xFFFFFFu;
            if (front >= back) return false;
            const uint64_t count = own ? 1 : (back - front + 1) / 2, at = own ? front : back - count;
            (own ? front : back) = own ? front + 1 : at;
            if (state.compare_exchange_weak(seen, tag << 48 | front << 24 | back,
                                            std::memory_order_relaxed)) {
                owner = member, index = int64_t(at), end_ = int64_t(at + count);
                return true;
            }
        }
    }
};

// Asks for huge pages under [data, data + size); only whole ones, so that no memory is wasted.
inline void advise_huge_pages(void* data, std::size_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const std::uintptr_t begin = (std::uintptr_t(data) + kHugePage - 1) & ~(kHugePage - 1);
    const std::uintptr_t end = (std::uintptr_t(data) + size) & ~(kHugePage - 1);
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)size;
#endif
}

// Memory of one calling thread, kept between calls: fresh pages for every call would cost more than a small
// layer.
class Workspace {
public:
    ~Workspace() { std::free(data_); }

    // At least `size` bytes, 64-byte aligned; the old content is lost. Null when memory is out.
    char* reserve(std::size_t size) {
        if (size <= size_) return data_;
        std::free(data_);
        const std::size_t page = size < kHugePage ? 4096 : kHugePage;
        size_ = (size + page - 1) / page * page;
        void* fresh = nullptr;
        if (posix_memalign(&fresh, page, size_) != 0) fresh = nullptr;
        data_ = static_cast<char*>(fresh);
        if (!data_) size_ = 0;
        if (data_) advise_huge_pages(data_, size_);
        return data_;
    }

private:
    char* data_ = nullptr;
    std::size_t size_ = 0;
};

inline Workspace& workspace() {
    static thread_local Workspace space;
    return space;
}

// Cuts a workspace into aligned arrays; with a null base it only adds up the size.
struct Arena {
    char* base;
    std::size_t used;

    template <class T>
    T* array(int64_t count) {
        T* at = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += (std::size_t(count) * sizeof(T) + 63) & ~std::size_t(63);
        return at;
    }
};

}  // namespace bwla
