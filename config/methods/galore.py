# GaLore: all of W trains, Adam's moments are those of r of its dimensions. Best rate: 5e-3 at 10.7M, 2e-2 at 3.3M.
lowrank = 'attn,mlp'
heads, rank = 1, 128
factors, split = 'basis', False
merge_every = 1
basis, basis_every, scale = 'sketch', 200, 0.25
