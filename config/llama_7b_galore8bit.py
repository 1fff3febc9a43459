# LLaMA 7B with GaLore, rank 1024, 8-bit moments, projected backward, per-layer updates: the paper's 7B on one card of 24 GB.
# python prepare.py c4 --tokens 1_000_000_000 && python train_llama.py config/llama_7b_galore8bit.py
# One GPU of 24 GB: not yet run
out_dir = 'out/llama_7b_galore8bit'
dataset = 'c4'
size, param_dtype, dtype = '7b', 'bfloat16', 'bfloat16'
block_size, batch_size, gradient_accumulation_steps = 256, 8, 64
checkpointing = True
optimizer, galore_rank, galore_gap = 'galore', 1024, 500
galore_backward, per_layer, state_bits = 'projected', True, 8
max_iters, warmup_iters, eval_interval = 10000, 1000, 1000
learning_rate, min_lr = 0.005, 0.0005
