# APOLLO: the full gradient, each row (column, if wide) scaled as Adam would in a random subspace. At 3.3M: 2e-2.
optimizer = 'apollo'
rank, scale = 128, 1.0
basis, basis_every = 'random', 200
