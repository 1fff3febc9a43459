# GPT-2 124M with LTE on four GPUs, one head each: nothing at all is sent between merges, which come every 10 steps.
# python prepare.py cnn_dailymail && torchrun --standalone --nproc_per_node=4 train_gpt.py config/gpt2_lte_4gpu.py
# Four GPUs of 12 GB: not yet run
out_dir = 'out/gpt2_lte_4gpu'
dataset = 'cnn_dailymail'
block_size, batch_size, gradient_accumulation_steps = 512, 32, 4
lowrank, heads, rank, alpha = 'attn,mlp', 4, 32, 1024.0
head_input, merge_every, merge_reset, sync = 'split', 10, False, 'merge'
max_iters, warmup_iters, eval_interval = 10000, 200, 250
learning_rate, min_lr = 2e-4, 2e-5
