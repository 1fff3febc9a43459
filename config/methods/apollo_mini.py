# APOLLO-Mini: one random direction says how Adam would scale a matrix: next to no state. Rate: 1e-2 (of two).
optimizer = 'apollo'
rank, scale = 1, 128 ** 0.5
basis, basis_every = 'random', 200
