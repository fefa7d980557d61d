"""Check on the GPU machine that the bundle's GPU code loads and computes; build_gpu_bundle.py packs it.

. TARGET/env.sh && python3 -m scripts.gpu_check      in the bundle's folder
"""

import ctypes
import sys
from pathlib import Path

import torch
import vllm
from torch import Tensor
from torch.nn import functional

from scripts.gpu_fatbin import elf_sections, fatbin_containers, usable

LARGEST_ERROR = 0.02


def load_all(root: Path, arch: int) -> int:
    """Load every fat binary with machine code for this GPU into the driver; return the number of failures."""
    driver, bad = ctypes.CDLL("libcuda.so.1"), 0
    for path in sorted(root.rglob("*.so")):
        data = path.read_bytes()
        counts = {"loaded": 0, "PTX only": 0, "for other GPUs": 0}
        for name, offset, size in elf_sections(data):
            if name != ".nv_fatbin":
                continue
            for start, end, entries in fatbin_containers(data, offset, size):
                code, ptx = usable(entries, arch)
                if not code:
                    counts["PTX only" if ptx else "for other GPUs"] += 1
                    continue
                module = ctypes.c_void_p()
                error = driver.cuModuleLoadData(ctypes.byref(module), data[start:end])
                if error:
                    bad += 1
                    print(f"{path}: the driver refused {start:#x}: error {error}")
                else:
                    counts["loaded"] += 1
                    driver.cuModuleUnload(module)
        if any(counts.values()):
            print(path.relative_to(root), counts)
    return bad


def compare(name: str, result: Tensor, expected: Tensor) -> int:
    """Return 1 if a result is wrong or NaN, else 0."""
    error = ((result.float() - expected).abs().max() / expected.abs().max()).item()
    print(f"{name}: largest difference {error:.1e} of the largest value")
    return int(not error < LARGEST_ERROR)


def compute() -> int:
    """Compare a few kernels with torch; return the number of wrong results."""
    from vllm.platforms import current_platform
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    current_platform.import_kernels()
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x, weight = draw(64, 1024), draw(1024)
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, 1e-6)
    bad = compare("rms_norm", out, functional.rms_norm(x.float(), (1024,), weight.float(), 1e-6))

    out = x.new_empty(64, 512)
    torch.ops._C.silu_and_mul(out, x)
    bad += compare("silu_and_mul", out, functional.silu(x[:, :512].float()) * x[:, 512:].float())

    # Two sequences of 100 and 156 tokens, 16 query heads and 8 key-value heads.
    q, k, v = draw(256, 16, 128), draw(256, 8, 128), draw(256, 8, 128)
    ends = torch.tensor([0, 100, 256], device="cuda", dtype=torch.int32)
    lengths = {"max_seqlen_q": 156, "max_seqlen_k": 156, "cu_seqlens_q": ends, "cu_seqlens_k": ends}
    attention = flash_attn_varlen_func(q, k, v, **lengths, causal=True, fa_version=3)
    parts = []
    for part in (slice(0, 100), slice(100, 256)):
        query, key, value = (t[part].float().transpose(0, 1)[None] for t in (q, k, v))
        parts.append(
            functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)[
                0
            ].transpose(0, 1)
        )
    return bad + compare("FlashAttention 3", attention, torch.cat(parts))


def main() -> int:
    """Run the checks; return 1 if one of them fails."""
    major, minor = torch.cuda.get_device_capability()
    torch.zeros(1, device="cuda")  # create the CUDA context
    failed = load_all(Path(vllm.__path__[0]), major * 10 + minor) + compute()
    print("FAILED" if failed else "ok", failed)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
