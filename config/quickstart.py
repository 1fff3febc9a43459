# A small GPT with multi-head LoRA on Python's own sources, byte by byte: the first thing to run.
# python train_gpt.py config/quickstart.py
# Two CPU cores: 2 minutes, validation loss 2.29 nats a byte
out_dir = 'out/quickstart'
dataset = 'stdlib'
block_size, batch_size = 256, 8
n_layer, n_head, n_embd = 4, 4, 256
lowrank, heads, rank, alpha = 'attn', 4, 16, 16.0
max_iters, eval_interval, eval_iters, log_interval = 300, 100, 10, 10
learning_rate, min_lr, warmup_iters = 2e-3, 2e-4, 20
beta2 = 0.99
device, dtype = 'cpu', 'float32'
