# GPT-2 124M on CNN/DailyMail, context 512: the study's figures 1 (heads) and 2 (which layers).
# python prepare.py cnn_dailymail
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 torchrun --standalone --nproc_per_node=4 \
#   train_gpt.py config/gpt2.py config/methods/lte.py
# Figure 1: config/methods/mhlora.py --lowrank=attn --rank=4 --alpha=4
# Four GPUs of 12 GB: not yet run
out_dir = 'out/gpt2'
dataset = 'cnn_dailymail'
block_size, batch_size, gradient_accumulation_steps = 512, 32, 4
max_iters, warmup_iters, eval_interval = 10000, 200, 250
_galore = ('galore', 'galore_lean', 'galore_int8', 'galore_muon', 'galolte', 'galolte_2bit', 'fira',
           'apollo')
rank = {'lora': 128, 'lora_fa': 128, 'mhlora': 32, 'lte': 32, 'relora': 128,
        **dict.fromkeys(_galore, 192)}
alpha = {'lora': 128.0, 'lora_fa': 128.0, 'mhlora': 128.0, 'lte': 1024.0, 'relora': 128.0}
merge_every = {'relora': 500}
rewarm_iters = {'relora': 25}
learning_rate = {'full': 6e-4, 'local_adamw': 6e-4, 'lora': 6e-4, 'lora_fa': 6e-4, 'mhlora': 6e-4,
                 'lte': 2e-4, 'relora': 1e-3, 'galore': 5e-3, 'galore_lean': 5e-3,
                 'galore_int8': 5e-3, 'galolte': 1e-2, 'galolte_2bit': 2e-3, 'fira': 5e-3,
                 'muon': 1e-3, 'local_muon': 1e-3, 'muon_lean': 2e-3, 'galore_muon': 2e-3,
                 'apollo': 5e-3, 'apollo_mini': 5e-3, 'scale': 1e-3}
beta2 = dict.fromkeys(learning_rate, 0.95) | dict.fromkeys((*_galore, 'apollo_mini'), 0.999)
