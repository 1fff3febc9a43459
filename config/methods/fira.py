# Fira: GaLore on full gradients, whose rest moves W too; no layer computes less. Rate: 1e-2 (not searched).
optimizer = 'fira'
rank = 128
basis, basis_every, scale = 'power', 200, 0.25
