# GPT-2 124M with ReLoRA, sequential merging: one head on attention and MLP, merged and drawn anew every 500 steps.
# python prepare.py cnn_dailymail && torchrun --standalone --nproc_per_node=4 train_gpt.py config/gpt2_relora.py
# Four GPUs of 12 GB: not yet run
out_dir = 'out/gpt2_relora'
dataset = 'cnn_dailymail'
block_size, batch_size, gradient_accumulation_steps = 512, 32, 4
lowrank, heads, rank, alpha = 'attn,mlp', 1, 128, 128.0
merge_every, merge_reset, rewarm_iters = 500, True, 25
max_iters, warmup_iters, eval_interval = 10000, 200, 250
learning_rate, min_lr = 1e-3, 1e-4
