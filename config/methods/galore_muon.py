# GaLore with Muon in place of Adam: one moment of r directions for all of W. Rates: not searched.
lowrank = 'attn,mlp'
heads, rank = 1, 128
factors, split = 'basis', False
merge_every = 1
optimizer = 'muon'
basis, basis_every, scale = 'sketch', 200, 1.0
