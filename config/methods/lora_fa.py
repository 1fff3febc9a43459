# LoRA-FA: A stays as it was drawn, so that less is kept for the backward pass. Rates: not searched.
lowrank = 'attn,mlp'
heads, rank, alpha = 1, 64, 64.0
factors, split = 'B', False
merge_every = 0
