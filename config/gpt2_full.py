# GPT-2 124M at full rank on CNN/DailyMail, context 512: the study's baseline.
# python prepare.py cnn_dailymail && torchrun --standalone --nproc_per_node=4 train_gpt.py config/gpt2_full.py
# Four GPUs of 12 GB: not yet run
out_dir = 'out/gpt2_full'
dataset = 'cnn_dailymail'
block_size, batch_size, gradient_accumulation_steps = 512, 32, 4
max_iters, warmup_iters, eval_interval = 10000, 200, 250
learning_rate, min_lr = 6e-4, 6e-5
