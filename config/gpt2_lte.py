# GPT-2 124M with LTE: four heads on attention and MLP, each on its own quarter of the batch, merged every 10 steps.
# python prepare.py cnn_dailymail && python train_gpt.py config/gpt2_lte.py
# One GPU of 12 GB: not yet run
out_dir = 'out/gpt2_lte'
dataset = 'cnn_dailymail'
block_size, batch_size, gradient_accumulation_steps = 512, 8, 16
lowrank, heads, rank, alpha = 'attn,mlp', 4, 32, 1024.0
head_input, merge_every, merge_reset = 'split', 10, False
max_iters, warmup_iters, eval_interval = 10000, 200, 250
learning_rate, min_lr = 2e-4, 2e-5
