# APOLLO-Mini: one random direction says how Adam would scale a matrix: little state. At 3.3M: 5e-3 to 1e-2.
optimizer = 'apollo'
rank, scale = 1, 128 ** 0.5
basis, basis_every = 'random', 200
