# A model of the LLaMA family on one's own text, context 512.
# python train_llama.py config/llama_finetune.py config/methods/lora.py --init_from=FOLDER_OR_HUB_NAME --dataset=mine
# Rates: see below what was tried, on SmolLM2-135M
out_dir = 'out/llama_finetune'
block_size, batch_size, gradient_accumulation_steps = 512, 4, 4
max_iters, eval_interval, eval_iters, log_interval, warmup_iters = 500, 100, 20, 10, 20
rank = {'lora': 16, 'lora_fa': 16, 'mhlora': 4, 'lte': 4, 'relora': 16, 'galore': 128, 'galore_lean': 128,
        'fira': 128}
alpha = {'lora': 32.0, 'lora_fa': 32.0, 'mhlora': 32.0, 'lte': 8.0, 'relora': 32.0}
learning_rate = {'full': 2e-5, 'lora': 3e-4, 'lora_fa': 3e-4, 'mhlora': 3e-4, 'lte': 3e-4, 'relora': 3e-4,
                 'galore': 1e-4, 'galore_lean': 1e-4, 'fira': 1e-4}
grad_clip = {name: 0.0 if name == 'galore_lean' else 1.0 for name in learning_rate}
