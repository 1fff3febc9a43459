# LTE: heads with a part of the batch each; workers talk at merges only. Best rate at alpha = r: 2e-3 (10.7M), 4e-3 (3.3M).
lowrank = 'attn,mlp'
heads, rank, alpha = 4, 16, 16.0
factors, split = 'both', True
merge_every, merge_reset = 10, False
