# A model of the LLaMA family on one's own text, context 512.
# python train_llama.py config/llama_finetune.py config/methods/lora.py \
#   --init_from=FOLDER --dataset=mine
# SmolLM2-135M, Vim's manual, 100 steps of 256 tokens: 3.60 to 2.70 (lora at 5e-4) and 2.80 (galore
# at 1e-3)
# 7B by lora, planned, --init_from=FOLDER --param_dtype=bfloat16 --checkpointing=True: in 16 GiB
# --batch_size=9; in 12 GiB, with --frozen_bits=4: --batch_size=29
out_dir, init_from = 'out/llama_finetune', 'HuggingFaceTB/SmolLM2-135M'
block_size, batch_size, gradient_accumulation_steps = 512, 4, 4
max_iters, eval_interval, eval_iters, log_interval, warmup_iters = 500, 100, 20, 10, 20
rank = {'lora': 16, 'lora_fa': 16, 'mhlora': 4, 'lte': 4, 'relora': 16, 'galore': 128,
        'galore_lean': 128, 'fira': 128}
alpha = {'lora': 32.0, 'lora_fa': 32.0, 'mhlora': 32.0, 'lte': 8.0, 'relora': 32.0}
# lora and galore: the best of three; full, and the others, not searched
learning_rate = {'full': 2e-5, 'lora': 5e-4, 'lora_fa': 5e-4, 'mhlora': 5e-4, 'lte': 5e-4,
                 'relora': 5e-4, 'galore': 1e-3, 'galore_lean': 1e-3, 'fira': 3e-4}
grad_clip = {name: 0.0 if name == 'galore_lean' else 1.0 for name in learning_rate}
