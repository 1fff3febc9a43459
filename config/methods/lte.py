# LTE: each head has its own part of the batch, and workers send heads at merges. Best rate, alpha = r: 2e-3.
lowrank = 'attn,mlp'
heads, rank, alpha = 4, 16, 16.0
factors, split = 'both', True
merge_every, merge_reset = 10, False
