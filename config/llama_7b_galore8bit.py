# LLaMA 7B with GaLore, rank 1024, 8-bit moments, projected backward, per layer: the paper's 7B on one card of 24 GB.
# python prepare.py c4 --tokens 1_000_000_000 && python train_llama.py config/llama_7b_galore8bit.py
# One GPU of 24 GB: not yet run, planned peak 21.4 GB; three steps of 1 x 256 ran on two CPU cores: 19.9 GB, 10 min (first edition)
out_dir = 'out/llama_7b_galore8bit'
dataset = 'c4'
size, param_dtype, dtype = '7b', 'bfloat16', 'bfloat16'
block_size, batch_size = 256, 16  # a batch of 16 for each card
gradient_accumulation_steps = 1  # more would keep r n numbers of every matrix between micro-batches, 3 GB
checkpointing = True
optimizer, galore_rank, galore_gap = 'galore', 1024, 500
galore_backward, galore_basis, per_layer, state_bits = 'projected', 'sketch', True, 8
max_iters, warmup_iters, eval_interval = 10000, 1000, 1000
learning_rate, min_lr = 0.005, 0.0005
