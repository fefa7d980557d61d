"""Contents of the vLLM bundle for an isolated GPU machine: pinned wheels, and the files that are left out."""

PYTHON = "3.12"
TORCH, TRITON = "2.11.0", "3.6.0"
"""Versions that the pinned vLLM was built for; the machine must have them."""

ARCH = 90
"""Hopper; DROP and NO_PTX are chosen for it."""

PACKAGES: dict[str, tuple[str, str]] = {
    "vllm": ("0.26.0", "adb1e4c9b46d0dfdb094121ae5aad670a42412dd813ed4e5db069ed6a15006de"),
    "annotated-types": ("0.8.0", "f072f4d804ea359e4eaf198b1af7a8b0943881a87f31bb764f8bf219bb9419e0"),
    "apache-tvm-ffi": ("0.1.10", "96b69030c722572e13e30182733adfa2d604258e988b3f6630a16f397c7f9288"),
    "astor": ("0.8.1", "070a54e890cefb5b3739d19f30f5a5ec840ffc9c50ffa7d23cc9fc1a38ebbfc5"),
    "blake3": ("1.0.9", "bcd56a7a972c4185070f7042ccc20166927eec3c0f98b8405f375d007b604a0b"),
    "cachetools": ("7.2.0", "3045213f186b89fdd95d94441354c4bd87c570b7a38d8c3fd1d9dd37f6dc90d8"),
    "cbor2": ("6.1.3", "2226d32e102e375737656ad5d141ad8c6ae3e705e04e263f24756f0eb379c6c1"),
    "compressed-tensors": ("0.17.0", "4a1b89b508f7efb8ffb4eee8a6e69e0452d9b080cae130146025c64fbe9fa9aa"),
    "depyf": ("0.20.0", "d31effad4261cebecb58955d832e448ace88f432328f95f82fd99c30fd9308d4"),
    "dill": ("0.4.1", "1e1ce33e978ae97fcfcff5638477032b801c46c7c65cf717f95fbc2248f79a9d"),
    "fastapi": ("0.136.3", "3d2a69bdf04b7e9f3afa292c3bc7a98816bbfafa10bc9b45f3f3700d2f761620"),
    "httpcore2": ("2.13.1", "e1e05d4f25f7d7d496bfb96748f6f4b67657b03da069b3a68c36069f3db73d0a"),
    "httpx2": ("2.13.1", "6dff50fabc270ee5fd25d845d0b078ed20564579744d6d962850975996d2f9a4"),
    "ijson": ("3.5.1", "e4fcebfe1685bb7ba06a8255a5d428ea6b4b895d7acf979cb637d8bbc9db2f47"),
    "interegular": ("0.3.3", "b0c07007d48c89d6d19f7204972d369b2a77222722e126b6aa63aa721dc3b19c"),
    "jiter": ("0.16.0", "46add52f4ad47a08bfb1219f3e673da972191489a33016edefdb5ea55bfa8c48"),
    "jmespath": ("1.1.0", "a5663118de4908c91729bea0acadca56526eb2698e83de10cd116ae0f4e97c64"),
    "llguidance": ("1.7.6", "ceec951d29a74309984e3be0fe7f5f56c1362434cd937abd517b259a60908b1e"),
    "lm-format-enforcer": ("0.11.3", "cf586350875def1ae7a8fba84fcbbfc8371424b6c9d05c1fcba70aa233fbf06f"),
    "loguru": ("0.7.3", "31a33c10c8e1e10422bfd431aeb5d351c7cf7fa671e3c4df004162264b28220c"),
    "model-hosting-container-standards": (
        "0.1.16",
        "47f4f65713120bc3a69feb022981a38db9e557aedf88dbd72077f20588caa12b",
    ),
    "msgspec": ("0.21.1", "21995e74b5c598c2e004110ad66ec7f1b8c20bf2bcf3b2de8fd9a3094422d3ff"),
    "openai": ("3.22.1", "43ff3de5457a8beb4afa177d4e0ba6841cfadd5219ebc62297fde6c8a9d401a6"),
    "openai-harmony": ("0.0.8", "c007d277218a50db8839e599ed78e0fffe5130f614c3f6d93ae257f282071a29"),
    "partial-json-parser": (
        "0.2.1.1.post7",
        "145119e5eabcf80cbb13844a6b50a85c68bf99d376f8ed771e2a3c3b03e653ae",
    ),
    "prometheus-fastapi-instrumentator": (
        "8.0.2",
        "746002ec1e2c58b93f61444e1d104de959a9463a6a3f1c8909ac3757e16c3866",
    ),
    "pybase64": ("1.4.3", "bb632edfd132b3eaf90c39c89aa314beec4e946e210099b57d40311f704e11d4"),
    "pydantic": ("2.13.4", "45a282cde31d808236fd7ea9d919b128653c8b38b393d1c4ab335c62924d9aba"),
    "pydantic-core": ("2.46.4", "926c9541b14b12b1681dca8a0b75feb510b06c6341b70a8e500c2fdcff837cce"),
    "python-multipart": ("0.0.32", "ff6d3f776f16878c894e52e107296ffc890e913c611b1a4ec6c44e2821fe2e23"),
    "pyzmq": ("27.1.0", "43ad9a73e3da1fab5b0e7e13402f0b2fb934ae1c876c51d0afff0e7c052eca31"),
    "setproctitle": ("1.3.7", "2906b6c7959cdb75f46159bf0acd8cc9906cf1361c9e1ded0d065fe8f9039629"),
    "sniffio": ("1.3.1", "2f6da418d1f1e0fddd844478f41680e794e6051915791a034ff65e5f100525a2"),
    "starlette": ("1.7.0", "67f8e99895493dd2911a03f11314af6ceebeae4e704bb9f43dfc6a9db151c93e"),
    "truststore": ("0.10.4", "adaeaecf1cbb5f4de3b1959b42d41f6fab57b2b1666adb59e89cb0b53361d981"),
    "typing-inspection": ("0.4.4", "65b8397ba37ccbce054456aaccddfc91e6e3083c92824df348d96ca832f3f147"),
    "uvicorn": ("0.54.0", "505bdb0f318731d45f1f712071fc781a8981f6847a31c902c9f5e652d4f67faf"),
    "watchfiles": ("1.2.0", "e53a384f76b631c3ae5334ce6a52f0baa3a911eb94a4eac7f160079868b716d5"),
    "xgrammar": ("0.2.7", "e4397798f73512ab5abccbadf0a7b6aaf0753ccc4f3171c43b14c4d22df1ed28"),
}
"""name: (version, SHA-256 of the wheel for CPython 3.12 on x86-64 Linux)."""

