# GPT-2 on one's own text, context 512.
# python train_gpt.py config/gpt2_finetune.py config/methods/lora.py --init_from=gpt2 --dataset=mine
# No pretrained GPT-2 was in reach: nothing here was tried, the rates are llama_finetune.py's
out_dir = 'out/gpt2_finetune'
init_from = 'gpt2'
block_size, batch_size, gradient_accumulation_steps = 512, 4, 4
max_iters, eval_interval, eval_iters, log_interval, warmup_iters = 500, 100, 20, 10, 20
rank = {'lora': 16, 'lora_fa': 16, 'mhlora': 4, 'lte': 4, 'relora': 16, 'galore': 128,
        'galore_lean': 128, 'fira': 128}
alpha = {'lora': 32.0, 'lora_fa': 32.0, 'mhlora': 32.0, 'lte': 8.0, 'relora': 32.0}
learning_rate = {'full': 2e-5, 'lora': 5e-4, 'lora_fa': 5e-4, 'mhlora': 5e-4, 'lte': 5e-4,
                 'relora': 5e-4, 'galore': 1e-3, 'galore_lean': 1e-3, 'fira': 3e-4}
grad_clip = {name: 0.0 if name == 'galore_lean' else 1.0 for name in learning_rate}
weight_decay = 0.0
