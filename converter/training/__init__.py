"""Training of quantized models: per decoder layer, and by distillation of the whole model."""
