# GPT-2 124M with four LoRA heads on attention, in turn: gpt2_mhlora.py but for the time, the study's figure 1.
# python prepare.py cnn_dailymail && torchrun --standalone --nproc_per_node=4 train_gpt.py config/gpt2_mhlora_sequential.py
# Four GPUs of 12 GB: not yet run
out_dir = 'out/gpt2_mhlora_sequential'
dataset = 'cnn_dailymail'
block_size, batch_size, gradient_accumulation_steps = 512, 32, 4
lowrank, heads, rank, alpha = 'attn', 4, 4, 4.0
head_compute = 'sequential'
max_iters, warmup_iters, eval_interval = 10000, 200, 250
learning_rate, min_lr = 6e-4, 6e-5
