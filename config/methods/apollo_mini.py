# APOLLO-Mini: one random direction says how Adam would scale a whole matrix: no state. Rates: not searched.
optimizer = 'apollo'
rank, basis_every, scale = 1, 200, 128 ** 0.5
