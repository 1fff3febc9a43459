# ReLoRA: LoRA, merged and drawn anew now and then: the rank adds up. Best rate: 2e-3, at 3.3M 4e-3.
lowrank = 'attn,mlp'
heads, rank, alpha = 1, 64, 64.0
factors, split = 'both', False
merge_every, merge_reset, rewarm_iters = 100, True, 5