DROP = (
    # FlashAttention 2: only PTX for sm_90; FlashAttention 3 is kept.
    "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so",
    # FlashAttention 4, and other kernels that need the CuTe DSL, which is not carried.
    "vllm/vllm_flash_attn/cute/*",
    "vllm/third_party/tml_fa4/*",
    # Blackwell only.
    "vllm/third_party/fmha_sm100/*",
    "vllm/_qutlass_C.abi3.so",
    # MLA models only.
    "vllm/_flashmla_C.abi3.so",
    "vllm/_flashmla_extension_C.abi3.so",
    # Block-scaled FP8 matrix products, compiled at run time.
    "vllm/third_party/deep_gemm/*",
    # Optional front end and parsers in Rust.
    "vllm/vllm-rs",
    "vllm/_rust_tool_parser.abi3.so",
    # Pictures, and a copy of the API pages' scripts.
    "vllm/entrypoints/serve/instrumentator/static/*",
    "*.jpg",
    # Headers.
    "tvm_ffi/include/*",
)
"""Files of the wheels that are left out (shell patterns on the path; "*" matches "/"), since serving a dense decoder
model on Hopper does not use them. vLLM works without each of them."""

NO_PTX = ("vllm/_moe_C_stable_libtorch.abi3.so",)
"""Extensions whose PTX is left out even without machine code for the target: Marlin kernels that only quantized
mixture-of-experts models call."""

NOT_CARRIED = (
    "anthropic fastsafetensors flashinfer-python humming-kernels jsonschema lark mcp mistral-common numba "
    "nvidia-cudnn-frontend nvidia-cutlass-dsl nvtx opentelemetry-api opentelemetry-exporter-otlp "
    "opentelemetry-sdk opentelemetry-semantic-conventions-ai outlines-core pynvvideocodec "
    "python-json-logger quack-kernels setuptools supervisor tilelang tokenspeed-mla torchcodec"
)
"""Requirements that are left out, or that the machine meets with another version."""

ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # required, since FlashInfer is left out
    "VLLM_USE_DEEP_GEMM": "0",  # DeepGEMM is left out
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Environment variables that the reduced vLLM needs on the GPU machine."""
