# APOLLO: full gradients, scaled column by column as Adam would in a random subspace. Rate: 1e-2 (not searched).
optimizer = 'apollo'
rank, scale = 128, 1.0
basis, basis_every = 'random', 200
