# Fira: GaLore on full gradients, whose rest moves W too; no layer computes less. At 3.3M: 1e-2.
optimizer = 'fira'
rank = 128
basis, basis_every, scale = 'power', 200, 0.25
