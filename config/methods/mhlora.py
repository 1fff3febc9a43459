# Multi-head LoRA, all heads at once: LoRA of rank H r. Best rate at alpha = 4 r: 5e-4 at 10.7M parameters, 2e-3 at 3.3M.
lowrank = 'attn,mlp'
heads, rank, alpha = 4, 16, 64.0
factors, split = 'both', False
merge_every = 0
