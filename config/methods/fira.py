# Fira: GaLore, and what is outside the basis moves W too; full gradients are formed. At 3.3M: 1e-2.
optimizer = 'fira'
rank = 128
basis, basis_every, scale = 'power', 200, 0.25
