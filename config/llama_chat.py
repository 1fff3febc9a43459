# Chats: heads on a model of the LLaMA family, which learns the assistant's answers.
# python prepare.py text --input chats.jsonl --name chats --tokenizer FOLDER_OR_NAME
# python train_llama.py config/llama_chat.py config/methods/lora.py --init_from=FOLDER_OR_NAME
# python sample.py --out_dir=out/llama_chat --chat
# Rates: SmolLM2-135M, 4 bits, two seeds each, from 3.70: 5e-4 and 1e-3 end at 1.99, 2e-3 at 2.12
out_dir, init_from = 'out/llama_chat', 'HuggingFaceTB/SmolLM2-135M-Instruct'
dataset = 'chats'
block_size, batch_size, gradient_accumulation_steps = 256, 4, 1
max_iters, eval_interval, eval_iters, log_interval, warmup_iters = 60, 20, 5, 5, 6
rank = {'lora': 16, 'lora_fa': 16, 'mhlora': 4}
alpha = {'lora': 32.0, 'lora_fa': 32.0, 'mhlora': 32.0}
learning_rate = {'lora': 5e-4, 'lora_fa': 5e-4, 'mhlora': 5e-4}
grad_clip = 1.0
