# APOLLO-Mini: one random direction says how Adam would scale a whole matrix: no state. Rates: not searched.
optimizer = 'apollo'
rank, scale = 1, 128 ** 0.5
basis, basis_every = 'random', 200
