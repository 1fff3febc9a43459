# APOLLO: full gradients, scaled column by column as Adam would in a random subspace. Rates: not searched.
optimizer = 'apollo'
rank, basis_every, scale = 128, 200, 1.0
