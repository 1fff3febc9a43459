# APOLLO: each row of the full gradient, scaled as Adam would scale it in a random subspace. At 3.3M: 2e-2.
optimizer = 'apollo'
rank, scale = 128, 1.0
basis, basis_every = 'random', 200
