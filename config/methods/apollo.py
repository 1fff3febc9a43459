# APOLLO: full gradients, scaled column by column as Adam would in a random subspace. Rate: 2e-2 (of two).
optimizer = 'apollo'
rank, scale = 128, 1.0
basis, basis_every = 'random', 200
