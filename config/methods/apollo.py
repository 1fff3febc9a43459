# APOLLO: full gradients, scaled column by column as Adam would in a random subspace. Best rate at 3.3M so far: 2e-2.
optimizer = 'apollo'
rank, scale = 128, 1.0
basis, basis_every = 'random', 200
