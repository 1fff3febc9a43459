# Adafactor (https://arxiv.org/abs/1804.04235) trains the matrices of attention and MLP and keeps
# m + n elements for a matrix (m, n). AdamW trains the rest.
# Learning rate: 8e-3 at 0.5M parameters and 20 bytes of text per parameter, the best of three
# (docs/results.md, table 4); the quick start uses 2e-3.
optimizer = 'adafactor'
