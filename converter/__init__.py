"""Offline conversion of a Hugging Face checkpoint into a BWLA checkpoint.

After `import bwla_converter`, transformers' `AutoModelForCausalLM.from_pretrained` loads BWLA checkpoints.
"""

from bwla_converter.hf.registration import register_with_transformers

register_with_transformers()
