# Multi-head LoRA: several heads at once, as LoRA of rank H r. Best rate at alpha = 4 r: 5e-4, at 3.3M 2e-3.
lowrank = 'attn,mlp'
heads, rank, alpha = 4, 16, 64.0
factors, split = 'both', False
merge_every = 0
