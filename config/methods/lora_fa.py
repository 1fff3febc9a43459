# LoRA-FA: LoRA whose A stays as drawn; r m numbers train, and the backward pass keeps x A^T instead of x.
lowrank = 'attn,mlp'
heads, rank, alpha = 1, 64, 64.0
factors, split = 'B', False
merge_every = 0
