"""BWLA checkpoints in transformers.

After `import bwla_converter.hf`, `AutoModelForCausalLM.from_pretrained` loads them and `save_pretrained` writes them
back unchanged. The import registers a quantizer with transformers' public registry, so it takes transformers' time.
"""

from bwla_converter.hf import quantizer as quantizer
