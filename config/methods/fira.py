# Fira: GaLore on full gradients, whose rest moves W too; no layer computes less. Best rate: 1e-2.
optimizer = 'fira'
rank = 128
basis, basis_every, scale = 'power', 200, 0.25
