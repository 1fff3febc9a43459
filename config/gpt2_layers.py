# GPT-2 124M with four split heads on some layers, merged every 10 steps, CNN/DailyMail: the study's figure 2.
# python prepare.py cnn_dailymail && python train_gpt.py config/gpt2_layers.py --lowrank=attn,mlp --out_dir=out/gpt2_AM
# One GPU of 12 GB: not yet run
out_dir = 'out/gpt2_layers'
dataset = 'cnn_dailymail'
block_size, batch_size, gradient_accumulation_steps = 512, 8, 16
lowrank = 'attn'  # figure 2 varies this: '' (none, with --merge_every=0), mlp, logit and their combinations
heads, rank, alpha = 4, 4, 4.0
head_input, merge_every, merge_reset = 'split', 10, False
max_iters, warmup_iters, eval_interval = 500, 50, 250
learning_rate, min_lr = 6e-4, 6e-5
