# GPT-2 124M with GaLoLTE on four GPUs: a head a card in one subspace of the averaged gradient, merged every 10 steps.
# python prepare.py cnn_dailymail && torchrun --standalone --nproc_per_node=4 train_gpt.py config/gpt2_galolte_4gpu.py
# Four GPUs of 12 GB with bfloat16: not yet run; cards without it need dtype = 'float32'
out_dir = 'out/gpt2_galolte_4gpu'
dataset = 'cnn_dailymail'
block_size, batch_size, gradient_accumulation_steps = 512, 32, 4
lowrank, heads, rank = 'attn,mlp', 4, 192
head_input, head_basis, merge_every = 'split', 'gradient', 10
galore_gap, galore_basis = 50, 'power'
max_iters, warmup_iters, eval_interval = 10000, 200, 250
learning_rate, min_lr, beta2 = 1e-2, 1e-3, 0.999
