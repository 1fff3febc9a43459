# LoRA: one head of r (m + n) numbers trains and W does not. Learns within rank r. Rates: not searched.
lowrank = 'attn,mlp'
heads, rank, alpha = 1, 64, 64.0
factors, split = 'both', False
merge_every = 0
