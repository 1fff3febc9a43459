# Adafactor (https://arxiv.org/abs/1804.04235) trains the matrices of attention and MLP and keeps
# m + n elements for a matrix (m, n). AdamW trains the rest.
# Learning rate: not tuned (2e-3 on the quick start).
optimizer = 'adafactor'
