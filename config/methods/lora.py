# LoRA: one head, r (m + n) of m n numbers train. Saves gradients and moments; learns within rank r. Rates: as mhlora.py.
lowrank = 'attn,mlp'
heads, rank, alpha = 1, 64, 64.0
factors, split = 'both', False
merge_every = 0
