"""Support for BWLA checkpoints in transformers.

After `import bwla_converter.hf`, `AutoModelForCausalLM.from_pretrained` loads BWLA checkpoints and `save_pretrained`
writes them back unchanged. The import registers a quantizer in transformers' public registry, so it also imports
transformers.
"""

from bwla_converter.hf import quantizer as quantizer
