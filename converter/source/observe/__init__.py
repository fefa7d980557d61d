"""Structure of a model, observed by running transformers' own code once without its weights."""
