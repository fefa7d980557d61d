"""`make demo`: convert a model, serve it with vLLM beside the original, ask both the same question, measure both."""
