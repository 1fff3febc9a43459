# GaLore with Muon in place of Adam: one moment of r directions. Best rate: 2e-3 to 4e-3, at 3.3M 8e-3.
lowrank = 'attn,mlp'
heads, rank = 1, 128
factors, split = 'basis', False
merge_every = 1
optimizer = 'muon'
basis, basis_every, scale = 'sketch', 200, 1.0
